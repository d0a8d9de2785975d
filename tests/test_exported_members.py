"""The public names: which they are, that they exist, are documented, and live where they say."""

from __future__ import annotations

import importlib
import inspect
import sys
from importlib.resources import files
from types import ModuleType

import pytest

import cellimg_dask as ci

PUBLIC = [
    "Affine",
    "Array",
    "Block",
    "BlockCode",
    "BlockError",
    "BlockQueue",
    "BlockSchema",
    "BlockTimeoutError",
    "BlockUpdate",
    "Brush",
    "CacheStats",
    "Cell",
    "CellCache",
    "CellGrid",
    "CellImg",
    "CellimgError",
    "Change",
    "Channel",
    "CycleError",
    "Env",
    "EnvError",
    "Halo",
    "InitError",
    "Input",
    "LabelImg",
    "Landmarks",
    "Layer",
    "ListedArray",
    "Mesh",
    "NamedFunction",
    "NoContentError",
    "NoWorkersError",
    "OmeZarrReport",
    "ParameterError",
    "Pyramid",
    "QueueClosedError",
    "ReadError",
    "Reduced",
    "RemoteError",
    "Request",
    "ResultError",
    "Roi",
    "RunReport",
    "SaveError",
    "Server",
    "Source",
    "SourceChangedError",
    "Space",
    "Statistics",
    "StoredImage",
    "TargetInUseError",
    "ThinPlateSpline",
    "View",
    "Worker",
    "WorkerDiedError",
    "asgi_app",
    "blob_dog",
    "blob_log",
    "describe",
    "fill_cells",
    "get_cache",
    "get_worker",
    "histogram",
    "label",
    "latest",
    "list_images",
    "map_cells",
    "map_labels",
    "map_points",
    "map_stack",
    "merge_blobs",
    "merge_stack",
    "mesh",
    "normalize",
    "open_image",
    "prune_blobs",
    "pyramid",
    "quantiles",
    "reduce_cells",
    "region_table",
    "run",
    "segment",
    "serve",
    "set_cache",
    "split_stack",
    "stack_shape",
    "statistics",
    "stats",
    "stitch",
    "transpose",
    "view",
    "warp",
    "write_ome_zarr",
]

MODULES = ["shared"]
"""Modules that are public as such."""


def test_the_public_names_are_these_and_no_others():
    """Whoever changes this list changes what users see, and says so in the changelog."""
    assert sorted(ci.__all__) == sorted(PUBLIC + MODULES)
    assert len(set(ci.__all__)) == len(ci.__all__)


def test_nothing_else_is_in_the_namespace():
    public = {
        name
        for name, value in vars(ci).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_exists_is_documented_and_lives_where_it_says(name):
    value = getattr(ci, name)
    assert value.__name__ == name
    home = sys.modules[value.__module__]
    assert home.__name__.startswith("cellimg_dask.")
    assert name in home.__all__
    assert getattr(home, name) is value
    assert (value.__doc__ or "").strip()
    if inspect.isclass(value):
        for base in value.__mro__[1:]:
            assert value.__doc__ != base.__doc__, "the docstring is inherited"


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_has_what_it_says_and_documents_it(name):
    module = getattr(ci, name)
    assert (module.__doc__ or "").strip()
    for member in module.__all__:
        assert (getattr(module, member).__doc__ or "").strip(), member


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isclass(getattr(ci, name))])
def test_public_methods_and_properties_are_documented(name):
    undocumented = []
    for attribute, member in vars(getattr(ci, name)).items():
        plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if attribute.startswith("_") or not (
            inspect.isfunction(plain) or isinstance(plain, property)
        ):
            continue
        if not (plain.__doc__ or "").strip():
            undocumented.append(attribute)
    assert not undocumented


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.endswith("Error")])
def test_every_error_is_a_cellimg_error_and_a_builtin(name):
    error = getattr(ci, name)
    assert issubclass(error, ci.CellimgError)
    if name != "CellimgError":
        builtins = (RuntimeError, ValueError, TypeError, OSError, LookupError)
        assert issubclass(error, builtins)


def test_every_module_has_an_all_whose_names_exist():
    import pkgutil

    for info in pkgutil.walk_packages(ci.__path__, "cellimg_dask."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        if info.ispkg and not hasattr(module, "__all__"):
            continue  # A folder that only names its floor.
        assert hasattr(module, "__all__"), info.name
        for name in module.__all__:
            assert hasattr(module, name), f"{info.name}.{name}"
        assert (module.__doc__ or "").strip(), info.name


def test_the_package_says_that_it_is_typed():
    assert files("cellimg_dask").joinpath("py.typed").is_file()
