"""Descriptions of block functions in files, JSON or YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cellimg_dask.bare.arrays import Array
from cellimg_dask.bare.naming import is_file_name, split_name
from cellimg_dask.blocks.named import NamedFunction
from cellimg_dask.schemas.block_schema import BlockSchema

__all__ = ["is_description", "read_description"]

_WORDS = ("name", "description", "function", "inputs", "outputs", "parameters")
_SUFFIXES = (".yaml", ".yml", ".json")


def is_description(name: str) -> bool:
    """Whether a name is that of a file with a description."""
    return name.lower().endswith(_SUFFIXES)


def read_description(path: Path) -> BlockSchema:
    """Return what a file describes.

    Parameters
    ----------
    path : Path
        A JSON or YAML file with ``function`` (``module:function``, or ``file.py:function`` as seen
        from the file's folder), ``inputs`` and where needed ``outputs``, ``parameters``, ``name``
        and ``description``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TypeError, ValueError
        If it is no description; the message says where it is wrong.
    ImportError
        If it is YAML, and PyYAML is not installed.
    """
    content = _parsed(path)
    try:
        return _schema(content, path.absolute().parent)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None


def _parsed(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "descriptions in YAML need PyYAML: pip install 'cellimg-dask[batch]', or write JSON"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None


def _schema(content: Any, folder: Path) -> BlockSchema:
    if not isinstance(content, Mapping):
        raise TypeError("a description has entries such as function: module:function")
    for word in content:
        if word not in _WORDS:
            if word in ("stages", "target"):
                raise ValueError(f"{word!r} belongs to a spec, and this is to be a description")
            near = get_close_matches(str(word), _WORDS, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_WORDS)}"
            raise ValueError(f"there is no entry {word!r}{hint}")
    for word in ("name", "description", "function"):
        if not isinstance(content.get(word, ""), str):
            raise TypeError(f"{word} must be text, got {content[word]!r}")
    for word in ("function", "inputs"):
        if word not in content:
            raise ValueError(f"{word} is missing")
    place, attribute = split_name(content["function"])
    if is_file_name(place):
        place = str(folder / Path(place).expanduser())
    named = NamedFunction(f"{place}:{attribute}")
    return BlockSchema(
        name=content.get("name", attribute),
        function=named,
        reference=named.name,
        inputs=_arrays(content["inputs"], "inputs"),
        outputs=_arrays(content.get("outputs", []), "outputs"),
        document=content.get("parameters", {}),
        description=" ".join(content.get("description", "").split()),
    )


def _arrays(content: Any, word: str) -> tuple[Array, ...]:
    if not isinstance(content, list):
        raise TypeError(f"{word} must be a list of arrays such as {{name: image}}, got {content!r}")
    found = []
    for number, item in enumerate(content):
        place = f"{word}[{number}]"
        if isinstance(item, str):
            item = {"name": item}
        if not isinstance(item, Mapping):
            raise TypeError(f"{place} must be an array such as {{name: image}}, got {item!r}")
        try:
            found.append(Array.from_dict(item))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{place}: {error}") from None
    return tuple(found)
