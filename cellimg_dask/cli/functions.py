"""What the command line says of block functions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellimg_dask.cli.require import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cellimg_dask.bare.arrays import Array
    from cellimg_dask.schemas.block_schema import BlockSchema

__all__ = ["hint_for", "is_function", "show_function"]


def is_function(what: str) -> bool:
    """Whether what was typed names a function or a description, and not an image."""
    from cellimg_dask.schemas.description import is_description

    path = Path(what)
    if path.exists():
        return path.is_file() and is_description(what)
    place, colon, name = what.rpartition(":")
    # A drive of Windows has a colon too.
    return bool(colon) and "/" not in name and "\\" not in name and len(place) != 1


def hint_for(what: str) -> str:
    """Return what may have been meant by something that is no image, or nothing."""
    path = Path(what)
    if path.suffix == ".py" and path.is_file():
        names = _functions_in(path)
        return f": {', '.join(f'{what}:{name}' for name in names)}" if names else ", it has none"
    module, dot, name = what.rpartition(".")
    if dot and all(part.isidentifier() for part in what.split(".")) and _is_there(module):
        return f" If it is a function, write {module}:{name}."
    return ""


def _is_there(module: str) -> bool:
    from importlib.util import find_spec

    # Of a package only the package itself is looked for, since that runs nothing.
    return find_spec(module.partition(".")[0]) is not None


def _functions_in(path: Path) -> list[str]:
    """Return the functions that a file defines, without running it."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return []
    return [
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


def show_function(what: str, env: Path | None, *, as_json: bool) -> None:
    """Print what a function takes and gives."""
    # What a module prints is no part of the answer.
    with _telling(), redirect_stdout(sys.stderr):
        schema = _described(what, env)
    if as_json:
        click.echo(schema.to_json())
        return
    click.echo(f"{schema.reference}" + (f": {schema.description}" if schema.description else ""))
    for title, arrays in (("inputs", schema.inputs), ("outputs", schema.outputs)):
        if arrays:
            _table(title, [_array_row(item) for item in arrays])
    properties: Mapping[str, Any] = schema.document["properties"]
    rows = [
        _parameter_row(name, part, name in schema.document["required"])
        for name, part in properties.items()
    ]
    more = schema.document["additionalProperties"]
    if more is not False:
        from cellimg_dask.schemas.words import words

        rows.append(("…", "any" if more is True else words(more), "", "by any name"))
    if rows:
        _table("parameters", rows)


def _described(what: str, env: Path | None) -> BlockSchema:
    from cellimg_dask.schemas.describe import describe
    from cellimg_dask.schemas.description import is_description

    require("pydantic", "batch")
    if is_description(what):
        if env is not None:
            raise click.UsageError("--env is for a function, and a description is read as it is")
        return describe(what)
    if env is None:
        return describe(_here(what))
    from cellimg_dask.queues.environments import Env

    return describe(what, env=Env.venv(env))


def _here(what: str) -> str:
    """Let a module of the working folder be imported, as Python itself does it."""
    folder = str(Path.cwd())
    if not what.rpartition(":")[0].endswith(".py") and folder not in sys.path:
        sys.path.append(folder)
    return what


@contextmanager
def _telling() -> Iterator[None]:
    """Say what is wrong with a function, without a traceback."""
    try:
        yield
    except (
        AttributeError,
        ImportError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise click.ClickException(str(error)) from error


def _array_row(item: Array) -> tuple[str, ...]:
    from cellimg_dask.schemas.words import array_words

    content = item.to_dict()
    facts = [
        item.role or "",
        "" if item.halo is None else f"halo {_halo_words(item.halo)}",
        "may be left out" if item.optional else "",
        "any number" if item.variadic else "",
    ]
    text = ", ".join(filter(None, facts))
    return item.name, array_words(content).removeprefix("an "), text, item.description


def _halo_words(halo: Any) -> str:
    if isinstance(halo, int):
        return str(halo)
    widths = [str(a) if a == b else f"({a}, {b})" for a, b in halo]
    return f"({', '.join(widths)}{',' if len(widths) == 1 else ''})"


def _parameter_row(name: str, schema: Mapping[str, Any], required: bool) -> tuple[str, ...]:
    from cellimg_dask.schemas.words import value_words, words

    comment = schema.get("$comment", "")
    if required:
        default = "required"
    elif "default" in schema:
        default = f"default {value_words(schema['default'])}"
    elif comment.startswith("default: "):
        default, comment = comment.replace("default: ", "default ", 1), ""
    else:
        default = "optional"
    about = "; ".join(filter(None, [schema.get("description", ""), comment]))
    return name, words(schema), default, about


def _table(title: str, rows: list[tuple[str, ...]]) -> None:
    click.echo(f"\n{title}")
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        click.echo(f"  {'  '.join([*cells, row[3]])}".rstrip())
