"""Measurements against the bare loop and dask; see ``python -m benchmarks.core --help`` and
``python -m benchmarks.queue --help``.
"""
