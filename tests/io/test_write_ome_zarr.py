"""Writing OME-Zarr: what is written, what others read of it, and carrying on."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import tensorstore
import xarray
import yaozarrs
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import cellimg_dask as ci
from cellimg_dask.io.ome_group import written_arrays

SPACE = ci.Space.of(3, "zyx", "um", scale=(2, 0.5, 0.5), translation=(0, 10, -5))
VOLUME = np.random.default_rng(8).integers(0, 1000, (9, 21, 30), "u2")
VERSIONS = pytest.mark.parametrize("version", ["0.4", "0.5"])


class Doubled:
    """Doubles, counts its calls by cell, and fails where it is told to."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[int, ...]] = Counter()
        self.fails: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()

    def image(self, volume: Any = VOLUME, cell_shape: Any = (4, 8, 8)) -> ci.CellImg:
        def double(block: ci.Block) -> None:
            with self._lock:
                self.calls[block.position] += 1
            if block.position in self.fails:
                raise ValueError("told to fail")
            np.multiply(block.inputs[0], 2, out=block.data, casting="unsafe")

        return ci.fill_cells(
            double, ci.CellGrid(volume.shape, cell_shape), volume, dtype="u2", version="1"
        ).with_space(SPACE)


def attributes(path: Path, version: str) -> dict[str, Any]:
    if version == "0.4":
        return json.loads((path / ".zattrs").read_text())
    return json.loads((path / "zarr.json").read_text())["attributes"]["ome"]


def quiet(img: Any, path: Path, **settings: Any) -> Any:
    return ci.write_ome_zarr(img, path, progress=False, **settings)


@VERSIONS
def test_levels_and_where_they_lie(tmp_path: Path, version: Any) -> None:
    made, path = Doubled(), tmp_path / "brain.ome.zarr"
    report = quiet(made.image(), path, version=version)
    assert report.ok
    assert list(report.arrays) == ["0", "1", "2"]
    assert set(made.calls.values()) == {1}
    assert len(made.calls) == 3 * 3 * 4
    assert report.computed == 36 + 2 * 2 * 2 + 1
    whole = ci.pyramid(VOLUME * 2, 3)
    for number, level in enumerate(whole):
        array = zarr.open_array(path / str(number), mode="r")
        assert array.metadata.zarr_format == (2 if version == "0.4" else 3)
        assert array.chunks == tuple(
            min(4 if axis == 0 else 8, n) for axis, n in enumerate(level.shape)
        )
        np.testing.assert_array_equal(array[:], level[:])
    entry = attributes(path, version)["multiscales"][0]
    assert entry["name"] == "brain"
    assert [axis["name"] for axis in entry["axes"]] == ["z", "y", "x"]
    assert {(axis["type"], axis["unit"]) for axis in entry["axes"]} == {("space", "micrometer")}
    places = [
        [part[part["type"]] for part in data["coordinateTransformations"]]
        for data in entry["datasets"]
    ]
    assert places == [
        [[2, 0.5, 0.5], [0, 10, -5]],
        [[4, 1, 1], [1, 10.25, -4.75]],
        [[8, 2, 2], [3, 10.75, -4.25]],
    ]


@VERSIONS
def test_others_read_it(tmp_path: Path, version: Any) -> None:
    path = tmp_path / "brain.ome.zarr"
    mask = VOLUME > 500
    quiet(
        Doubled().image(),
        path,
        version=version,
        labels={"bright": ci.label(mask, cell_shape=(4, 8, 8))},
    )
    yaozarrs.validate_zarr_store(str(path))
    np.testing.assert_array_equal(da.from_zarr(str(path), "1"), ci.pyramid(VOLUME * 2, 2)[1][:])
    driver = "zarr" if version == "0.4" else "zarr3"
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path / "0")}}
    stored = tensorstore.open(spec, read=True).result()
    np.testing.assert_array_equal(stored.read().result(), VOLUME * 2)
    if version == "0.5":
        assert stored.domain.labels == ("z", "y", "x")
    # Warnings of other libraries are theirs.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ome_zarr.io import parse_url
        from ome_zarr.reader import Reader

        nodes = list(Reader(parse_url(str(path)))())
    image, found = nodes[0], [node for node in nodes if "labels/bright" in str(node.zarr)]
    np.testing.assert_array_equal(image.data[0], VOLUME * 2)
    assert [axis["name"] for axis in image.metadata["axes"]] == ["z", "y", "x"]
    assert len(image.data) == 3
    assert found
    np.testing.assert_array_equal(np.asarray(found[0].data[0]) > 0, mask)


def test_labels_take_the_most_frequent_value(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    mask = VOLUME > 400
    labels = ci.label(ci.Input(mask, space=SPACE), cell_shape=(4, 8, 8))
    quiet(VOLUME, path, labels={"bright": labels}, levels=2)
    stored = zarr.open_array(path / "labels/bright/1", mode="r")
    np.testing.assert_array_equal(stored[:], ci.pyramid(labels, 2, "labels")[1][:])
    assert attributes(path / "labels", "0.5")["labels"] == ["bright"]
    assert attributes(path / "labels/bright", "0.5")["image-label"] == {}
    # Labels are an image by themselves, too.
    quiet(labels, tmp_path / "labels.zarr", levels=2)
    np.testing.assert_array_equal(
        zarr.open_array(tmp_path / "labels.zarr/1", mode="r")[:], stored[:]
    )


def test_labels_that_come_later(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    image = Doubled()
    quiet(image.image(), path)
    labels = ci.label(VOLUME > 400, cell_shape=(4, 8, 8))
    report = quiet(image.image(), path, labels={"one": labels})
    assert set(image.calls.values()) == {1}
    assert report.arrays["0"].skipped == 36
    quiet(image.image(), path, labels={"two": labels})
    assert attributes(path / "labels", "0.5")["labels"] == ["one", "two"]
    assert sorted(written_arrays(str(path))) == [
        f"{path}/{name}"
        for name in ["0", "1", "2", *(f"labels/{x}/{n}" for x in ("one", "two") for n in range(3))]
    ]


@VERSIONS
def test_labels_for_an_image_that_somebody_else_wrote(tmp_path: Path, version: Any) -> None:
    path = tmp_path / "a.zarr"
    quiet(Doubled().image(), path, version=version)
    shutil.rmtree(tmp_path / "a.zarr.run")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    opened = ci.open_image(path)
    report = quiet(
        None, path, labels={"bright": ci.label(ci.map_cells(_bright, opened, dtype=bool))}
    )
    assert set(report.arrays) == {"labels/bright/0", "labels/bright/1", "labels/bright/2"}
    assert {file: file.read_bytes() for file in before} == before
    yaozarrs.validate_zarr_store(str(path))
    np.testing.assert_array_equal(
        np.asarray(ci.open_image(path).labels["bright"]) > 0, VOLUME * 2 > 1000
    )
    assert quiet(None, path, labels={"other": VOLUME}, overwrite=True).ok
    assert list(ci.open_image(path).labels) == ["bright", "other"]
    assert {file: file.read_bytes() for file in before} == before
    with pytest.raises(FileExistsError, match="leave version out"):
        quiet(None, path, labels={"x": VOLUME}, version="0.4" if version == "0.5" else "0.5")
    with pytest.raises(FileExistsError, match="resume=True carries it on"):
        quiet(None, path, labels={"other": VOLUME}, resume=False)


def _bright(block: NDArray[Any]) -> NDArray[np.bool_]:
    return block > 1000


def test_labels_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the image as well"):
        quiet(None, tmp_path / "a.zarr", labels={"x": VOLUME})
    with pytest.raises(TypeError, match="nothing to write"):
        quiet(None, tmp_path / "a.zarr")
    assert not list(tmp_path.iterdir())


def test_a_change_is_carried_up(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    source = ci.Source(VOLUME, (4, 8, 8))
    made = Doubled()
    image = made.image(source)
    quiet(image, path)
    made.calls.clear()
    with source.edit() as voxels:
        voxels[0, 0, 0] = 999
    report = quiet(image, path)
    assert list(made.calls) == [(0, 0, 0)]
    assert [done.computed for done in report.arrays.values()] == [1, 1, 1]
    whole = np.array(VOLUME)
    whole[0, 0, 0] = 999
    for number, level in enumerate(ci.pyramid(whole * 2, 3)):
        np.testing.assert_array_equal(zarr.open_array(path / str(number), mode="r")[:], level[:])


def test_what_is_damaged_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    made = Doubled()
    quiet(made.image(), path)
    made.calls.clear()
    (path / "1/c/0/0/0").write_bytes(b"harm")
    (path / "0/c/1/1/1").unlink()
    report = quiet(made.image(), path)
    assert list(made.calls) == [(1, 1, 1)]
    assert [done.computed for done in report.arrays.values()] == [1, 1, 0]
    np.testing.assert_array_equal(
        zarr.open_array(path / "1", mode="r")[:], ci.pyramid(VOLUME * 2, 2)[1][:]
    )


def test_a_cell_that_fails_holds_up_the_coarser_levels(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    made = Doubled()
    made.fails.add((2, 2, 3))
    report = quiet(made.image(), path, retries=0)
    assert not report.ok
    assert list(report.failed) == [("0", (2, 2, 3))]
    assert "told to fail" in str(report)
    assert list(report.arrays) == ["0"]
    # A viewer finds all levels nevertheless.
    yaozarrs.validate_zarr_store(str(path))
    made.fails.clear()
    made.calls.clear()
    report = quiet(made.image(), path)
    assert report.ok
    assert list(made.calls) == [(2, 2, 3)]
    assert report.computed == 1 + 8 + 1


def test_levels_that_are_given(tmp_path: Path) -> None:
    """The function applied to the input made smaller, instead of the output made smaller."""
    inputs = ci.pyramid(ci.Input(VOLUME, space=SPACE), 2)
    images = [ci.map_cells(np.sqrt, level, dtype="f8", cell_shape=8) for level in inputs]
    quiet(images, tmp_path / "a.zarr")
    for number, image in enumerate(images):
        stored = zarr.open_array(tmp_path / "a.zarr" / str(number), mode="r")
        np.testing.assert_array_equal(stored[:], image[:])
    entry = attributes(tmp_path / "a.zarr", "0.5")["multiscales"][0]
    assert entry["datasets"][1]["coordinateTransformations"][0]["scale"] == [4, 1, 1]
    quiet(inputs, tmp_path / "b.zarr")
    assert zarr.open_array(tmp_path / "b.zarr/1", mode="r").shape == (5, 11, 15)
    with pytest.raises(TypeError, match="the levels are given"):
        quiet(images, tmp_path / "c.zarr", factors=2)


def test_time_and_channels_stay(tmp_path: Path) -> None:
    series = np.zeros((2, 3, 20, 20), "u1")
    space = ci.Space.of(4, "tcyx", units={"t": "s"})
    quiet(ci.Input(series, space=space), tmp_path / "a.zarr", levels=2)
    assert zarr.open_array(tmp_path / "a.zarr/1", mode="r").shape == (2, 3, 10, 10)
    entry = attributes(tmp_path / "a.zarr", "0.5")["multiscales"][0]
    assert [axis["type"] for axis in entry["axes"]] == ["time", "channel", "space", "space"]
    assert entry["axes"][0]["unit"] == "second"


@VERSIONS
def test_shards_and_codecs(tmp_path: Path, version: Any) -> None:
    image = Doubled().image(cell_shape=(4, 8, 8))
    if version == "0.4":
        with pytest.raises(ValueError, match="zarr 2 has no shards"):
            quiet(image, tmp_path / "a.zarr", version=version, chunks=4, sharded=True)
    for number, codec in enumerate(("zstd", "blosc", "gzip", None)):
        path = tmp_path / f"{number}.zarr"
        quiet(image, path, version=version, chunks=4, compressor=codec, levels=1)
        array = zarr.open_array(path / "0", mode="r")
        assert array.chunks == (4, 4, 4)
        assert array.shards == (None if version == "0.4" else (4, 8, 8))
        np.testing.assert_array_equal(array[:], VOLUME * 2)


@VERSIONS
def test_chunks_need_not_divide_a_level_that_is_one_cell(tmp_path: Path, version: Any) -> None:
    image = ci.map_cells(np.negative, np.arange(18 * 23, dtype="i4").reshape(18, 23), cell_shape=8)
    report = quiet(image, tmp_path / "a.zarr", version=version, chunks=4)
    assert report.ok
    for number, level in enumerate(ci.pyramid(image)):
        array = zarr.open_array(tmp_path / "a.zarr" / str(number), mode="r")
        assert array.chunks == (4, 4)
        np.testing.assert_array_equal(array[:], level)
    assert array.shape == (5, 6)
    assert array.shards == (None if version == "0.4" else (8, 8))
    assert quiet(image, tmp_path / "a.zarr", version=version, chunks=4).skipped == report.computed


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=3),
    cell=st.integers(1, 6),
    dtype=st.sampled_from(["u1", "bool", "i2", "f4", "u8", ">u2"]),
    version=st.sampled_from(["0.4", "0.5"]),
)
def test_any_image(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], cell: int, dtype: str, version: Any
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.zarr"
    array = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    image = ci.map_cells(_same, array, dtype=array.dtype.newbyteorder("="), cell_shape=cell)
    quiet(image, path, version=version)
    for number, level in enumerate(ci.pyramid(image)):
        np.testing.assert_array_equal(zarr.open_array(path / str(number), mode="r")[:], level[:])


def _same(block: NDArray[Any]) -> NDArray[Any]:
    return block


def test_in_a_store_that_fsspec_reaches() -> None:
    target = "memory://cellimg-ome/a.zarr"
    image = Doubled().image()
    report = ci.write_ome_zarr(image, target, progress=False)
    assert report.ok
    np.testing.assert_array_equal(
        zarr.open_array(target + "/1", mode="r")[:], ci.pyramid(VOLUME * 2, 2)[1][:]
    )
    assert ci.write_ome_zarr(image, target, progress=False).skipped == report.computed


def test_replacing(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    image = Doubled().image()
    quiet(image, path, labels={"x": VOLUME})
    with pytest.raises(FileExistsError, match="resume=True carries it on"):
        quiet(image, path, resume=False)
    with pytest.raises(FileExistsError, match=r"is OME-Zarr 0\.5, asked for was 0\.4"):
        quiet(image, path, version="0.4")
    with pytest.raises(FileExistsError, match="has 3 levels, asked for were 2"):
        quiet(image, path, levels=2)
    quiet(image, path, levels=2, version="0.4", overwrite=True)
    yaozarrs.validate_zarr_store(str(path))
    assert sorted(found.name for found in path.iterdir() if found.is_dir()) >= ["0", "1"]
    assert not list(path.rglob("zarr.json"))
    assert not (path / "2/.zarray").exists()
    np.testing.assert_array_equal(zarr.open_array(path / "0", mode="r")[:], VOLUME * 2)


def test_what_is_being_written_is_not_replaced(tmp_path: Path) -> None:
    """Neither carried on nor removed under the one who writes it, whatever array that is at."""
    refused = []

    def try_the_same(block: ci.Block) -> None:
        block.data[...] = 7
        if block.index == 0:
            for overwrite in (False, True):
                with pytest.raises(FileExistsError, match="another run works on") as error:
                    quiet(VOLUME, tmp_path / "a.zarr", overwrite=overwrite)
                refused.append(error)

    grid = ci.CellGrid(VOLUME.shape, (4, 8, 8))
    image = ci.fill_cells(try_the_same, grid, dtype="u2", version="1")
    labels = {"x": ci.fill_cells(try_the_same, grid, dtype="u2", version="1")}
    report = quiet(image, tmp_path / "a.zarr", labels=labels)
    assert report.ok, report
    assert len(refused) == 4
    assert np.all(zarr.open_array(tmp_path / "a.zarr/0", mode="r")[:] == 7)


@pytest.mark.parametrize("place", ["a.zarr", "memory://cellimg-apart"])
def test_what_is_read_is_not_written_over(tmp_path: Path, place: str) -> None:
    path = place if "://" in place else str(tmp_path / place)
    quiet(VOLUME, path)
    negative = ci.map_cells(np.negative, ci.open_image(path))
    for values, settings_of in (
        (negative, {"overwrite": True}),
        (negative, {}),
        (VOLUME, {"labels": {"n": negative}, "overwrite": True}),
    ):
        with pytest.raises(ValueError, match=r"because the image is computed from .*give another"):
            quiet(values, path, **settings_of)
    with pytest.raises(ValueError, match="because the image is computed from"):
        ci.run(negative, f"{path}/0", overwrite=True, progress=False)
    np.testing.assert_array_equal(ci.open_image(path), VOLUME)
    # Beside it is something else.
    if "://" not in path:
        assert quiet(VOLUME, path, labels={"n": negative}).ok
        assert ci.run(negative, f"{path}2", progress=False).ok


def largest(arrays: list[Any], block: Any) -> Any:
    return np.maximum(block, arrays[0][0, 0, 0])


@pytest.mark.parametrize(
    "read",
    [
        ci.Source,
        da.from_zarr,
        lambda array: da.stack([da.from_zarr(array) + 1, da.from_zarr(array)])[0],
        lambda array: da.from_array(array, inline_array=True),
        lambda array: da.from_delayed(dask.delayed(sum)([(array,)]), array.shape, array.dtype),
        lambda array: da.from_array(ci.open_image(array.store.root)),
        lambda array: da.from_zarr(array).map_blocks(partial(largest, [array]), dtype="u2"),
        lambda array: dask.optimize(da.from_zarr(array) + 1)[0],
        lambda array: xarray.DataArray(da.from_zarr(array)),
    ],
    ids=["source", "zarr", "stack", "inline", "nested", "opened", "partial", "optimized", "xarray"],
)
def test_what_is_read_in_a_roundabout_way_is_not_written_over(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "a.zarr"
    stored = zarr.create_array(path, data=VOLUME, chunks=(4, 8, 8))
    negative = ci.map_cells(
        np.negative, ci.Input(read(stored), version="1"), cell_shape=(4, 8, 8), version="1"
    )
    with pytest.raises(ValueError, match=r"because the image is computed from .*give another"):
        ci.run(negative, path, overwrite=True, progress=False)
    np.testing.assert_array_equal(zarr.open_array(path, mode="r")[:], VOLUME)


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    quiet(VOLUME, path, labels={"x": VOLUME}, levels=1)
    left = [path / name for name in ("", "labels", "labels/x")]
    left = [folder / f".zarr.json.{'0' * 32}.part" for folder in left]
    for file in left:
        file.write_text("{")
    quiet(VOLUME, path, levels=1)
    assert not any(file.exists() for file in left)


def test_notes_of_a_group_that_was_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    made = Doubled()
    quiet(made.image(), path, version="0.4")
    shutil.rmtree(path)
    made.calls.clear()
    assert quiet(made.image(), path, levels=2).ok
    assert len(made.calls) == 36
    yaozarrs.validate_zarr_store(str(path))
    np.testing.assert_array_equal(zarr.open_array(path / "0", mode="r")[:], VOLUME * 2)


def test_what_is_somebody_else_s_stays(tmp_path: Path) -> None:
    image = Doubled().image()
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("x")
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match="was not written by write_ome_zarr"):
            quiet(image, tmp_path / name, overwrite=True)
    other = zarr.create_group(
        tmp_path / "other", attributes={"ome": {"multiscales": []}, "mine": 1}
    )
    other.create_array("keep", shape=(2,), dtype="u1")
    with pytest.raises(FileExistsError, match="overwrite=True to replace the image"):
        quiet(image, tmp_path / "other")
    # What others have added to the metadata stays when a run is carried on.
    quiet(image, tmp_path / "a.zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="r+")
    group.attrs["mine"] = 1
    group.attrs["ome"] = {**group.attrs["ome"], "omero": {"channels": []}}
    quiet(image, tmp_path / "a.zarr")
    again = zarr.open_group(tmp_path / "a.zarr", mode="r").attrs
    assert again["mine"] == 1
    assert again["ome"]["omero"] == {"channels": []}


@VERSIONS
def test_colours_of_labels_stay(tmp_path: Path, version: Any) -> None:
    path = tmp_path / "a.zarr"
    quiet(VOLUME, path, labels={"x": VOLUME}, version=version, levels=1)
    group = zarr.open_group(path / "labels/x", mode="r+")
    colours = {"colors": [{"label-value": 1, "rgba": [255, 0, 0, 255]}]}
    if version == "0.4":
        group.attrs["image-label"] = {**group.attrs["image-label"], **colours}
    else:
        group.attrs["ome"] = {**group.attrs["ome"], "image-label": colours}
    quiet(None, path, labels={"x": VOLUME}, levels=1)
    found = attributes(path / "labels/x", version)["image-label"]
    assert found["colors"] == colours["colors"]


def test_labels_of_an_image_made_of_itself_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    quiet(VOLUME, path, levels=1)
    for threshold in (400, 600):
        mask = ci.map_cells(_above, ci.open_image(path), dtype=bool, params={"value": threshold})
        quiet(None, path, labels={"x": ci.label(mask)}, overwrite=True)
        found = np.asarray(ci.open_image(path).labels["x"])
        np.testing.assert_array_equal(found > 0, threshold < VOLUME)


def _above(block: NDArray[Any], value: int) -> NDArray[np.bool_]:
    return block > value


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        (np.zeros(5), {}, ValueError, "has axes x; OME-Zarr has two to five"),
        (np.zeros((2,) * 6), {}, ValueError, "two to five"),
        (
            ci.Input(np.zeros((2, 3, 4)), space=ci.Space.of(3, "tcx")),
            {},
            ValueError,
            "axes t, c, x; .* two or three in space",
        ),
        (
            [VOLUME, VOLUME[::2].astype("f4")],
            {},
            TypeError,
            "level 1 of the image has dtype float32",
        ),
        ([VOLUME[::2], VOLUME], {}, ValueError, r"larger than \(5, 21, 30\): the finest"),
        ([VOLUME, VOLUME[0]], {}, ValueError, "has axes y, x, the finer one z, y, x"),
        (VOLUME, {"version": "0.3"}, ValueError, 'version must be "0.5" or "0.4"'),
        (VOLUME, {"labels": [VOLUME]}, TypeError, "labels must map names"),
        (VOLUME, {"labels": {"a/b": VOLUME}}, ValueError, "names that can be those of folders"),
        (VOLUME, {"labels": {"a": VOLUME / 2}}, TypeError, "labels must be integers"),
        ([], {}, ValueError, "at least one level"),
        ("a.tif", {}, TypeError, "open the file first"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, value: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quiet(value, tmp_path / "a.zarr", **options)
    assert not list(tmp_path.iterdir())
