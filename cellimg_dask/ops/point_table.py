"""What a table of points looks like, and reading what a function returned as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Found", "PointTable"]

Floats = NDArray[np.float64]


class Found(NamedTuple):
    """Points as a cell keeps them, which is lighter than a data frame."""

    points: Floats
    """Of shape (points, axes), in voxels of the image."""
    others: Mapping[str, Any]
    """The further columns: arrays of NumPy or pandas."""

    def take(self, keep: NDArray[Any]) -> Found:
        """Return some of the points."""
        others = {name: values[keep] for name, values in self.others.items()}
        return Found(self.points[keep], others)


@dataclass(frozen=True)
class PointTable:
    """The columns of a table of points: coordinates, what else, and physical coordinates."""

    axes: tuple[str, ...]
    """Names of the coordinates in voxels, float64; one per axis of the image."""
    columns: tuple[tuple[str, Any], ...] = ()
    """Names and dtypes of the further columns."""
    voxel_size: tuple[float, ...] | None = None
    """Extent of a voxel along each axis; None: there are no physical coordinates."""

    @classmethod
    def of(cls, ndim: int, axes: Any, columns: Any, voxel_size: Any) -> PointTable:
        """Check what the user says of the columns.

        Raises
        ------
        TypeError, ValueError
            If something of it is wrong.
        """
        names = _numbered(ndim) if axes is None else _names(axes)
        if len(names) != ndim:
            raise ValueError(f"axes must name each of {ndim} axes, got {len(names)}: {names}")
        table = cls(names, _columns(columns), _sizes(voxel_size, ndim))
        every = list(table.names())
        twice = sorted({name for name in every if every.count(name) > 1})
        if twice:
            raise ValueError(
                f"column {', '.join(map(repr, twice))} would be there twice; the columns are "
                f"{', '.join(every)}: rename it in columns= or axes="
            )
        return table

    @property
    def physical(self) -> tuple[str, ...]:
        """Names of the physical coordinates, of which there may be none."""
        if self.voxel_size is None:
            return ()
        return tuple(f"physical-{suffix}" for suffix in self.suffixes)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What tells the axes apart in the names of other columns."""
        numbers = tuple(map(str, range(len(self.axes))))
        return numbers if self.axes == _numbered(len(self.axes)) else self.axes

    def names(self) -> Iterator[str]:
        """Names of all columns in order."""
        return chain(self.axes, (name for name, _ in self.columns), self.physical)

    def meta(self) -> pd.DataFrame:
        """Return the table without rows."""
        import pandas as pd

        none = {name: pd.array([], dtype=dtype) for name, dtype in self.columns}
        return self.frame(Found(np.empty((0, len(self.axes))), none))

    def frame(self, found: Found) -> pd.DataFrame:
        """Return points as a new data frame."""
        import pandas as pd

        points, others = found
        columns: dict[str, Any] = dict(zip(self.axes, points.T, strict=True))
        for name, dtype in self.columns:
            columns[name] = pd.Series(others[name], dtype=dtype)
        if self.voxel_size is not None:
            columns |= zip(self.physical, (points * self.voxel_size).T, strict=True)
        return pd.DataFrame(columns)

    def read(self, result: Any) -> Found:
        """Return what a function returned as points, with coordinates as they are.

        Raises
        ------
        ValueError
            If it is not what it should be; the message goes on from "returned".
        """
        import pandas as pd

        if isinstance(result, pd.DataFrame):
            given = {name: result[name] for name in result.columns}
            if len(given) < result.shape[1]:
                raise ValueError(f"a data frame with two columns of one name; {self._expected()}")
            return self._named(given, "a data frame")
        if isinstance(result, Mapping):
            return self._named(result, "a mapping")
        if result is None or isinstance(result, (str, bytes)) or not _is_array(result):
            raise ValueError(f"{type(result).__name__}; {self._expected()}")
        if isinstance(result, np.ma.MaskedArray):
            raise ValueError("a masked array, whose mask would be lost; leave the points out")
        try:
            array = np.asarray(result)
        except ValueError:
            raise ValueError(f"rows of different lengths; {self._expected()}") from None
        if array.dtype.names is not None:
            if array.ndim != 1:
                raise ValueError(f"a structured array of shape {array.shape}, expected one axis")
            fields = {name: array[name] for name in array.dtype.names}
            return self._named(fields, "a structured array")
        return self._plain(array)

    def _plain(self, array: NDArray[Any]) -> Found:
        ndim, width = len(self.axes), len(self.axes) + len(self.columns)
        if array.size == 0 and (array.ndim == 1 or array.shape[0] == 0):
            # There are many ways to write down that nothing was found.
            array = np.empty((0, width))
        if array.ndim != 2 or array.shape[1] != width:
            raise ValueError(f"an array of shape {array.shape}; {self._expected()}")
        if array.dtype.kind not in "biuf":
            raise ValueError(f"an array of dtype {array.dtype}; {self._expected()}")
        others = {
            name: _cast(array[:, ndim + number], name, dtype)
            for number, (name, dtype) in enumerate(self.columns)
        }
        return Found(_finite(array[:, :ndim], self.axes), others)

    def _named(self, given: Mapping[Any, Any], what: str) -> Found:
        wanted = [*self.axes, *(name for name, _ in self.columns)]
        if not given:
            given = dict.fromkeys(wanted, ())
        missing = [name for name in wanted if name not in given]
        more = [name for name in given if name not in wanted]
        if missing or more:
            wrong = [f"without column {', '.join(map(repr, missing))}"] * bool(missing)
            wrong += [f"with column {', '.join(map(repr, more))} besides"] * bool(more)
            raise ValueError(f"{what} {' and '.join(wrong)}; {self._expected()}")
        for name in wanted:
            shape = np.shape(given[name])
            if len(shape) != 1:
                raise ValueError(
                    f"{what} whose column {name!r} has shape {shape}, expected one axis"
                )
        lengths = {name: len(given[name]) for name in wanted}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{what} with columns of different lengths: {lengths}")
        points = np.empty((next(iter(lengths.values()), 0), len(self.axes)))
        for axis, name in enumerate(self.axes):
            column = np.asarray(given[name])
            if column.dtype.kind not in "biuf" and not (column.size == 0):
                raise ValueError(
                    f"{what} whose column {name!r} has dtype {column.dtype}, expected numbers"
                )
            points[:, axis] = column
        others = {name: _cast(given[name], name, dtype) for name, dtype in self.columns}
        return Found(_finite(points, self.axes), others)

    def _expected(self) -> str:
        columns = ", ".join([*self.axes, *(name for name, _ in self.columns)])
        width = len(self.axes) + len(self.columns)
        hint = "" if self.columns else "; columns= declares more than coordinates"
        return (
            f"expected an array of shape (points, {width}), or a data frame, structured array or "
            f"mapping, of columns {columns}{hint}"
        )


def _numbered(ndim: int) -> tuple[str, ...]:
    return tuple(f"axis-{axis}" for axis in range(ndim))


def _is_array(value: Any) -> bool:
    return isinstance(value, Sequence) or hasattr(value, "__array__")


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, Iterable):
        raise TypeError(f"axes must be names such as 'zyx' or ('z', 'y', 'x'), got {value!r}")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"axes must be names such as 'zyx' or ('z', 'y', 'x'), got {value!r}")
    return names


def _columns(value: Any) -> tuple[tuple[str, Any], ...]:
    from pandas.api.types import pandas_dtype

    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(
            f"columns must map names to dtypes, or be a sequence of names (for float64), "
            f"got {value!r}"
        )
    pairs = value.items() if isinstance(value, Mapping) else [(name, float) for name in value]
    found = []
    for name, dtype in pairs:
        if not isinstance(name, str) or not name:
            raise TypeError(f"columns must have strings as names, got {name!r}")
        try:
            kind = pandas_dtype(dtype)
        except (TypeError, ValueError) as error:
            raise TypeError(f"columns: {dtype!r} of {name!r} is no dtype: {error}") from None
        if isinstance(kind, np.dtype):
            kind = kind.newbyteorder("=")
        found.append((name, kind))
    return tuple(found)


def _sizes(value: Any, ndim: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    sizes = (value,) * ndim if isinstance(value, Real) else tuple(value)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, Real) or not 0 < float(size) < np.inf:
            raise ValueError(f"voxel_size must hold positive numbers, got {value!r}")
    if len(sizes) != ndim:
        raise ValueError(
            f"voxel_size must have one value for each of {ndim} axes, got {len(sizes)}: {value!r}"
        )
    return tuple(float(size) for size in sizes)


def _finite(points: NDArray[Any], axes: Sequence[str]) -> Floats:
    result = np.asarray(points, np.float64)
    bad = ~np.isfinite(result)
    if bad.any():
        row, axis = (int(n) for n in np.argwhere(bad)[0])
        raise ValueError(
            f"{int(bad.any(axis=1).sum())} of {len(result)} points without finite coordinates "
            f"(the first is row {row}, {axes[axis]} = {result[row, axis]}); leave such points out"
        )
    return result


def _cast(values: Any, name: str, dtype: Any) -> Any:
    """Return a column as an array of its dtype, if that can hold the values."""
    import pandas as pd

    given = values if isinstance(values, np.ndarray) else pd.Series(values).array
    if not isinstance(given, np.ndarray) and isinstance(given.dtype, np.dtype):
        given = given.to_numpy()
    nothing = int(pd.isna(given).sum())
    try:
        with np.errstate(all="ignore"):
            if (
                isinstance(given, np.ndarray)
                and given.dtype.kind in "biuf"
                and dtype.kind in "biuf"
            ):
                result = given.astype(dtype)
                lost = _lost(given, result)
            else:
                if isinstance(dtype, pd.CategoricalDtype) and dtype.categories is not None:
                    known = pd.Series(given).isin(dtype.categories)
                    given = pd.Series(given).where(known).array
                result = pd.Series(given).astype(dtype).array
                lost = int(pd.isna(result).sum()) - nothing
                if isinstance(dtype, np.dtype):
                    result = np.asarray(result)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"column {name!r} of dtype {given.dtype}, which is no {dtype}: {error}; "
            f"declare it in columns="
        ) from None
    if lost:
        raise ValueError(
            f"column {name!r} of dtype {given.dtype}, of which {lost} values are no {dtype}; "
            f"declare another dtype in columns="
        )
    return result


def _lost(given: NDArray[Any], result: NDArray[Any]) -> int:
    """Return how many numbers have become others; floats may be rounded to shorter ones."""
    if given.dtype.kind == result.dtype.kind == "f":
        return int((np.isinf(given) != np.isinf(result)).sum())
    return int((result.astype(given.dtype) != given).sum())
