"""`cellimg info` says what is in a file, and leaves the file as it is."""

from __future__ import annotations

import hashlib
import re
import shutil

import numpy as np
import pytest
from image_files import write_n5

import cellimg_dask as ci


def facts(output: str, section: str | None = None) -> dict[str, str]:
    """Read the lines ``name  value`` below a section's heading."""
    lines = output.splitlines()
    if section is not None:
        lines = lines[lines.index(section) + 1 :]
        end = next((n for n, line in enumerate(lines) if not line.startswith("  ")), len(lines))
        lines = lines[:end]
    found = {}
    for line in lines:
        match = re.fullmatch(r"  (\S+(?: \S+)*)  +(.*)", line)
        if match:
            found[match[1]] = match[2]
    return found


def fingerprint(path):
    """Return names, contents and times of everything below a path."""
    every = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [
        (
            item.relative_to(path),
            item.stat().st_mtime_ns,
            hashlib.sha256(item.read_bytes()).hexdigest() if item.is_file() else "folder",
        )
        for item in every
    ]


EXPECTED = {
    "gray.png": ("PNG", (40, 50), "uint8", "y, x", "none", "deflate"),
    "colour.png": ("PNG", (40, 50, 3), "uint8", "y, x, s (s: colour samples)", "none", "deflate"),
    "colour.jpg": ("JPEG", (40, 50, 3), "uint8", "y, x, s (s: colour samples)", "none", "jpeg"),
    "stack.tif": ("TIFF", (6, 40, 50), "uint16", "z, y, x", "(1, 40, 50)", "adobe_deflate"),
    "tiled-rgb.tif": (
        "TIFF",
        (40, 50, 3),
        "uint8",
        "y, x, s (s: colour samples)",
        "(16, 16, 3)",
        "none",
    ),
    "channels.ome.tif": (
        "TIFF",
        (2, 6, 40, 50),
        "uint16",
        "c, z, y, x",
        "(1, 1, 40, 50)",
        "none",
    ),
    "stack.npy": ("npy", (6, 40, 50), "uint16", None, "none", "none"),
    "v2.zarr": ("zarr v2", (6, 40, 50), "uint16", None, "(2, 16, 16)", "zstd"),
    "sharded.zarr": ("zarr v3", (6, 40, 50), "uint16", "z, y, x", "(2, 16, 16)", "zstd"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_of_one_array(run, files, name):
    kind, shape, dtype, axes, chunks, compression = EXPECTED[name]
    result = run("info", files[name])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == f"{files[name]}: {kind}, 1 array"
    said = facts(result.output)
    assert said["shape"] == str(shape)
    assert said["dtype"] == dtype
    assert said.get("axes") == axes
    assert said["chunks"] == chunks
    assert said["compression"] == compression


def test_shards_are_told_from_chunks(run, files):
    said = facts(run("info", files["sharded.zarr"]).output)
    assert (said["chunks"], said["shards"]) == ("(2, 16, 16)", "(4, 32, 32)")


def test_every_array_of_a_group_is_listed_the_full_resolution_first(run, files):
    output = run("info", files["ome.zarr"]).output
    assert "zarr v3, 3 arrays" in output
    assert output.index("\nfull\n") < output.index("\nhalf\n") < output.index("\na_label\n")
    assert facts(output, "full")["axes"] == "z, y, x"
    assert facts(output, "half")["shape"] == "(3, 20, 25)"
    assert "axes" not in facts(output, "a_label")


def test_every_dataset_of_an_hdf5_file_is_listed(run, files):
    output = run("info", files["measured.h5"]).output
    assert facts(output, "exposure")["shape"] == "()"
    volume = facts(output, "raw/volume")
    assert volume["shape"] == "(6, 40, 50)"
    assert volume["chunks"] == "(1, 20, 25)"
    assert volume["compression"] == "gzip"


def test_every_series_of_a_tiff_is_listed(run, files):
    output = run("info", files["two-series.tif"]).output
    assert facts(output, "series 0")["shape"] == "(40, 50)"
    assert facts(output, "series 1")["axes"] == "z, y, x"


def test_size_on_disk_counts_the_files_of_a_store(run, files):
    store = files["v2.zarr"]
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    said = facts(run("info", store).output)["size"]
    assert said == f"23.44 kiB, {size / 1024:.2f} kiB on disk"


def test_default_cells_are_those_of_map_cells(run, files, tmp_path):
    big = tmp_path / "big.npy"
    # A sparse file: nothing of its 2 GB is read or written.
    np.lib.format.open_memmap(big, mode="w+", dtype="u2", shape=(1000, 1000, 1000))
    array = np.load(big, mmap_mode="r")
    grid = ci.map_cells(np.sqrt, array, dtype="f4").grid
    said = facts(run("info", big).output)
    assert said["default cells"].startswith(f"{grid.num_cells:,} of {grid.cell_shape}")
    edge = grid.cell_shape[0]
    assert f"{2 * edge**3 / 2**20:.2f} MiB to read and as much to write" in said["one block"]
    assert f"{2 * (edge + 16) ** 3 / 2**20:.2f} MiB to read" in said["one block"]


def test_an_empty_array_is_described(run, files):
    said = facts(run("info", files["empty.npy"]).output)
    assert said["shape"] == "(0, 40, 50)"
    assert said["default cells"].startswith("0 of")


def test_a_dtype_that_cells_cannot_hold_is_said(run, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "words.h5", "w") as file:
        file["words"] = "text"
    said = facts(run("info", tmp_path / "words.h5").output)
    assert said["default cells"].startswith("none: dtype object")


@pytest.mark.parametrize(
    "name", [*EXPECTED, "ome.zarr", "bare-group.zarr", "measured.h5", "two-series.tif"]
)
def test_nothing_on_disk_changes(run, files, name):
    before = fingerprint(files[name])
    run("info", files[name])
    assert fingerprint(files[name]) == before


def test_an_n5_folder_is_listed_with_its_axes_turned_round(run, stack, tmp_path):
    write_n5(tmp_path / "a.n5" / "raw" / "s0", stack)
    said = facts(run("info", tmp_path / "a.n5").output, "raw/s0")
    assert said["shape"] == "(6, 40, 50)"
    assert said["chunks"] == "(6, 16, 16)"
    assert said["compression"] == "gzip"


def test_an_empty_n5_folder_is_refused_and_stays_as_it_is(run, tmp_path):
    folder = tmp_path / "a.n5"
    folder.mkdir()
    (folder / "attributes.json").write_text('{"n5": "2.0.0"}')
    before = fingerprint(folder)
    result = run("info", folder)
    assert result.exit_code == 1
    assert "N5" in result.output
    assert fingerprint(folder) == before


def test_a_group_without_arrays_is_an_error(run, files):
    result = run("info", files["bare-group.zarr"])
    assert result.exit_code == 1
    assert "holds no array" in result.output


def test_files_are_told_by_what_they_hold_not_by_their_name(run, files, tmp_path):
    disguised = tmp_path / "picture.data"
    shutil.copy(files["gray.png"], disguised)
    assert ": PNG, 1 array" in run("info", disguised).output


@pytest.mark.parametrize("command", ["info", "demo"])
@pytest.mark.parametrize(
    ("name", "length", "said"),
    [
        ("colour.jpg", 100, "cannot read"),
        ("stack.npy", 20, "cannot read"),
        ("measured.h5", 600, "cannot read"),
        ("gray.png", 20, "cannot read"),
        ("stack.tif", 4, "cannot read"),
        ("gray.png", 0, "no known format"),
    ],
)
def test_a_damaged_file_is_named(run, files, tmp_path, command, name, length, said):
    damaged = tmp_path / f"damaged-{name}"
    damaged.write_bytes(files[name].read_bytes()[:length])
    result = run(command, damaged)
    assert result.exit_code == 1
    assert str(damaged) in result.output
    assert said in result.output


@pytest.mark.parametrize("command", ["info", "demo"])
def test_a_missing_file_is_named(run, command):
    result = run(command, "nowhere.tif")
    assert result.exit_code == 2
    assert "'nowhere.tif' does not exist" in result.output


def test_a_missing_package_says_which_extra_has_it(run, files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    result = run("info", files["measured.h5"])
    assert result.exit_code == 1
    assert "pip install 'cellimg-dask[formats]'" in result.output
