"""A cell with the arrays of one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Block", "Box", "Outline"]


class Block:
    """A cell, the arrays to read and the array to write, as any Python has them.

    All shapes and indices are in NumPy axis order and in voxels of the output image.
    """

    __slots__ = ("_data", "_plan", "inputs", "params")

    def __init__(
        self,
        plan: Any,
        data: NDArray[Any],
        inputs: tuple[NDArray[Any], ...],
        params: Mapping[str, Any],
    ) -> None:
        self._plan = plan
        self._data = data
        self.inputs = inputs
        """Read-only arrays, each with its halo."""
        self.params = params
        """Keyword parameters of the image."""

    @property
    def data(self) -> NDArray[Any]:
        """The array to write: the cell's true shape, native byte order, zeros at first."""
        return self._data

    @data.setter
    def data(self, value: object) -> NoReturn:
        raise AttributeError(
            "block.data cannot be replaced; write into it: block.data[...] = result"
        )

    @property
    def index(self) -> int:
        """Flat index of the cell, C order."""
        index: int = self._plan.index
        return index

    @property
    def position(self) -> tuple[int, ...]:
        """Index of the cell along each axis of the grid."""
        position: tuple[int, ...] = self._plan.position
        return position

    @property
    def roi(self) -> Any:
        """The cell's box, without halo: a `Roi`."""
        return self._plan.roi

    @property
    def read_roi(self) -> Any:
        """The cell's box grown by the halo, a `Roi`; it may leave the image."""
        return self._plan.read_roi

    @property
    def min(self) -> tuple[int, ...]:
        """First voxel of the cell along each axis."""
        start: tuple[int, ...] = self._plan.start
        return start

    @property
    def max(self) -> tuple[int, ...]:
        """Last voxel of the cell along each axis, inclusive."""
        return tuple(high - 1 for high in self._plan.stop)

    @property
    def dim(self) -> tuple[int, ...]:
        """Shape of the cell, as the original names it."""
        return self.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the cell."""
        shape: tuple[int, ...] = self._plan.shape
        return shape

    @property
    def halo(self) -> tuple[slice, ...]:
        """Slices that crop a result of the input's size to the cell; right for width 0 too."""
        crop: tuple[slice, ...] = self._plan.crop
        return crop

    def __repr__(self) -> str:
        shapes = ", ".join(str(array.shape) for array in self.inputs)
        return f"Block(position={self.position}, shape={self.shape}, inputs=[{shapes}])"


class Box:
    """A half-open box where the rest of the package is not: what a `Roi` says there."""

    __slots__ = ("start", "stop")

    def __init__(self, start: tuple[int, ...], stop: tuple[int, ...]) -> None:
        self.start = start
        """First voxel along each axis."""
        self.stop = stop
        """One past the last voxel along each axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along each axis."""
        return tuple(high - low for low, high in zip(self.start, self.stop))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.start)

    @property
    def size(self) -> int:
        """Number of voxels."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def slices(self) -> tuple[slice, ...]:
        """Slices with explicit bounds."""
        return tuple(slice(low, high) for low, high in zip(self.start, self.stop))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and (self.start, self.stop) == (other.start, other.stop)

    def __hash__(self) -> int:
        return hash((self.start, self.stop))

    def __repr__(self) -> str:
        return f"Roi({self.start}, {self.stop})"


class Outline:
    """What a `Block` has to know of its cell, as it comes in a message."""

    __slots__ = ("crop", "index", "position", "read_roi", "roi", "shape", "start", "stop")

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.index: int = content["index"]
        self.position = tuple(content["position"])
        self.start = tuple(content["start"])
        self.stop = tuple(content["stop"])
        self.roi = Box(self.start, self.stop)
        self.shape = self.roi.shape
        self.read_roi = Box(tuple(content["read_start"]), tuple(content["read_stop"]))
        self.crop = tuple(slice(*ends) for ends in content["crop"])

    @staticmethod
    def content(block: Block) -> dict[str, Any]:
        """Return the same for a message."""
        read = block.read_roi
        return {
            "index": block.index,
            "position": block.position,
            "start": block.roi.start,
            "stop": block.roi.stop,
            "read_start": read.start,
            "read_stop": read.stop,
            "crop": [(part.start, part.stop) for part in block.halo],
        }
