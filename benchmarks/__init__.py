"""Measurements against the bare loop and against dask; see ``python -m benchmarks.core --help``."""
