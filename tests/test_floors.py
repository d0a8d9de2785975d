"""Who may know whom: each module imports from lower floors or its own folder, never in a circle.

Read from the syntax tree, so that imports inside functions, in branches and for type checkers
count as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "cellimg_dask"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

FLOORS: dict[str, float] = {
    "bare": -1,  # Runs without the rest of the package.
    "geometry": 0,
    "blocks": 1,
    "schemas": 1.5,  # Knows functions and their errors, and nothing of images.
    "state": 2,
    "loading": 3,
    "queues": 3.5,  # The upper landing of floor 3: the loader knows queues by a protocol only.
    "image": 4,
    "ops": 5,
    "io": 5.5,  # The upper landing of floor 5: it writes by `batch` what `ops` makes smaller.
    "batch": 5,
    "server": 6,
    "viewer": 6.5,  # The upper landing of floor 6: it shows what the server serves.
    "cli": 6.5,
}
TOP = 7
"""The package's own ``__init__``, the face that users see, and ``__main__``."""
USERS = {"cli"}
"""Folders that use the package by its face, as any user does; the face knows nothing of them."""

FOREIGN = {
    "bare": {"numpy"},
    "geometry": {"numpy"},
    "blocks": {"numpy", "cloudpickle"},
    "state": {"numpy"},
}
"""What the low floors may import beyond the standard library; cloudpickle for errors' causes."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def folder(module: str) -> str | None:
    """Return the folder of a module, None for those at the top of the package."""
    parts = module.split(".")
    if len(parts) > 2 or MODULES.get(module, ROOT).name == "__init__.py":
        return parts[1] if len(parts) > 1 else None
    return None


def floor(module: str) -> float:
    place = folder(module)
    return TOP if place is None else FLOORS[place]


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Yield the dotted name and the line of everything that a module imports, wherever it does."""
    path = MODULES[module]
    here = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = here.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                # A name from a package may be one of its modules.
                yield inner if inner in MODULES else base, node.lineno
        elif isinstance(node, ast.Call) and node.args:
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value), node.lineno


def test_the_package_is_found():
    assert {PACKAGE, f"{PACKAGE}.geometry", f"{PACKAGE}.geometry.roi"} <= set(MODULES)
    assert "numpy" in {target for target, _ in imports(f"{PACKAGE}.geometry.border")}
    assert floor(PACKAGE) == floor(f"{PACKAGE}.__main__") == TOP
    assert floor(f"{PACKAGE}.geometry") == floor(f"{PACKAGE}.geometry.roi") == 0


def test_every_folder_stands_on_a_floor():
    folders = {folder(module) for module in MODULES} - {None}
    assert folders <= set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_floors_or_its_own_folder(module):
    wrong = [
        f"line {line}: {target}"
        for target, line in imports(module)
        if target.partition(".")[0] == PACKAGE
        and not (floor(target) < floor(module) or folder(target) == folder(module))
        and not (folder(module) in USERS and target == PACKAGE)
    ]
    assert not wrong


def test_the_face_does_not_know_its_users():
    assert not {folder(target) for target, _ in imports(PACKAGE)} & USERS


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        module: {target for target, _ in imports(module) if target in MODULES} - {module}
        for module in MODULES
    }
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imported in a circle: {' <- '.join(error.args[1])}")
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("module", [module for module in MODULES if folder(module) in FOREIGN])
def test_the_low_floors_know_numpy_and_the_standard_library_only(module):
    allowed = {PACKAGE, *FOREIGN[folder(module) or ""], *sys.stdlib_module_names}
    wrong = [
        f"line {line}: {target}"
        for target, line in imports(module)
        if target.partition(".")[0] not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("module", [module for module in MODULES if folder(module) == "bare"])
def test_what_runs_in_other_pythons_is_written_for_the_oldest(module):
    text = MODULES[module].read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 9))
    absolute = [target for target, _ in imports(module) if target == PACKAGE]
    assert not absolute
    assert f"import {PACKAGE}" not in text
    assert f"from {PACKAGE}" not in text


@pytest.mark.parametrize("module", MODULES)
def test_whatever_is_imported_from_the_package_exists(module):
    known = set(MODULES)
    missing = [
        target
        for target, _ in imports(module)
        if target.partition(".")[0] == PACKAGE and target not in known
    ]
    assert not missing


HEAVY = [
    "dask",
    "distributed",
    "zarr",
    "tensorstore",
    "h5py",
    "scipy",
    "skimage",
    "tifffile",
    "neuroglancer",
    "uvicorn",
    "httptools",
    "appose",
    "matplotlib",
    "imageio",
    "click",
    "pydantic",
    "pydantic_core",
    "yaml",
]


def loaded_after(program: str) -> set[str]:
    listing = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", f"{program}\n{listing}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import cellimg_dask")
    assert {"numpy", PACKAGE} <= loaded
    assert not loaded & set(HEAVY)


def test_reading_numpy_lazily_loads_nothing_heavy():
    loaded = loaded_after(
        "import numpy as np, cellimg_dask as ci\n"
        "img = ci.map_cells(np.negative, np.arange(10), halo=1, cell_shape=3)\n"
        "img[:], repr(img), img.stats(), img.invalidate()"
    )
    assert not loaded & set(HEAVY)
