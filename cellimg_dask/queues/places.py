"""Where things can be imported from, in this Python and in others."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import cellimg_dask.bare as bare
from cellimg_dask.blocks.content import is_installed, is_installed_file

__all__ = ["folder_of", "is_of_the_library", "public_name"]

_LIBRARY = str(Path(str(bare.__file__)).parents[1])


def is_of_the_library(thing: Any) -> bool:
    """Whether a callable is one of this library's own, and none of the user's."""
    code = getattr(thing, "__code__", None)
    if code is not None:
        # A function's module may only look like ours, in the example of a docstring.
        return str(code.co_filename).startswith(_LIBRARY)
    kind = thing if isinstance(thing, type) else type(thing)
    return str(kind.__module__).partition(".")[0] == __name__.partition(".")[0]


def public_name(thing: Any) -> tuple[str, str] | None:
    """Return module and name under which a function or class is imported, None if there is none.

    The shortest: what a package shows is in the same place in other versions of it, and what it
    keeps to itself need not be.
    """
    if isinstance(thing, ModuleType):
        return None
    title = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None)
    owner = getattr(thing, "__self__", None)
    module = getattr(thing, "__module__", None)
    if isinstance(owner, type):
        title, module = f"{owner.__qualname__}.{thing.__name__}", owner.__module__
    elif isinstance(owner, ModuleType):
        module = owner.__name__
    if not isinstance(title, str) or "<" in title:
        return None
    names = str(module).split(".") if isinstance(module, str) else []
    places = [".".join(names[:number]) for number in range(1, len(names) + 1)]
    if not places:
        # NumPy's and SciPy's functions of C code do not all say where they are from.
        places = ["builtins", "numpy"]
    if isinstance(thing, np.ufunc):
        # Few say where they are from.
        places = ["numpy", "scipy.special", *places]
    # Private ones last.
    for place in sorted(places, key=lambda place: "._" in place):
        if place != "__main__" and _found(place, title, thing) and _is_importable(place):
            return place, title
    return None


def _found(place: str, title: str, thing: Any) -> bool:
    found: Any = sys.modules.get(place)
    try:
        for part in title.split("."):
            found = getattr(found, part)
    except Exception:
        # Packages may import what is asked for only then.
        return False
    # Of a class a method is another object each time.
    return found is thing or (hasattr(thing, "__self__") and bool(found == thing))


def _is_importable(module: str) -> bool:
    """Whether a module is found by its name, and is the one that was imported here."""
    if is_installed(module):
        return True
    folder, file = folder_of(module), getattr(sys.modules[module], "__file__", None)
    if folder is None or file is None:
        return False
    place, path = Path(folder, *module.split(".")), Path(file).resolve()
    if path.name == "__init__.py":
        return path.parent == place
    return path.parent == place.parent and path.name.partition(".")[0] == place.name


def folder_of(module: str) -> str | None:
    """Return the folder in which a module of the user's is found, None for those of packages."""
    top = module.partition(".")[0]
    if is_installed(top) or top == "__main__":
        return None
    spec = _spec_of(top)
    if spec is None or is_installed_file(spec.origin):
        return None
    if spec.origin is not None:
        path = Path(spec.origin).resolve()
        return str(path.parent.parent if path.name == "__init__.py" else path.parent)
    places = list(spec.submodule_search_locations or ())
    return str(Path(places[0]).resolve().parent) if places else None


def _spec_of(top: str) -> ModuleSpec | None:
    """Look for a module as an import would that has not been done yet."""
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(top, None)
        except (ImportError, ValueError, AttributeError):
            continue
        if spec is not None:
            return spec
    return None
