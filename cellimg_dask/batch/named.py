"""Functions that a spec names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    module_name, _, attribute = name.rpartition(":")
    if module_name.endswith(".py"):
        module = _load_file((folder / module_name).resolve())
    else:
        module = importlib.import_module(module_name)
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise AttributeError(f"{module_name} has no function {attribute!r}")
    function: Callable[..., Any] = found
    return function


def _load_file(path: Path) -> Any:
    """Run a file and return its module.

    Workers, which cannot import it, get it by value; also other files beside it that it imports.
    """
    import cloudpickle

    # A name of its own: the file may be called as a module of Python's, signal.py for instance.
    spec = importlib.util.spec_from_file_location(f"cellimg_spec.{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses look their module up.
    sys.modules[module.__name__] = module
    folder = str(path.parent)
    if folder not in sys.path:
        # At the end, so that what is installed goes first, whatever the files are called.
        sys.path.append(folder)
    before = set(sys.modules)
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    for name in sys.modules.keys() - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(folder) and "." not in name:
            cloudpickle.register_pickle_by_value(sys.modules[name])
    return module
