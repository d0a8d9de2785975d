"""Functions that a spec names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.bare.naming import (
    attribute_of,
    import_file,
    import_module,
    is_file_name,
    split_name,
)

__all__ = ["above", "load_function"]


def above(image: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    """Return where an image exceeds a threshold, as NumPy compares."""
    mask: NDArray[np.bool_] = image > threshold
    return mask


def load_function(name: str, folder: Path) -> Callable[..., Any]:
    """Return the function that is called ``module:name`` or ``file.py:name``.

    Parameters
    ----------
    name : str
        With the functions of a class as ``module:Class.name``.
    folder : Path
        Where the file is looked for.
    """
    place, attribute = split_name(name)
    in_file = is_file_name(place)
    module = _by_value((folder / place).resolve()) if in_file else import_module(place)
    function: Callable[..., Any] = attribute_of(module, attribute, place)
    return function


def _by_value(path: Path) -> Any:
    """Run a file and return its module.

    Workers, which cannot import it, get it by value; also other files beside it that it imports.
    """
    import cloudpickle

    before = set(sys.modules)
    # What it imports may have changed, too.
    module = import_file(str(path), again=True)
    cloudpickle.register_pickle_by_value(module)
    for name in sys.modules.keys() - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(path.parent) and "." not in name:
            cloudpickle.register_pickle_by_value(sys.modules[name])
    return module
