"""Stub."""

from cellimg_dask.blocks.functions import BlockCode


def ship(f):
    if isinstance(f, str):
        return {"name": f, "folders": []}
    if isinstance(f, BlockCode):
        return {"code": f.code, "init": f.init}
    if getattr(f, "__module__", "").startswith("cellimg_dask"):
        return None
    import inspect
    import textwrap

    return {
        "source": "import os, sys, time, numpy as np\n" + textwrap.dedent(inspect.getsource(f)),
        "name": f.__name__,
    }


def ship_init(init):
    if init is None:
        return None
    if isinstance(init, str):
        return {"code": init}
    return ship(init)
