"""What tells the content of a data set of HDF5: the files that its values lie in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import escape, glob
from pathlib import Path
from typing import Any

from cellimg_dask.loading.file_array import check_unchanged, file_state

__all__ = ["check_not_replaced", "hdf5_state", "other_places"]


def hdf5_state(array: Any, others: Sequence[str]) -> list[Any]:
    """Return name and state of the file of a data set, and those of other files.

    Parameters
    ----------
    array : h5py.Dataset
        The data set.
    others : sequence of str
        Its `other_places`, which take longer to find out.

    Raises
    ------
    SourceChangedError
        If there is another file at the path by now.
    """
    file = array.file.filename
    check_not_replaced(array.file)
    found = sorted({file for place in others for file in glob(place)})  # noqa: PTH207 - absolute
    states = [[[place, file_state(place)] for place in found]] if others else []
    return [file, file_state(file), *states]


def check_not_replaced(file: Any) -> None:
    """Refuse a file of HDF5 at whose path there is another one by now.

    Raises
    ------
    SourceChangedError
        If there is.
    """
    name = file.filename
    try:
        opened, there = os.fstat(file.id.get_vfd_handle()), Path(name).stat()
    except (OSError, NotImplementedError, RuntimeError, TypeError, ValueError):
        # Gone, or not a file of this machine that is read by itself.
        return
    check_unchanged(name, (opened.st_dev, opened.st_ino), (there.st_dev, there.st_ino))


def other_places(array: Any) -> list[str]:
    """Return patterns of the files in which a data set has its values, beside its own."""
    file = array.file.filename
    names = {name for name, _, _ in array.external or ()}
    if array.is_virtual:
        names = {source.file_name for source in array.virtual_sources()} - {"."}
    # HDF5 looks beside the file and in the working folder; "%b" stands for a number.
    folders = Path(file).parent, Path.cwd()
    places = [escape(str(folder / name)) for name in names for folder in folders]
    return [place.replace("%b", "*") for place in sorted(places)]
