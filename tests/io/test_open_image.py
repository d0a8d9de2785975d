"""Every format opens to the same voxels, from anywhere, and stays as it is."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
import zarr
from image_files import fingerprint

import cellimg_dask as ci
from cellimg_dask.io.listing import list_images
from cellimg_dask.io.open_image import open_image
from cellimg_dask.loading.readers import make_reader, stored_array

VOLUMES = [
    "v2.zarr",
    "v3.zarr",
    "sharded.zarr",
    "ome-0.4.zarr",
    "ome-0.5.zarr",
    "bare.n5",
    "pyramid.n5",
    "image.h5",
    "contiguous.h5",
    "plain.tif",
    "imagej.tif",
    "image.ome.tif",
    "pyramid.ome.tif",
    "array.npy",
    "turned.npy",
]
FLAT = ["tiled.tif", "picture.png"]
"""Of the first plane only."""
EVERY = [*VOLUMES, *FLAT]


def expected(name, volume):
    if name == "picture.png":
        return (volume[0] % 256).astype(np.uint8)
    return volume[0] if name in FLAT else volume


@pytest.fixture(params=EVERY)
def name(request):
    return request.param


@pytest.fixture
def memory_system():
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


KEYS = [
    np.s_[...],
    np.s_[1],
    np.s_[-1, 3:10],
    np.s_[..., ::-3],
    np.s_[3:1],
    np.s_[1:4, 7:1000:5, -9:],
    np.s_[[3, 0], 2],
    ci.Roi((1, 2), (5, 30)),
]


def test_every_file_gives_its_voxels(files, name, volume):
    with open_image(files[name]) as image:
        whole = expected(name, volume)
        assert image.shape == whole.shape
        assert image.dtype == whole.dtype
        assert image.dtype.isnative
        np.testing.assert_array_equal(image, whole)
        for key in KEYS:
            if isinstance(key, ci.Roi):
                key, wanted = ci.Roi(key.start[: whole.ndim], key.stop[: whole.ndim]), None
                if whole.ndim != key.ndim:
                    continue
                wanted = whole[key.slices]
            else:
                if isinstance(key, tuple) and len(key) > whole.ndim:
                    continue
                wanted = whole[key]
            found = image[key]
            assert isinstance(found, np.ndarray)
            np.testing.assert_array_equal(found, wanted)
        index = (0,) * whole.ndim
        assert image[index] == whole[index]
        assert np.isscalar(image[index])


def test_what_was_read_is_the_readers(files, name, volume):
    with open_image(files[name]) as image:
        first = image[0]
        first[...] = 1
        np.testing.assert_array_equal(image[0], expected(name, volume)[0])


def test_nothing_on_disk_changes(files, name, volume, tmp_path):
    shutil.copytree(files[name], tmp_path / name) if files[name].is_dir() else shutil.copy2(
        files[name], tmp_path / name
    )
    path = tmp_path / name
    before = fingerprint(tmp_path)
    list_images(path)
    with open_image(path) as image:
        repr(image), image.attrs, image.space, image.labels, image.channels
        for level in image.levels:
            np.asarray(level)
        for label in image.labels.values():
            np.asarray(label)
        np.asarray(ci.map_cells(np.negative, image, halo=1, boundary="reflect"))
        pickle.loads(pickle.dumps(image)).close()
    assert fingerprint(tmp_path) == before


def test_a_folder_without_the_right_to_write_will_do(files, name, volume, tmp_path):
    """As an ordinary user, where the tests run as root, who may write everywhere."""
    path = tmp_path / name
    if files[name].is_dir():
        shutil.copytree(files[name], path)
    else:
        shutil.copy2(files[name], path)
    every = [tmp_path, path, *path.rglob("*")]
    for item in every:
        item.chmod(0o555 if item.is_dir() else 0o444)
    before = fingerprint(tmp_path)
    try:
        np.testing.assert_array_equal(open_image(path), expected(name, volume))
        assert fingerprint(tmp_path) == before
    finally:
        for item in every:
            item.chmod(0o755 if item.is_dir() else 0o644)


def test_pickled_it_is_a_path(files, name, volume):
    image = open_image(files[name])
    data = pickle.dumps(image)
    assert len(data) < 1000
    image.close()
    with pickle.loads(data) as again:
        assert again.space == image.space
        np.testing.assert_array_equal(again, expected(name, volume))


@pytest.mark.parametrize("name", ["ome-0.4.zarr", "ome-0.5.zarr", "pyramid.n5", "pyramid.ome.tif"])
def test_levels_go_on_as_levels(files, name, volume):
    image = open_image(files[name])
    assert image.levels[0] is image
    assert image.level == 0
    for number, level in enumerate(image.levels):
        step = 2**number
        assert level.level == number
        np.testing.assert_array_equal(level, volume[:, ::step, ::step])
        again = pickle.loads(pickle.dumps(level))
        np.testing.assert_array_equal(again, level)
        assert again.space == level.space
        chosen = open_image(files[name], level=number)
        assert chosen.shape == level.shape
        assert chosen.levels[number] is chosen
        assert chosen.levels[0].shape == volume.shape
        chosen.close()
        again.close()
    with pytest.raises(ValueError, match=r"level 5.*allowed is 0\.\."):
        open_image(files[name], level=5)
    image.close()


def test_it_is_an_input_as_its_array_is(files, name, volume):
    with open_image(files[name]) as image:
        whole = expected(name, volume)
        drop = {"drop_axis": 0} if whole.ndim == 3 else {}
        result = ci.map_cells(_total, image, params={"ndim": whole.ndim}, dtype="f8", **drop)
        np.testing.assert_array_equal(result, _total(whole, whole.ndim))
        assert result.space.scale == image.scale[-2:]


def _total(a, ndim):
    return a.astype("f8") if ndim == 2 else a.sum(axis=0, dtype="f8")


def test_many_threads_read_one_image(files, name, volume):
    whole = expected(name, volume)
    with open_image(files[name]) as image:
        barrier = threading.Barrier(4)

        def read(number):
            barrier.wait(30)
            for step in range(4):
                low = 4 * number + step
                np.testing.assert_array_equal(
                    image[..., low : low + 20], whole[..., low : low + 20]
                )

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(read, range(4)))


@pytest.mark.parametrize("name", ["ome-0.5.zarr", "pyramid.n5", "image.h5", "image.ome.tif"])
def test_another_process_opens_it_again(files, name, volume):
    code = (
        "import pickle, sys\n"
        "image = pickle.load(sys.stdin.buffer)\n"
        "print(int(image[...].sum()), *image.scale)\n"
        "image.close()\n"
    )
    image = open_image(files[name])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        input=pickle.dumps(image),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    total, *scale = done.stdout.split()
    assert int(total) == volume.sum()
    assert tuple(map(float, scale)) == image.scale
    image.close()


def test_processes_read_it_as_an_input(files, volume):
    with (
        ci.BlockQueue(1, backend="processes") as queue,
        open_image(files["pyramid.n5"]) as first,
        open_image(files["image.h5"]) as second,
        open_image(files["pyramid.ome.tif"]) as third,
        open_image(files["array.npy"]) as fourth,
        open_image(files["v3.zarr"]) as fifth,
    ):
        inputs = [first, second, third, fourth, fifth]
        result = ci.map_cells(_sum_of_all, *inputs, dtype="u2", queue=queue)
        np.testing.assert_array_equal(result, 5 * volume)


def _sum_of_all(*arrays):
    return np.sum(arrays, axis=0, dtype="u2")


# ---------------------------------------------------------------------- the same as its array


def test_a_zarr_image_is_read_and_known_as_the_bare_array(files):
    image = open_image(files["ome-0.5.zarr"])
    bare = zarr.open_array(files["ome-0.5.zarr"] / "s0", mode="r")
    for array in (image, bare):
        reader = ci.map_cells(np.negative, array).loader.readers[0]
        assert type(stored_array(reader)) is zarr.Array
    assert make_reader(image, ci.get_cache()) is make_reader(image.array, ci.get_cache())
    assert content_key(image) == content_key(bare)


def test_also_where_a_chunk_is_larger_than_the_image(tmp_path, volume):
    array = zarr.create_array(tmp_path / "a.zarr", data=volume, chunks=(64, 64, 64))
    image = open_image(tmp_path / "a.zarr")
    assert image.chunks == ((6,), (40,), (50,))
    assert ci.map_cells(np.negative, image).cell_shape == (64, 64, 64)
    assert content_key(image) == content_key(array)


def test_the_store_of_an_array_may_not_be_written_to(files):
    with pytest.raises((ValueError, TypeError), match="written"):
        ci.Source(open_image(files["v3.zarr"]))


def content_key(array, cell=0):
    from cellimg_dask.loading.content import ContentKeys

    return ContentKeys(ci.map_cells(np.negative, array).loader).key(cell)


def test_content_keys_follow_the_files(files, name, tmp_path, volume):
    path = tmp_path / name
    if files[name].is_dir():
        shutil.copytree(files[name], path)
    else:
        shutil.copy2(files[name], path)

    def key():
        with open_image(path) as image:
            return content_key(image)

    before = key()
    assert key() == before
    if name.endswith((".npy", ".png")):
        # These are known by their values.
        return
    changed = path
    if path.is_dir():
        # The chunk of the first cell.
        with open_image(path) as image:
            last = image.levels[0]
            names = {
                "v2.zarr": "0.0.0",
                "ome-0.4.zarr": "s0/0.0.0",
                "ome-0.5.zarr": "s0/c/0/0/0",
                "bare.n5": "0/0/0",
                "pyramid.n5": "raw/s0/0/0/0",
            }
        changed = path / names.get(name, "c/0/0/0")
        assert changed.is_file(), last
    os.utime(changed, ns=(1, 1))
    assert key() != before


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("plain.tif", "tiled.tif"),
        ("contiguous.h5", "image.h5"),
        ("v3.zarr", "sharded.zarr"),
        ("bare.n5", "pyramid.n5/raw/s1"),
    ],
)
def test_what_was_replaced_while_it_was_open_is_an_error(files, name, other, tmp_path):
    """The key would be that of the new file, and the voxels those of the old one."""
    path, new = tmp_path / "old" / name, files[name].parent / other
    path.parent.mkdir()
    copy = shutil.copytree if files[name].is_dir() else shutil.copy2
    copy(files[name], path)
    with open_image(path) as image:
        image[...]
        negative = ci.map_cells(np.negative, image)
        path.rename(tmp_path / "away")
        copy(new, path)
        report = ci.run(negative, tmp_path / "out.zarr", progress=False, retries=0)
    assert report.computed == 0
    assert all("changed since it was opened" in str(error) for error in report.failed.values())


def test_an_array_that_grew_is_read_on(tmp_path, volume):
    array = zarr.create_array(tmp_path / "a.zarr", data=volume, chunks=(2, 16, 16))
    negative = ci.map_cells(np.negative, open_image(tmp_path / "a.zarr"))
    array.resize((9, 40, 50))
    assert ci.run(negative, tmp_path / "out.zarr", progress=False).ok
    array.resize((3, 40, 50))
    assert ci.run(negative, tmp_path / "out.zarr", progress=False).failed


def test_dask_reads_it_and_names_it_by_when_it_was_opened(files, name, volume):
    """The time of change of a folder tells nothing of the chunks in it."""
    from dask.base import tokenize

    with open_image(files[name]) as image, open_image(files[name]) as again:
        lazy = image.to_dask()
        assert lazy.chunks == image.chunks
        np.testing.assert_array_equal(lazy, expected(name, volume))
        assert lazy.name == image.to_dask().name
        assert tokenize(image) != tokenize(again)
        assert lazy.name != again.to_dask().name
        assert len({tokenize(level) for level in image.levels}) == len(image.levels)
        for level in image.levels:
            with pickle.loads(pickle.dumps(level)) as sent:
                assert tokenize(sent) == tokenize(level)


def test_it_is_named_in_the_graph_of_an_image(files):
    image = open_image(files["pyramid.n5"])
    assert "N5 pyramid.n5/raw/s0" in str(ci.map_cells(np.negative, image).graph())


# ---------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize("file", ["array.npy", "turned.npy"])
def test_what_is_read_of_a_url_is_ones_own(files, file, volume, memory_system):
    memory_system.put(str(files[file]), f"/somewhere/{file}")
    with open_image(f"memory://somewhere/{file}") as image:
        part = image[1:3]
        assert part.base is None or part.base.nbytes == part.nbytes
        part[...] = 0
        assert image.array[(slice(1, 3),) * 3].base is None
        np.testing.assert_array_equal(image[1:3], expected(file, volume)[1:3])


def test_from_memory_of_fsspec(files, name, volume, memory_system):
    memory_system.put(str(files[name]), f"/somewhere/{name}", recursive=True)
    url = f"memory://somewhere/{name}"
    before = {path: bytes(file.getbuffer()) for path, file in memory_system.store.items()}
    with open_image(url) as image:
        np.testing.assert_array_equal(image, expected(name, volume))
        np.testing.assert_array_equal(image[-1, 3:20], expected(name, volume)[-1, 3:20])
        result = ci.map_cells(np.negative, image)
        np.testing.assert_array_equal(result, np.negative(expected(name, volume)))
        assert image.url == url
        with open_image(files[name]) as local:
            assert image.space == local.space
            assert len(image.levels) == len(local.levels)
            assert sorted(image.labels) == sorted(local.labels)
        again = pickle.loads(pickle.dumps(image))
        np.testing.assert_array_equal(again, expected(name, volume))
        again.close()
    after = {path: bytes(file.getbuffer()) for path, file in memory_system.store.items()}
    assert after == before


@pytest.mark.parametrize(
    ("name", "has_ranges"),
    # Of a shard, parts are read.
    [*((name, True) for name in EVERY), *((n, False) for n in EVERY if n != "sharded.zarr")],
)
def test_over_http(files, name, volume, http_server, has_ranges):
    folder = files[name].parent
    before = fingerprint(files[name])
    url, _ = http_server(folder, has_ranges=has_ranges)
    if name == "pyramid.n5":
        # A server of files lists nothing.
        with pytest.raises(ValueError, match="name="):
            open_image(f"{url}/{name}")
        image = open_image(f"{url}/{name}", name="raw")
    else:
        image = open_image(f"{url}/{name}")
    with image:
        np.testing.assert_array_equal(image, expected(name, volume))
        assert image.levels[0] is image
    assert fingerprint(files[name]) == before


def test_of_a_file_far_away_only_what_is_needed_is_fetched(tmp_path, http_server, volume):
    big = np.tile(volume, (1, 4, 4))
    np.save(tmp_path / "big.npy", np.zeros((64, 1 << 17)))
    zarr.create_array(tmp_path / "big.zarr", data=big, chunks=(2, 64, 64))
    url, asked = http_server(tmp_path)
    with open_image(f"{url}/big.zarr") as image:
        del asked[:]
        image[0, :10, :10]
        assert [line for line in asked if "/c/" in line] == ["GET /big.zarr/c/0/0/0 HTTP/1.1"]
    with open_image(f"{url}/big.npy") as image:
        assert image[3, 5] == 0
        assert image.cell_shape == (4, 1 << 17)


@pytest.mark.parametrize("name", ["ome-0.5.zarr", "pyramid.n5", "image.h5", "plain.tif"])
def test_inside_a_zip(files, name, volume, tmp_path):
    if files[name].is_dir():
        made = shutil.make_archive(str(tmp_path / "packed"), "zip", files[name])
        before = fingerprint(tmp_path)
        image = open_image(made)
    else:
        made = shutil.make_archive(str(tmp_path / "packed"), "zip", files[name].parent, name)
        before = fingerprint(tmp_path)
        image = open_image(f"zip://{name}::{made}")
    with image:
        np.testing.assert_array_equal(image, volume)
        assert "packed.zip" in image.url
    assert fingerprint(tmp_path) == before


def test_a_folder_inside_a_zip(files, volume, tmp_path):
    """As one packs it: the folder itself, or several."""
    made = shutil.make_archive(str(tmp_path / "a"), "zip", files["v3.zarr"].parent, "v3.zarr")
    for place, name in ((made, None), (made, "v3.zarr"), (made + "/v3.zarr", None)):
        image = open_image(place, name=name)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)), volume)
    np.savez(tmp_path / "a.npz", raw=volume, labels=volume[0])
    with pytest.raises(ValueError, match=r"an archive, of: labels\.npy, raw\.npy; say which"):
        open_image(tmp_path / "a.npz")
    np.testing.assert_array_equal(open_image(tmp_path / "a.npz", name="raw.npy"), volume)


def test_a_slash_at_the_end_makes_no_difference(files, volume, http_server):
    url, _ = http_server(files["ome-0.5.zarr"].parent)
    with open_image(f"{url}/ome-0.5.zarr/") as image:
        np.testing.assert_array_equal(image, volume)
        np.testing.assert_array_equal(image.labels["nuclei"], volume // 700)
    with open_image(f"{files['pyramid.n5']}/") as image:
        np.testing.assert_array_equal(image, volume)


def test_what_a_server_refuses_is_said(files, tmp_path, http_server):
    url, _ = http_server(tmp_path, status=403)
    with pytest.raises(OSError, match="403"):
        open_image(f"{url}/a.zarr")


def test_xarray_gets_names_and_places(files, volume):
    with open_image(files["ome-0.5.zarr"]) as image:
        array = image.to_xarray("em")
        assert array.dims == ("z", "y", "x")
        assert array.coords["z"].values[1] == 104.0
        np.testing.assert_array_equal(array, volume)


def test_file_urls_are_paths(files, volume):
    with open_image(files["v3.zarr"].as_uri()) as image:
        assert image.url == str(files["v3.zarr"])
        np.testing.assert_array_equal(image, volume)


def test_homes_and_colons_in_paths(tmp_path, volume, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save("a::b.npy", volume)
    np.save("a.npy", volume)
    for place in ("a::b.npy", tmp_path / "a::b.npy", "~/a.npy"):
        np.testing.assert_array_equal(open_image(place), volume)
    assert ci.run(ci.map_cells(np.negative, volume), "~/out.zarr", progress=False).ok
    assert open_image("~/out.zarr").url == str(tmp_path / "out.zarr")


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize("place", ["nowhere", "nowhere.tif", "memory://nowhere", "memory://no.tif"])
def test_what_is_not_there_is_named(place):
    with pytest.raises(FileNotFoundError, match=place):
        open_image(place)


def test_what_is_not_there_on_a_server_is_named(tmp_path, http_server):
    url, _ = http_server(tmp_path)
    for place in ("nowhere.zarr", "nowhere.tif"):
        with pytest.raises(FileNotFoundError, match=place):
            open_image(f"{url}/{place}")


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        (np.zeros(3), TypeError, "an array needs no opening"),
        (3, TypeError, "expected a path or a URL"),
        ("", ValueError, "empty"),
    ],
)
def test_what_is_no_path(wrong, error, said):
    with pytest.raises(error, match=said):
        open_image(wrong)


def test_wrong_arguments(files):
    with pytest.raises(TypeError, match="name must be a text"):
        open_image(files["v3.zarr"], name=3)
    with pytest.raises(TypeError, match="storage_options"):
        open_image(files["v3.zarr"], storage_options="anon")
    with pytest.raises(ValueError, match="level"):
        open_image(files["v3.zarr"], level=-1)


def test_what_is_no_image(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "notes.xyz"
    text.write_text("an image, believe me")
    for path in (empty, text):
        before = fingerprint(tmp_path)
        with pytest.raises(ValueError, match=str(path)) as caught:
            open_image(path)
        assert "TIFF" in str(caught.value)
        assert fingerprint(tmp_path) == before


def test_a_folder_around_images_says_what_is_in_it(files):
    with pytest.raises(ValueError, match=r"ome-0\.4\.zarr"):
        open_image(files["v3.zarr"].parent)


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("image.h5", 600),
        ("plain.tif", 6),
        ("array.npy", 20),
        ("picture.png", 20),
    ],
)
def test_a_damaged_file_is_named(files, tmp_path, name, length):
    path = tmp_path / name
    path.write_bytes(files[name].read_bytes()[:length])
    with pytest.raises(ValueError, match=f"cannot read {path} as"):
        open_image(path)


@pytest.mark.parametrize("name", ["image.ome.tif", "plain.tif", "picture.png"])
def test_a_file_that_ends_too_early_fails_where_it_is_read(files, tmp_path, name):
    data = files[name].read_bytes()
    path = tmp_path / name
    # The directory of pages is in front.
    path.write_bytes(data[: len(data) // 2])
    with open_image(path) as image, pytest.raises(ci.ReadError, match=name) as caught:
        np.asarray(image)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("v2.zarr", "2.1.1"),
        ("v3.zarr", "c/2/1/1"),
        ("ome-0.5.zarr", "s0/c/2/1/1"),
        ("bare.n5", "1/1/0"),
    ],
)
def test_a_damaged_chunk_is_named(files, tmp_path, name, chunk):
    path = tmp_path / name
    shutil.copytree(files[name], path)
    (path / chunk).write_bytes(b"\1" * 30)
    position = (0, 1, 1) if name == "bare.n5" else (2, 1, 1)
    with open_image(path) as image:
        with pytest.raises(
            ci.ReadError, match=rf"cell \({', '.join(map(str, position))}\)"
        ) as caught:
            np.asarray(image)
        assert caught.value.position == position
        # The others are read.
        image[..., :16]
        result = ci.map_cells(np.negative, image)
        with pytest.raises(ci.ReadError):
            result.load(position)


def test_a_closed_image_says_so(files, name):
    image = open_image(files[name])
    levels = image.levels
    image.close()
    image.close()
    for level in levels:
        with pytest.raises(ValueError, match="closed"):
            level[...]


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("image.h5", "h5py"),
        ("plain.tif", "tifffile"),
        ("bare.n5", "tensorstore"),
        ("picture.png", "imageio.v3"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(files, name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'cellimg-dask\[formats\]'") as caught:
        open_image(files[name])
    assert caught.value.name == package.partition(".")[0]


def test_without_fsspec_a_url_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"cellimg-dask\[formats\]"):
        open_image("memory://a.zarr")


def test_several_images_are_listed(tmp_path, volume):
    group = zarr.create_group(tmp_path / "a.zarr")
    group.create_array("first", data=volume)
    group.create_array("deep/second", data=volume + 1)
    with pytest.raises(ValueError, match=r"deep/second, first.*name='deep/second'"):
        open_image(tmp_path / "a.zarr")
    np.testing.assert_array_equal(open_image(tmp_path / "a.zarr", name="deep/second"), volume + 1)
    with pytest.raises(ValueError, match="no image 'third'; it has: deep/second, first"):
        open_image(tmp_path / "a.zarr", name="third")


def test_repr_says_it_all(files):
    image = open_image(files["ome-0.5.zarr"])
    text = repr(image)
    for part in ("ome-0.5.zarr", "zarr v3", "(6, 40, 50)", "uint16", "(2, 16, 16)", "micrometer"):
        assert part in text
    assert "level 0 of 3" in text
    assert "labels: nuclei" in text
