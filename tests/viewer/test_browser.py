"""Views in a real browser without a window: what is drawn, which cells are computed for it."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import until

import cellimg_dask as ci
from cellimg_dask.server.layers import Layer
from cellimg_dask.viewer.browser import find_browser
from cellimg_dask.viewer.view import View, view

WIDTH, HEIGHT = 640, 480
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window, for all tests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    program, driver = find_browser(), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium and chromedriver here: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "use-gl=angle",
        "use-angle=swiftshader",
        "enable-unsafe-swiftshader",
        f"window-size={WIDTH},{HEIGHT}",
    ):
        options.add_argument(f"--{flag}")
    started = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield started
    finally:
        started.quit()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., View]]:
    """Show layers in the browser, and close the view in the end."""
    shown: list[View] = []

    def begin(layers: Any, **options: Any) -> View:
        made = view(layers, **options)
        shown.append(made)
        browser.get(made.url)
        return made

    yield begin
    browser.get("about:blank")
    for made in shown:
        made.close()


class Counted:
    """Computes voxels from their position, and notes which cells it was called for."""

    def __init__(self) -> None:
        self.cells: list[tuple[int, ...]] = []
        self._lock = threading.Lock()

    def __call__(self, block: Any) -> None:
        with self._lock:
            self.cells.append(block.position)
        rows = np.arange(block.roi.start[-2], block.roi.stop[-2])[:, None]
        columns = np.arange(block.roi.start[-1], block.roi.stop[-1])
        block.data[...] = (rows // 8 + columns // 8) % 2 * 200 + 20

    def take(self) -> list[tuple[int, ...]]:
        """Return the cells since the last time, in order."""
        with self._lock:
            cells, self.cells = self.cells, []
        return sorted(cells)


def picture(shot: bytes, path: Path | None = None) -> np.ndarray:
    from PIL import Image

    if path is not None:
        path.write_bytes(shot)
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def visible_cells(browser: Any, grid: Any) -> list[tuple[int, ...]]:
    """Return the cells that the panels show, asked voxel by voxel of the panels' geometry."""
    panels = browser.execute_script(
        """return [...viewer.display.panels].filter((panel) => panel.sliceView).map((panel) => {
            const found = panel.sliceView.projectionParameters.value;
            return [found.logicalWidth, found.logicalHeight, [...found.invViewMatrix],
                    [...found.displayDimensionRenderInfo.displayDimensionIndices]];
        });"""
    )
    found: set[tuple[int, ...]] = set()
    for width, height, matrix, dimensions in panels:
        turn = np.reshape(matrix, (4, 4))
        x = np.arange(width + 1)[:, None, None] - width / 2
        y = np.arange(height + 1)[None, :, None] - height / 2
        places = x * turn[0, :3] + y * turn[1, :3] + turn[3, :3]
        # The viewer's x, y, z; the image's z, y, x. Integers are centres of voxels.
        voxels = np.floor(places.reshape(-1, 3) + 0.5).astype(np.int64)
        voxels = voxels[:, [dimensions.index(axis) for axis in (2, 1, 0)]]
        inside = ((voxels >= 0) & (voxels < grid.shape)).all(axis=1)
        cells = np.unique(voxels[inside] // grid.cell_shape, axis=0)
        found.update(map(tuple, cells.tolist()))
    return sorted(found)


# ------------------------------------------------------------------ looking


def test_four_panels_of_a_lazy_image_and_lazy_labels(
    show: Any, shared_data: Path, tmp_path: Path
) -> None:
    import tifffile

    brain = tifffile.imread(shared_data / "brain_signal.tif")
    raw = ci.map_cells(np.copy, brain, cell_shape=(8, 128, 128), dtype=brain.dtype)
    raw = raw.with_space(units="um", scale=(5, 2, 2))
    bright = ci.map_cells(lambda data: data > 1500, raw, dtype=bool)
    shown = show({"raw": raw, "cells": ci.label(bright)})
    shown.move_to((15, 230, 100))
    image = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S), tmp_path / "4.png")
    assert image.shape == (HEIGHT, WIDTH, 3)
    for rows in (slice(0, HEIGHT // 2), slice(HEIGHT // 2, None)):
        for columns in (slice(0, WIDTH // 2), slice(WIDTH // 2, None)):
            assert image[rows, columns].std() > 5
    shown.show("cells", visible=False)
    without = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S))
    assert 200 < (image != without).any(axis=2).sum() < 20_000
    assert raw.stats().errors == 0


def test_a_view_of_a_plane_computes_its_cells_and_no_others(show: Any, browser: Any) -> None:
    counted = Counted()
    image = ci.fill_cells(counted, ci.CellGrid((512,) * 3, (16, 256, 256)), dtype="u1")
    shown = show({"image": image}, layout="xy")
    shown.wait(TIMEOUT_S)
    cells = counted.take()
    assert cells == visible_cells(browser, image.grid) == list(product([15], [0, 1], [0, 1]))

    shown.zoom(0.25)
    shown.move_to((100, 60, 60))
    shown.wait(TIMEOUT_S)
    assert counted.take() == visible_cells(browser, image.grid) == [(6, 0, 0)]


def test_a_jump_in_an_image_of_2e15_voxels(show: Any, browser: Any) -> None:
    counted = Counted()
    image = ci.fill_cells(
        counted, ci.CellGrid((100_000, 150_000, 150_000), (64, 64, 64)), dtype="u1"
    )
    shown = show({"image": image}, layout="xy")
    shown.wait(TIMEOUT_S)
    # While the page is laid out for the first time its panel may be larger for a moment.
    assert set(visible_cells(browser, image.grid)) <= set(counted.take())

    for place in ((12_345, 140_000, 7_000), (54_321, 7_000, 140_000), (99, 70_000, 70_000)):
        panel_of(browser)
        counted.take()
        shown.move_to(place)
        shown.wait(TIMEOUT_S)
        cells, visible = counted.take(), visible_cells(browser, image.grid)
        assert shown.position == place
        assert tuple(n // 64 for n in place) in cells
        assert set(visible) <= set(cells)
        # A page that is still being laid out asks for what a larger panel would show.
        if cells == visible:
            break
    else:
        pytest.fail(f"{len(cells)} cells were computed, {len(visible)} are visible")


def test_an_oblique_plane(show: Any, browser: Any, tmp_path: Path) -> None:
    counted = Counted()
    image = ci.fill_cells(counted, ci.CellGrid((256,) * 3, (32,) * 3), dtype="u1")
    shown = show({"image": Layer(image, contrast=(0, 255))}, layout="xy")
    shown.show_oblique((1, 1, 0.5))
    shown.wait(TIMEOUT_S)
    expected = visible_cells(browser, image.grid)
    for _ in range(3):
        counted.take()
        image.invalidate()
        shown.wait(TIMEOUT_S)
        cells = counted.take()
        assert len({position[0] for position in cells}) > 2
        assert set(expected) <= set(cells)
        # A cell that the plane only grazes, between two pixels, may be among them as well; while
        # the page has not settled, those of the plane before are, too.
        if len(cells) <= 1.1 * len(expected) + 2:
            break
    else:
        pytest.fail(f"{len(cells)} cells were computed, {len(expected)} are visible")
    drawn = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S), tmp_path / "o.png")
    assert drawn.std() > 20


def test_zooming_out_reads_the_coarse_level(show: Any, browser: Any) -> None:
    fine, coarse = Counted(), Counted()
    levels = [
        ci.fill_cells(fine, ci.CellGrid((64, 1024, 1024), (32, 64, 64)), dtype="u1"),
        ci.fill_cells(coarse, ci.CellGrid((16, 256, 256), (16, 64, 64)), dtype="u1"),
    ]
    shown = show({"image": Layer(levels, contrast=(0, 255))}, layout="xy")
    shown.zoom(4)
    shown.wait(TIMEOUT_S)
    fine.take()
    assert coarse.take()
    shown.zoom(5)
    shown.move_to((0, 512, 512))
    shown.wait(TIMEOUT_S)
    assert fine.take() == []


def test_a_picture_without_a_browser_and_one_of_a_closed_view(browser: Any, tmp_path: Path) -> None:
    image = np.full((40, 50), 100, "u1")
    image[:, :25] = 200
    with view({"image": Layer(image, contrast=(0, 255))}, layout="xy") as shown:
        shown.zoom(0.2)
        path = tmp_path / "picture.png"
        shot = shown.screenshot(path, size=(400, 300), timeout=TIMEOUT_S)
        assert path.read_bytes() == shot
        drawn = picture(shot)
        assert drawn.shape == (300, 400, 3)
        assert drawn[140, 150].tolist() == [200, 200, 200]
        assert drawn[140, 250].tolist() == [100, 100, 100]
    with pytest.raises(ValueError, match="closed"):
        shown.screenshot()


def test_the_work_that_is_done_is_shown(show: Any) -> None:
    from cellimg_dask.viewer.shooting import shoot

    image = ci.fill_cells(Counted(), ci.CellGrid((128, 128), 32), dtype="u1")
    # Nothing but the work is seen, so that the view itself has nothing computed.
    shown = show({"image": Layer(image, contrast=(0, 255), visible=False)}, layout="xy", work=True)
    shown.zoom(0.5)
    with shown.viewer.txn() as state:
        state.show_axis_lines = False
    left, right = ((HEIGHT // 2, WIDTH // 2 + shift) for shift in (-100, 100))
    before = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S))
    assert np.array_equal(before[left], before[right])
    image[:, :64]
    now = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S))
    red, green, blue = now[left] - before[left]
    assert green > max(red, blue)
    assert np.array_equal(now[right], before[right])

    # The page looks by itself as well.
    image[:, 64:]

    def is_seen() -> bool:
        shot = shoot(
            shown.viewer,
            shown._editions.seen,
            lambda: True,
            shown._check_open,
            (WIDTH, HEIGHT),
            False,
            TIMEOUT_S,
        )
        return np.array_equal(picture(shot)[right], now[left])

    until(is_seen)
    assert image.stats().loads == 16


def test_cells_that_fail_are_told_by_wait(show: Any) -> None:
    def failing(block: Any) -> None:
        raise RuntimeError("no such luck")

    shown = show({"image": ci.fill_cells(failing, ci.CellGrid((64, 64), 32), dtype="u1")})
    with pytest.raises(
        TimeoutError, match=r"(0 of \d+ visible chunks|no page has drawn).* 'image': .*no such luck"
    ):
        shown.wait(3)


def test_channels_are_seen_together_and_hidden_ones_are_not_computed(show: Any) -> None:
    class Channels(Counted):
        def __call__(self, block: Any) -> None:
            with self._lock:
                self.cells.append(block.position)
            # The first is bright on the left, the second at the top, the third all over.
            rows, columns = np.ogrid[block.roi.start[1] : block.roi.stop[1],
                                     block.roi.start[2] : block.roi.stop[2]]  # fmt: skip
            block.data[...] = 200 * [columns < 32, rows < 32, rows >= 0][block.position[0]]

    counted = Channels()
    image = ci.fill_cells(counted, ci.CellGrid((3, 64, 64), (1, 32, 32)), dtype="u1")
    looks = [
        ci.Channel("left", "#ff0000", (0, 200)),
        ci.Channel("top", "#00ff00", (0, 200)),
        ci.Channel("all", "#0000ff", (0, 200), visible=False),
    ]
    shown = show({"cells": Layer(image.with_space(axes="cyx"), channels=looks)}, layout="xy")
    shown.zoom(0.25)

    def corners() -> list[list[int]]:
        seen = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S))
        y, x = HEIGHT // 2, WIDTH // 2
        return [seen[y + dy, x + dx].tolist() for dy in (-60, 60) for dx in (-60, 60)]

    assert corners() == [[255, 255, 0], [0, 255, 0], [255, 0, 0], [0, 0, 0]]
    # All cells of both that are seen, once each.
    assert counted.take() == list(product((0, 1), (0, 1), (0, 1)))
    shown.show("cells", channel="all", visible=True)
    shown.show("cells", channel="left", visible=False)
    assert corners() == [[0, 255, 255], [0, 255, 255], [0, 0, 255], [0, 0, 255]]
    assert counted.take() == list(product((2,), (0, 1), (0, 1)))


def test_a_change_of_one_channel_is_seen_where_a_chunk_holds_all(show: Any) -> None:
    source = ci.Source(
        np.zeros((2, 64, 64), "u1"), cell_shape=(2, 64, 64), space=ci.Space.of(3, "cyx")
    )
    layer = Layer(source, contrast=(0, 100), channels=[ci.Channel(color="#ff0000"), "green"])
    shown = show({"cells": layer}, layout="xy")
    shown.zoom(0.25)
    middle = (HEIGHT // 2 - 20, WIDTH // 2 - 20)
    before = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S))
    assert before[middle].tolist() == [0, 0, 0]
    source[1] = 100
    after = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S))
    assert after[middle].tolist() == [0, 255, 0]


def test_the_page_keeps_all_layers_beside_one_another(show: Any) -> None:
    stack = ci.Source(np.zeros((2, 64, 64), "u1"), space=ci.Space.of(3, "cyx"))
    plain = np.zeros((64, 64), "u1")
    shown = show({"fixed": plain, "moving": stack, "other": plain})
    shown.landmarks("fixed", "moving", side_by_side=True)
    shown.wait(TIMEOUT_S)
    shown.add("late", stack)
    shown.wait(TIMEOUT_S)
    names = ["fixed", "moving 0", "moving 1", "other", "late 0", "late 1"]
    assert {*names, "landmarks of fixed"} <= {each.name for each in shown.viewer.state.layers}


# ------------------------------------------------------------------ labels, painting, landmarks


def keys(browser: Any) -> Any:
    from selenium.webdriver.common.action_chains import ActionChains

    return ActionChains(browser, duration=20)


def soon(condition: Callable[[], object]) -> bool:
    """Whether something comes about within a few seconds."""
    tick = threading.Event()
    return any(condition() or tick.wait(0.02) for _ in range(500))


def panel_of(browser: Any) -> list[float]:
    """Return width, height, left and top of the panel, once the page is laid out."""
    seen: list[list[float]] = [[], []]

    def is_settled() -> bool:
        found = browser.execute_script(
            """const panel = [...viewer.display.panels].find((each) => each.sliceView);
            if (!panel) return null;
            const bounds = panel.element.getBoundingClientRect();
            if (bounds.right > window.innerWidth || bounds.bottom > window.innerHeight) return null;
            const element = panel.element;
            return [element.clientWidth, element.clientHeight,
                    bounds.left + element.clientLeft, bounds.top + element.clientTop];"""
        )
        seen.append(found or [])
        return bool(found) and seen[-2] == found

    until(is_settled)
    return seen[-1]


def at(browser: Any, chain: Any, x: int, y: int) -> Any:
    """Move the mouse to so many pixels from the middle of the panel."""
    width, height, left, top = panel_of(browser)
    chain.w3c_actions.pointer_action.move_to_location(
        round(left + width / 2 + x), round(top + height / 2 + y)
    )
    chain.w3c_actions.key_action.pause()
    return chain


def double_click(browser: Any, x: int, y: int, took_effect: Callable[[], object]) -> None:
    """Click twice at so many pixels from the middle of the panel, until that has had its effect.

    Where the machine is busy, more than half a second may lie between the two clicks, which the
    browser then takes for two of their own.
    """
    for _ in range(6):
        at(browser, keys(browser), x, y).double_click().perform()
        if soon(took_effect):
            return
    raise AssertionError("six double clicks had no effect")


def test_a_label_is_selected_by_a_double_click(show: Any, browser: Any) -> None:
    labels = np.ones((1, 200, 200), "i8")
    labels[:, :, 120:] = 77
    shown = show({"labels": Layer(labels, kind="labels")}, layout="xy")
    shown.zoom(1)
    shown.wait(TIMEOUT_S)
    assert shown.selected("labels") == []
    double_click(browser, 60, 0, lambda: shown.selected("labels") == [77])
    shown.select("labels", [1, 77])
    assert shown.selected("labels") == [1, 77]


def grown(counted: Counted, source: ci.Source) -> ci.CellImg:
    """The source, each voxel spread over its neighbours."""

    def grow(block: Any) -> None:
        from scipy import ndimage

        counted.cells.append(block.position)
        block.data[...] = ndimage.grey_dilation(block.inputs[0], size=3)[block.halo]

    return ci.fill_cells(grow, source.grid, source, halo=1, dtype=source.dtype)


def test_a_stroke_that_fails_is_told_once(
    show: Any, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = show({"it": ci.Source(np.zeros((1, 200, 200), "u1"))}, layout="xy")
    shown.wait(TIMEOUT_S)
    brush, asked = shown.paint("it"), []

    def fail(message: Any) -> Any:
        asked.append(message)
        raise ValueError("not today")

    monkeypatch.setattr(brush, "answer", fail)
    chain = keys(browser).key_down("p")
    at(browser, chain, -50, -20).click_and_hold()
    for x in range(-40, 51, 10):
        at(browser, chain, x, -20).pause(0.05)
    chain.release().key_up("p").perform()
    until(lambda: "not today" in browser.execute_script("return document.body.textContent"))
    strokes = [message for message in asked if message["kind"] == "stroke"]
    assert len(strokes) == 1


def test_a_stroke_changes_what_rests_on_it_and_nothing_else(
    show: Any, browser: Any, tmp_path: Path
) -> None:
    source, counted = ci.Source(np.zeros((32, 256, 256), "u4"), cell_shape=(8, 32, 32)), Counted()
    wide = grown(counted, source)
    shown = show(
        {"wide": Layer(wide, kind="labels"), "labels": Layer(source, kind="labels")}, layout="xy"
    )
    shown.zoom(1)
    brush = shown.paint("labels", size=8, value=5)
    blank = picture(shown.screenshot(timeout=TIMEOUT_S))
    counted.take()

    chain = keys(browser).key_down("p")
    at(browser, chain, -50, -20).click_and_hold()
    for x in range(-40, 51, 10):
        at(browser, chain, x, -20)
    chain.release().key_up("p").perform()
    # The page's last batch may still be on its way: the rim behind the last point.
    until(lambda: source[15, 107, 180] == 5)
    shown.wait(TIMEOUT_S)

    painted = np.argwhere(source[...] == 5)
    assert painted[:, 0].min() == painted[:, 0].max() == 15
    # A line of 100 pixels at a voxel a pixel, a brush 8 wide.
    expected = np.zeros((256, 256), bool)
    rows, columns = np.ogrid[:256, :256]
    distance = np.hypot(rows - 107, np.maximum(np.abs(columns - 127) - 50, 0))
    expected[distance <= 4] = True
    difference = expected ^ (source[15] == 5)
    # The panel's middle may lie between two pixels.
    assert (~difference | (np.abs(distance - 4) < 1.2)).all()

    near = ci.Roi(
        tuple(int(low) - 1 for low in painted.min(axis=0)),
        tuple(int(high) + 2 for high in painted.max(axis=0)),
    )
    affected = {cell.position for cell in source.grid.cells_in(near.clip(source.shape))}
    seen = {position for position in affected if position[0] == 15 // 8}
    # Each batch of the stroke computes what it has changed; nothing else is computed.
    assert set(counted.take()) == seen
    image = picture(shown.screenshot(timeout=TIMEOUT_S), tmp_path / "painted.png")
    assert (image != blank).any(axis=2).sum() > 500

    from selenium.webdriver.common.keys import Keys

    keys(browser).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
    until(lambda: not source[...].any())
    shown.wait(TIMEOUT_S)
    # As one edit.
    assert counted.take() == sorted(seen)
    assert np.array_equal(picture(shown.screenshot(timeout=TIMEOUT_S)), blank)

    keys(browser).send_keys("]").perform()
    until(lambda: brush.size == 10)


def test_erasing_with_the_right_button(show: Any, browser: Any) -> None:
    source = ci.Source(np.full((64, 64), 9, "u1"), cell_shape=16)
    shown = show({"labels": Layer(source, kind="labels")}, layout="xy")
    shown.zoom(0.25)
    shown.paint(source, size=4, value=9)
    shown.wait(TIMEOUT_S)
    chain = at(browser, keys(browser).key_down("p"), 0, 0)
    chain.w3c_actions.pointer_action.pointer_down(2)
    chain.w3c_actions.pointer_action.pointer_up(2)
    chain.key_up("p").perform()
    until(lambda: source[31, 31] == 0)
    # A disc that is 4 wide, wherever in that voxel its middle is.
    assert 9 <= (source[...] == 0).sum() <= 16


def test_another_parameter_is_shown(show: Any) -> None:
    image = ci.map_cells(
        np.full_like, np.zeros((64, 64), "u1"), dtype="u1", params={"fill_value": 50}
    )
    shown = show({"image": Layer(image, contrast=(0, 255))}, layout="xy")
    shown.zoom(0.25)
    middle = (HEIGHT // 2 - 20, WIDTH // 2 - 20)
    before = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S))
    image.set_params(fill_value=150)
    after = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S))
    assert before[middle].tolist() == [50] * 3
    assert after[middle].tolist() == [150] * 3


def test_a_page_that_cannot_refresh_gets_new_addresses(show: Any) -> None:
    image = ci.map_cells(
        np.full_like, np.zeros((64, 64), "u1"), dtype="u1", params={"fill_value": 50}
    )
    shown = show({"image": Layer(image, contrast=(0, 255))}, layout="xy")
    shown.zoom(0.25)
    shown.wait(TIMEOUT_S)
    shown._answer({"kind": "cannot refresh"})
    image.set_params(fill_value=150)
    assert "@edition-1" in str(shown.viewer.state.layers["image"].source[0].url)
    after = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S))
    assert after[HEIGHT // 2 - 20, WIDTH // 2 - 20].tolist() == [150] * 3


def test_landmarks_are_placed_by_keys(show: Any, browser: Any) -> None:
    fixed, moving = np.zeros((1, 200, 200), "u1"), np.ones((1, 200, 200), "u1")
    shown = show({"fixed": fixed, "moving": moving}, layout="xy")
    shown.zoom(1)
    landmarks = shown.landmarks("fixed", "moving")
    changes: list[int] = []
    landmarks.on_change(lambda each: changes.append(len(each)))
    shown.wait(TIMEOUT_S)

    def place(key: str, x: int, y: int) -> None:
        at(browser, keys(browser), x, y).perform()
        # Where nothing is known of the mouse yet, a key places nothing.
        until(lambda: browser.execute_script("return viewer.mouseState.active"))
        before = len(changes)
        for _ in range(3):
            keys(browser).send_keys(key).perform()
            # A page that is busy may lose a key.
            if soon(lambda: len(changes) > before):
                break

    place("f", -30, 10)
    until(lambda: changes)
    place("m", 20, 40)
    until(lambda: len(landmarks) == 1)
    (source,), (target,) = landmarks.pairs()
    np.testing.assert_allclose(target, [0, 109, 69], atol=1.1)
    np.testing.assert_allclose(source, [0, 139, 119], atol=1.1)
    until(lambda: changes[-1] == 1)


def test_the_surface_of_a_label_that_was_double_clicked(
    show: Any, browser: Any, tmp_path: Path
) -> None:
    labels = np.zeros((20, 40, 40), "u4")
    labels[5:15, 10:30, 10:30] = 3
    shown = show({"labels": Layer(labels, kind="labels")}, layout="xy-3d")
    shown.zoom(0.2)
    shown.meshes("labels")
    with shown.viewer.txn() as state:
        state.projection_scale = 60
        state.show_slices = False
        state.show_axis_lines = False
        state.show_default_annotations = False
    blank = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S))
    double_click(browser, 10, 10, lambda: shown.selected("labels") == [3])
    image = picture(shown.screenshot(size=(WIDTH, HEIGHT), timeout=TIMEOUT_S), tmp_path / "s.png")
    right = slice(WIDTH // 2, None)
    assert (image != blank)[:, right].any(axis=2).sum() > 2000
