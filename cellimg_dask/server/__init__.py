"""Images over HTTP: virtual OME-Zarr, computed while it is read."""
