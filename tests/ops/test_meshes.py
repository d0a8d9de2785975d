"""Meshes: scikit-image's on the whole image, closed, from just the cells that hold the object."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import marching_cubes

import cellimg_dask as ci
from cellimg_dask.ops import meshes
from cellimg_dask.ops.meshes import mesh
from cellimg_dask.ops.surfaces import Mesh


def cells_of(labels, cell_shape):
    return ci.map_cells(np.copy, labels, dtype=labels.dtype, cell_shape=cell_shape)


def triangles(vertices, faces):
    """Return all triangles, however they are numbered, each beginning at its least corner."""
    corners = [[tuple(corner) for corner in face] for face in vertices[faces].round(4).tolist()]
    starts = [face.index(min(face)) for face in corners]
    return sorted(tuple(face[at:] + face[:at]) for face, at in zip(corners, starts, strict=True))


def whole(labels, label, steps=(1, 1, 1)):
    """Return what scikit-image finds for the whole image, closed at its border."""
    mask = (labels == label)[tuple(slice(None, None, step) for step in steps)]
    vertices, faces, _, _ = marching_cubes(np.pad(mask, 1), 0.5)
    return (vertices - 1) * steps, faces[:, ::-1]


def assert_closed(surface):
    """Each edge belongs to as many triangles in one direction as in the other."""
    pairs = surface.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).astype(np.int64)
    size = len(surface.vertices)
    ways, counts = np.unique(pairs @ [size, 1], return_counts=True)
    back, back_counts = np.unique(pairs @ [1, size], return_counts=True)
    np.testing.assert_array_equal(ways, back)
    np.testing.assert_array_equal(counts, back_counts)
    assert (pairs[:, 0] != pairs[:, 1]).all()


def ball(shape, centre, radius):
    grid = np.indices(shape).astype(float)
    return sum((axis - at) ** 2 for axis, at in zip(grid, centre, strict=True)) <= radius**2


# -------------------------------------------------------------------- equal to the whole image


@settings(max_examples=40)
@given(st.data())
def test_equals_marching_cubes_on_the_whole_image(data):
    shape = tuple(data.draw(st.integers(1, 9)) for _ in range(3))
    cells = tuple(data.draw(st.integers(1, 9)) for _ in range(3))
    steps = data.draw(st.sampled_from([(1, 1, 1), (2, 2, 2), (1, 3, 2)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    labels = (rng.random(shape) < data.draw(st.sampled_from([0.1, 0.5, 0.95]))) * np.uint8(3)
    labels[rng.random(shape) < 0.1] = 5
    labels[0, 0, 0] = 3
    surface = mesh(cells_of(labels, cells), 3, step_size=steps)
    assert (surface.vertices.dtype, surface.faces.dtype) == (np.float32, np.uint32)
    vertices, faces = whole(labels, 3, steps)
    assert triangles(surface.vertices, surface.faces) == triangles(vertices, faces)
    assert len(surface.vertices) == len(vertices)
    assert np.unique(surface.faces).size == len(surface.vertices)
    assert_closed(surface)


def test_a_ball_across_cells():
    labels = ball((60, 64, 70), (30.3, 31.6, 34.2), 25) * np.uint16(9)
    image = cells_of(labels, (16, 20, 33)).with_space(
        axes="zyx", units="um", scale=(2, 2, 2), translation=(100, -50, 7)
    )
    surface = mesh(image, 9, seeds=(30, 31, 34))
    assert_closed(surface)
    pairs = np.sort(surface.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert (counts == 2).all()
    assert surface.volume == pytest.approx(4 / 3 * np.pi * 50**3, rel=0.01)
    # Its steps are not smoothed, which adds to the area.
    assert 1 <= surface.area / (4 * np.pi * 50**2) < 1.12
    centre = (surface.vertices.min(axis=0) + surface.vertices.max(axis=0)) / 2
    np.testing.assert_allclose(centre, (160, 12, 75), atol=1)
    assert (surface.axes, surface.units) == (("z", "y", "x"), ("micrometer",) * 3)
    coarse = mesh(image, 9, seeds=(30, 31, 34), step_size=4)
    assert len(coarse.faces) < len(surface.faces) / 10
    assert coarse.volume == pytest.approx(surface.volume, rel=0.05)
    assert_closed(coarse)


def test_two_labels_that_touch():
    labels = np.zeros((6, 8, 8), "i4")
    labels[1:5, 1:4, 2:6], labels[1:5, 4:7, 2:6] = 4, 6
    found = mesh(cells_of(labels, 3), [6, 4])
    assert list(found) == [6, 4]
    for label, surface in found.items():
        assert_closed(surface)
        vertices, faces = whole(labels, label)
        assert triangles(surface.vertices, surface.faces) == triangles(vertices, faces)
    assert found[4].vertices[:, 1].max() == found[6].vertices[:, 1].min() == 3.5
    assert mesh(labels, []) == {}


def test_an_object_that_fills_the_image():
    surface = mesh(np.ones((3, 4, 5), "u1"), 1)
    assert_closed(surface)
    np.testing.assert_array_equal(surface.vertices.min(axis=0), [-0.5] * 3)
    np.testing.assert_array_equal(surface.vertices.max(axis=0), [2.5, 3.5, 4.5])


def test_stitched_labels(rng):
    mask = ndimage.gaussian_filter(rng.normal(size=(24, 30, 30)), 2) > 0.03
    labels = ci.label(mask, cell_shape=10)
    ids = [int(i) for i in np.unique(labels[...])[1:]]
    for label, surface in mesh(labels, ids).items():
        vertices, faces = whole(labels[...], label)
        assert triangles(surface.vertices, surface.faces) == triangles(vertices, faces)


# ------------------------------------------------------------------------------ what is computed


def counted(labels, cell_shape):
    """Return a lazy image of labels, and the positions of the cells that were computed."""
    asked = []

    def load(block):
        asked.append(block.position)
        block.data[...] = labels[block.roi.slices]

    grid = ci.CellGrid(labels.shape, (cell_shape,) * 3)
    return ci.fill_cells(load, grid, dtype=labels.dtype), asked


def test_a_seed_computes_the_cells_that_the_object_touches():
    labels = np.zeros((80, 80, 80), "u8")
    big = (1 << 63) + 1
    # A line along one axis, on from there across the corner of a cell, and ending inside another.
    labels[5, 5, 5:35] = big
    labels[5:10, 5:10, 34] = big
    for step in range(10, 14):
        labels[step, step, 29 + step] = big
    labels[60:70, 60:70, 60:70] = big + 1
    image, asked = counted(labels, 10)
    surface = mesh(image, big, seeds=(5, 5, 20))
    holding = {tuple(place // 10) for place in np.argwhere(labels == big)}
    assert len(asked) == len(set(asked))
    assert holding < set(asked)
    # Beside them only those that the object touches, which hold nothing of it.
    touched = ndimage.binary_dilation(labels == big, np.ones((3, 3, 3)))
    assert set(asked) == {tuple(place // 10) for place in np.argwhere(touched)}
    vertices, faces = whole(labels, big)
    assert triangles(surface.vertices, surface.faces) == triangles(vertices, faces)


def test_ids_of_64_bits():
    labels = np.zeros((6, 6, 6), "u8")
    ids = [2**64 - 1, 2**64 - 2, 2**53 + 1, 2**53, 7]
    for place, label in enumerate(ids):
        labels[place, place, place : place + 2] = label
    surfaces = mesh(labels, ids)
    assert list(surfaces) == ids
    for label, surface in surfaces.items():
        vertices, faces = whole(labels, label)
        assert triangles(surface.vertices, surface.faces) == triangles(vertices, faces)


def test_an_object_in_a_huge_image():
    first, inner = 10**6, ball((20, 20, 20), (9, 9, 9), 6) * np.uint8(1)

    def load(block):
        inside = block.roi.shift((-first,) * 3)
        block.data[...] = inner[inside.slices]

    image = ci.fill_cells(load, ci.CellGrid((2 * first,) * 3, (10, 10, 10)), dtype="u1")
    surface = mesh(image.with_space(translation=-first), 1, seeds=(first + 9,) * 3)
    vertices, faces = whole(inner, 1)
    assert triangles(surface.vertices, surface.faces) == triangles(vertices, faces)
    assert image.stats().loads == 8


def test_a_box_computes_its_cells():
    labels = np.zeros((40, 40, 40), "u1")
    labels[5:15, 5:12, 22:28], labels[35, 35, 35] = 3, 3
    image, asked = counted(labels, 10)
    first = mesh(image, 3, boxes=ci.Roi((5, 5, 22), (15, 12, 28)))
    assert sorted(asked) == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    np.testing.assert_array_equal(first.vertices.max(axis=0), [14.5, 11.5, 27.5])
    table = ci.region_table(labels, properties=["label", "bbox"]).compute()
    assert mesh(image, [3], boxes=table)[3].vertices.max() == 35.5
    both = mesh(image, [3], boxes={3: ci.Roi((0, 0, 0), (90, 90, 90))})
    assert len(both[3].vertices) == len(mesh(labels, 3).vertices)


def test_steps_that_do_not_divide_cells(rng):
    labels = ball((30, 30, 30), (14, 15, 16), 12) * np.uint8(1)
    image, _ = counted(labels, 7)
    for steps in (3, 5, 9, (1, 2, 10)):
        surface = mesh(image, 1, seeds=(14, 15, 16), step_size=steps)
        vertices, faces = whole(labels, 1, np.broadcast_to(steps, 3))
        assert triangles(surface.vertices, surface.faces) == triangles(vertices, faces)


# ------------------------------------------------------------------------------------- the files


def solid(axes=("z", "y", "x"), units=("nanometer",) * 3):
    labels = np.zeros((4, 5, 6), "u1")
    labels[1:3, 1:4, 1:5] = 1
    surface = mesh(labels, 1)
    return Mesh(surface.vertices, surface.faces, axes, units)


def signed_volume(vertices, faces):
    first, second, third = vertices.astype(float)[faces.T.astype(int)]
    return (first * np.cross(second, third)).sum() / 6


def read_neuroglancer(data):
    (count,) = np.frombuffer(data, "<u4", 1)
    vertices = np.frombuffer(data, "<f4", 3 * count, 4).reshape(-1, 3)
    return vertices, np.frombuffer(data, "<u4", offset=4 + 12 * count).reshape(-1, 3)


def read_ply(path):
    header, _, data = path.read_bytes().partition(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    counts = [int(line.split()[2]) for line in lines if line.startswith("element")]
    vertices = np.frombuffer(data, "<f4", 3 * counts[0]).reshape(-1, 3)
    record = np.dtype([("count", "u1"), ("corners", "<i4", (3,))])
    faces = np.frombuffer(data, record, counts[1], 12 * counts[0])
    assert len(data) == 12 * counts[0] + 13 * counts[1]
    assert (faces["count"] == 3).all()
    return vertices, faces["corners"]


def read_obj(path):
    rows = [line.split() for line in path.read_text().splitlines()]
    vertices = np.array([row[1:] for row in rows if row[0] == "v"], float)
    return vertices, np.array([row[1:] for row in rows if row[0] == "f"], int) - 1


@pytest.mark.parametrize("form", ["neuroglancer", "ply", "obj"])
@pytest.mark.parametrize(
    ("axes", "order"),
    [("zyx", (2, 1, 0)), ("xyz", (0, 1, 2)), ("yzx", (2, 0, 1)), ("abc", (2, 1, 0))],
)
def test_files_are_in_xyz_and_seen_from_outside(tmp_path, form, axes, order):
    surface = solid(tuple(axes))
    if form == "neuroglancer":
        vertices, faces = read_neuroglancer(surface.to_neuroglancer())
    elif form == "ply":
        surface.to_ply(tmp_path / "solid.ply")
        vertices, faces = read_ply(tmp_path / "solid.ply")
    else:
        surface.to_obj(tmp_path / "solid.obj")
        vertices, faces = read_obj(tmp_path / "solid.obj")
    np.testing.assert_array_equal(vertices, surface.vertices[:, list(order)])
    assert surface.volume > 0
    assert signed_volume(vertices, faces) == pytest.approx(surface.volume)


def test_neuroglancer_has_nanometers():
    surface = solid(units=("micrometer", None, "angstrom"))
    vertices, _ = read_neuroglancer(surface.to_neuroglancer())
    expected = surface.vertices * np.array([1000, 1, 0.1])
    np.testing.assert_allclose(vertices, expected[:, ::-1], rtol=1e-6)
    with pytest.raises(ValueError, match="'second' in nanometers"):
        solid(units=("second", None, None)).to_neuroglancer()


@pytest.mark.parametrize(
    "options", [{}, {"seeds": (3, 4, 4)}, {"boxes": ci.Roi((0,) * 3, (8,) * 3)}]
)
@pytest.mark.parametrize("computed", [False, True])
def test_an_edit_meanwhile_does_not_tear_it(monkeypatch, options, computed):
    labels = ball((8, 8, 8), (4, 4, 4), 3).astype("u1")
    source = ci.Source(labels.copy(), cell_shape=4)
    image = ci.map_cells(np.copy, source, dtype="u1") if computed else source
    edits = []

    def after_an_edit(read):
        def edited(*args, **settings):
            edits.append(read)
            source[4:] = 0
            return read(*args, **settings)

        return edited

    for name in ("find_objects", "_masks"):
        monkeypatch.setattr(meshes, name, after_an_edit(getattr(meshes, name)))
    surface = mesh(image, 1, **options)
    assert edits
    assert_closed(surface)
    vertices, faces = whole(labels, 1)
    assert triangles(surface.vertices, surface.faces) == triangles(vertices, faces)
    assert not source[4:].any()


# ---------------------------------------------------------------------------------------- mistakes


LABELS = np.zeros((4, 5, 6), "u1")
LABELS[1, 1, 1] = 2


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LABELS, 7), {}, ValueError, "no object 7 in the image"),
        ((LABELS, 7), {"boxes": ci.Roi((0, 0, 0), (4, 5, 6))}, ValueError, "no voxel of object 7"),
        ((LABELS, 2), {"boxes": ci.Roi((0, 0, 0), (0, 5, 6))}, ValueError, "no voxel of object 2"),
        ((LABELS, 2), {"seeds": (0, 0, 0)}, ValueError, "is a voxel of 0"),
        ((LABELS, 2), {"seeds": (0, 0, 6)}, ValueError, "6 on axis 2; allowed is 0..5"),
        ((LABELS, 2), {"seeds": (0, 0)}, ValueError, "a seed"),
        ((LABELS, [2, 3]), {"seeds": (1, 1, 1)}, TypeError, "mapping from id"),
        ((LABELS, [2, 3]), {"seeds": {2: (1, 1, 1)}}, ValueError, "nothing for object 3"),
        ((LABELS, 2), {"boxes": (1, 1, 1)}, TypeError, "must be a Roi"),
        ((LABELS, 2), {"boxes": ci.Roi((0,), (1,)), "seeds": 0}, ValueError, "not both"),
        ((LABELS, 2), {"step_size": 3}, ValueError, "smaller step_size"),
        ((LABELS, 2), {"step_size": 0}, ValueError, "step_size"),
        ((LABELS, 0), {}, ValueError, "background"),
        ((LABELS, 2.5), {}, TypeError, "ids"),
        ((LABELS[0], 2), {}, ValueError, "three axes"),
        ((LABELS * 1.0, 2), {}, TypeError, "must be integers"),
    ],
)
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        mesh(*arguments, **options)


def test_a_table_without_boxes():
    table = ci.region_table(LABELS, properties=["label"]).compute()
    with pytest.raises(ValueError, match="no column 'bbox-0'"):
        mesh(LABELS, 2, boxes=table)


@pytest.mark.parametrize("dtype", ["u1", "i8", "u8", "?"])
def test_boxes_are_found_without_a_table(dtype):
    labels = np.zeros((5, 6, 7), dtype)
    labels[1:3, 2:5, 3:] = 1
    label = 1
    if dtype == "u8":
        label = 2**63 + 1
        labels[labels == 1] = label
    surface = mesh(cells_of(labels, (2, 4, 3)), label)
    vertices, faces = whole(labels, label)
    assert triangles(surface.vertices, surface.faces) == triangles(vertices, faces)
    with pytest.raises(ValueError, match="there is no object 5 in the image"):
        mesh(np.zeros((0, 3, 3), dtype), 5)
