"""The folder of parquet files that a run of a table fills, a file for each cell."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import google_crc32c
from numpy.typing import NDArray

from cellimg_dask.batch.folder import is_url, open_folder
from cellimg_dask.blocks.content import digest, value_content
from cellimg_dask.geometry import CellGrid

__all__ = ["TableLayout", "TableTarget"]

_COMPRESSIONS: dict[str | None, str] = {"zstd": "zstd", "gzip": "gzip", None: "none"}


@dataclass(frozen=True)
class TableLayout:
    """How a table is stored: every part with the same schema, empty ones too."""

    grid: CellGrid
    """Cells of the image whose cells become tables."""
    make: Callable[[Any], Any]
    """From the value of a cell to its table, a data frame of pandas."""
    schema: Any
    """Of Arrow, with what pandas wants to know."""
    compression: str
    """As parquet calls it."""
    level: int | None
    """How hard it tries."""

    @classmethod
    def of(
        cls,
        grid: CellGrid,
        make: Callable[[Any], Any],
        meta: Any,
        compressor: str | None,
        level: int | None,
    ) -> TableLayout:
        """Return a checked layout.

        Parameters
        ----------
        grid : CellGrid
            Of the image whose cells become tables.
        make : callable
            From the value of a cell to its table, a `pandas.DataFrame`.
        meta : pandas.DataFrame
            A table without rows.
        compressor, level
            As in `run`.
        """
        if compressor not in _COMPRESSIONS:
            raise ValueError(
                f"parquet knows no compressor {compressor!r}; use one of "
                f"{', '.join(map(repr, _COMPRESSIONS))}"
            )
        return cls(grid, make, _schema_of(meta), _COMPRESSIONS[compressor], level)

    @property
    def noun(self) -> str:
        """What messages call a target."""
        return "table"

    def target(self, where: str) -> TableTarget:
        """Return the folder that was created."""
        return TableTarget(where, self.grid, self.make, self.schema, self.compression, self.level)

    def content(self) -> str:
        """Return what a table depends on beside the value of its cell.

        Raises
        ------
        NoContentError
            If that cannot be compared.
        """
        kinds = [(field.name, str(field.type)) for field in self.schema]
        return digest([value_content(self.make, "the table"), kinds])

    def create(self, where: str, *, overwrite: bool) -> None:
        """Create the folder, empty."""
        folder = open_folder(where)
        for name in list(folder.names("")):
            if name.endswith(".parquet"):
                folder.remove(name)
        if self.grid.num_cells == 0:
            # So that what reads it finds the columns.
            target = self.target(where)
            folder.write(target.name(0), target.encoded(self.schema.empty_table()))

    def existing(self, where: str, *, by_a_run: bool) -> Any:
        """Return the schema of a table at a path or URL, None where a run has left nothing.

        Raises
        ------
        FileExistsError
            If there is something else.
        """
        import pyarrow.parquet as pq

        is_file = not is_url(where) and Path(where).is_file()
        names = [] if is_file else sorted(open_folder(where).names(""))
        if (is_file or names) and not (by_a_run and all(map(_is_part, names))):
            # Not even to be overwritten: it may be anything.
            raise FileExistsError(
                f"{where} exists and is no table that a run has made; give another target, or a "
                f"path in it"
            )
        if not by_a_run:
            return None
        for name in names:
            content = open_folder(where).read(name)
            try:
                return pq.read_schema(BytesIO(content or b""))
            except ValueError:
                # Damaged, which will be found.
                continue
        return self.schema

    def differences(self, there: Any) -> list[str]:
        """Return in what an existing table differs, as text."""
        if there.equals(self.schema):
            return []
        names, expected = (
            ", ".join(f"{field.name} {field.type}" for field in schema)
            for schema in (there, self.schema)
        )
        return [f"columns {names}, expected {expected}"]

    def as_json(self) -> bytes:
        """Return the layout as JSON text, for whoever asks for the state of a target."""
        content = {
            "schema": 1,
            "shape": self.grid.shape,
            "cell_shape": self.grid.cell_shape,
            "kind": "parquet",
        }
        return json.dumps(content).encode()


@dataclass(frozen=True)
class TableTarget:
    """A folder of parquet files, one for each cell.

    Thread-safe: each cell has a file of its own.
    """

    where: str
    """Path or URL."""
    grid: CellGrid
    """Cells of the image whose cells become tables."""
    make: Callable[[Any], Any] | None = None
    """From the value of a cell to its table; needed only for writing."""
    schema: Any = None
    """Of Arrow; needed only for writing."""
    compression: str = "zstd"
    """As parquet calls it."""
    level: int | None = None
    """How hard it tries."""

    def name(self, index: int) -> str:
        """Return the name of a cell's file; in the order of their names the cells are in order."""
        width = len(str(max(self.grid.num_cells - 1, 0)))
        return f"part-{index:0{width}d}.parquet"

    def begin(self, index: int, data: NDArray[Any]) -> Callable[[], object]:
        """Store a cell, and return what there is to wait for: nothing."""
        import pyarrow as pa

        assert self.make is not None
        table = pa.Table.from_pandas(self.make(data.item()), schema=self.schema)
        open_folder(self.where).write(self.name(index), self.encoded(table))
        return _nothing

    def encoded(self, table: Any) -> bytes:
        """Return a table of Arrow as the content of a file."""
        import pyarrow.parquet as pq

        # The same metadata in all files, whatever the table says.
        table = table.cast(self.schema).replace_schema_metadata(self.schema.metadata)
        buffer = BytesIO()
        level = None if self.compression == "none" else self.level
        pq.write_table(table, buffer, compression=self.compression, compression_level=level)
        return buffer.getvalue()

    def checksums(self, index: int) -> dict[str, Any]:
        """Return size and CRC-32C of a cell's file; None where there is none."""
        content = open_folder(self.where).read(self.name(index))
        found = None if content is None else [len(content), f"{google_crc32c.value(content):08x}"]
        return {self.name(index): found}

    def sizes(self, index: int) -> dict[str, int | None]:
        """Return the size of a cell's file; None where there is none."""
        name = self.name(index)
        if is_url(self.where):
            content = open_folder(self.where).read(name)
            return {name: None if content is None else len(content)}
        try:
            return {name: Path(self.where, name).stat().st_size}
        except FileNotFoundError:
            return {name: None}


def _nothing() -> None:
    pass


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet") and name[5:-8].isdigit()


def _schema_of(meta: Any) -> Any:
    """Return the schema of a table without rows; a column of objects is one of text."""
    import pandas as pd
    import pyarrow as pa

    plain = isinstance(meta.index, pd.RangeIndex) and meta.index.name is None
    schema = pa.Schema.from_pandas(meta, preserve_index=False if plain else None)
    return pa.schema([field.with_type(_told(field.type)) for field in schema], schema.metadata)


def _told(kind: Any) -> Any:
    """Return a type of Arrow; text where a table without rows does not tell."""
    import pyarrow as pa

    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_dictionary(kind):
        # Each part has its own categories, perhaps many.
        return pa.dictionary(pa.int32(), _told(kind.value_type), kind.ordered)
    return kind
