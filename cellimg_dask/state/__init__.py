"""Floor 2: what is kept between calls. Knows geometry and blocks, neither dask nor zarr."""
