"""From what a signature says to a schema."""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cellimg_dask.bare.arrays import Array
from cellimg_dask.schemas.block_schema import BlockSchema
from cellimg_dask.schemas.checking import Checker
from cellimg_dask.schemas.dialect import DIALECT
from cellimg_dask.schemas.docstring import DocEntry, parsed_docstring

__all__ = ["schema_from_signature"]

_POSITIONAL = ("positional_only", "positional_or_keyword")


def schema_from_signature(
    said: Mapping[str, Any],
    function: Callable[..., Any],
    reference: str,
    *,
    types_of: Callable[..., Any] | None = None,
    inputs: int | None = None,
    before: int = 0,
    strict: bool = True,
) -> BlockSchema:
    """Return the schema of a function.

    Parameters
    ----------
    said : mapping
        What `cellimg_dask.bare.describe.describe` returns, in this Python or another.
    function : callable
        What the schema calls.
    reference : str
        What the schema calls the function.
    types_of : callable, optional
        The function itself, if it is here.
    inputs : int, optional
        How many parameters are arrays; default: what annotations and docstring say.
    before : int
        How many parameters come before these.
    strict : bool
        Whether a parameter of a type that JSON cannot say is an error; else it is not checked.

    Raises
    ------
    TypeError
        If JSON cannot say what the function takes.
    """
    name = said["name"].rpartition("<locals>.")[2]
    summary, documented, results = parsed_docstring(said["doc"])
    arrays: list[Array] = []
    properties: dict[str, Any] = {}
    required: list[str] = []
    more: Any = False
    open_ = True
    for number, entry in enumerate(said["parameters"][before:]):
        own, kind = entry["name"], entry["kind"]
        doc = documented.get(own, DocEntry("", ""))
        if own == "task" and kind != "positional_only":
            continue
        if kind == "var_keyword":
            more = _sayable(entry, name, strict=False) or True
            continue
        if kind == "var_positional":
            if open_:
                arrays.append(_input(entry, doc, variadic=True))
            continue
        if inputs is not None:
            is_input = number < inputs and kind in _POSITIONAL
        else:
            is_input = open_ and _is_input(entry, doc)
        if is_input:
            arrays.append(_input(entry, doc))
            continue
        open_ = False
        if kind == "positional_only":
            if "default" not in entry:
                raise TypeError(
                    f"{name} takes {own} by its place only and it is no array, so nobody can give "
                    f"it a value: take the / away"
                )
            continue
        schema = _sayable(entry, name, strict=strict)
        schema = _with_default(schema, entry)
        if doc.text and "description" not in schema:
            schema["description"] = doc.text
        if entry["unsaid"]:
            schema["$comment"] = "; ".join(
                filter(None, [schema.get("$comment"), f"checked by {', '.join(entry['unsaid'])}"])
            )
        properties[own] = schema
        if "default" not in entry:
            required.append(own)
    unsaid = [entry["name"] for entry in said["parameters"] if entry["unsaid"]]
    annotations = _annotations_of(types_of, unsaid) if unsaid else {}
    return BlockSchema(
        name=name,
        function=function,
        reference=reference,
        inputs=tuple(arrays),
        outputs=_outputs(said["returns"], results),
        document={
            "$schema": DIALECT,
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": more,
        },
        description=summary,
        annotations=annotations,
    )


def _is_input(entry: Mapping[str, Any], doc: DocEntry) -> bool:
    """Whether a parameter is one of the arrays that a block function is given first."""
    if entry["kind"] not in _POSITIONAL:
        return False
    array, _ = _array_of(entry["schema"])
    if "default" in entry:
        # Many functions have kernels and the like as parameters; an input says that it is one.
        return array is not None and bool(array.keys() - {"dtype"})
    if array is not None:
        return True
    return not entry["annotated"] and doc.is_array


def _array_of(schema: Mapping[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """Return what is said of an array, and whether None may stand in its place."""
    if "x-array" in schema:
        return dict(schema["x-array"]), False
    parts = schema.get("anyOf", [])
    arrays = [part["x-array"] for part in parts if "x-array" in part]
    others = [part for part in parts if "x-array" not in part]
    if not arrays or any(part != {"type": "null"} for part in others):
        return None, False
    merged = dict(arrays[0])
    names: list[str] = []
    for array in arrays:
        dtype = array.get("dtype", [])
        names += [dtype] if isinstance(dtype, str) else dtype
    if all("dtype" in array for array in arrays):
        merged["dtype"] = names
    else:
        merged.pop("dtype", None)
    return merged, bool(others)


def _input(entry: Mapping[str, Any], doc: DocEntry, *, variadic: bool = False) -> Array:
    content, _ = _array_of(entry["schema"])
    array = Array.from_dict(content or {})
    return replace(
        array,
        name=array.name or entry["name"],
        variadic=variadic,
        optional="default" in entry,
        description=array.description or doc.text,
    )


def _outputs(
    returns: Sequence[Mapping[str, Any]], results: Sequence[DocEntry]
) -> tuple[Array, ...]:
    found = [_array_of(schema)[0] for schema in returns]
    if not found or any(content is None for content in found):
        return ()
    arrays = []
    for number, content in enumerate(found):
        array = Array.from_dict(content or {})
        doc = results[number].text if len(results) == len(found) else ""
        name = array.name or ("result" if len(found) == 1 else f"result-{number}")
        arrays.append(replace(array, name=name, description=array.description or doc))
    return tuple(arrays)


def _sayable(entry: Mapping[str, Any], name: str, *, strict: bool) -> dict[str, Any]:
    """Return the schema of a parameter."""
    schema = dict(entry["schema"])
    array, or_none = _array_of(schema)
    if array is not None:
        whole = {"type": "array", "x-array": {k: v for k, v in array.items() if k != "name"}}
        return {"anyOf": [whole, {"type": "null"}]} if or_none else whole
    unsayable = _unsayable(schema)
    if unsayable is None:
        return schema
    if strict:
        raise TypeError(
            f"{name}: parameter {entry['name']} is of type {unsayable}, which JSON cannot say; "
            f"allowed are numbers, strings, booleans, None, Literal, Path, lists, tuples, mappings "
            f"with strings as keys, and arrays"
        )
    return {"$comment": unsayable}


def _unsayable(schema: Any) -> str | None:
    """Return a type that JSON Schema has no word for, if there is one."""
    if isinstance(schema, Mapping):
        if isinstance(schema.get("x-python"), str):
            return str(schema["x-python"])
        parts = [part for key, part in schema.items() if key not in ("enum", "x-array")]
    else:
        parts = schema if isinstance(schema, list) else []
    return next(filter(None, map(_unsayable, parts)), None)


def _with_default(schema: dict[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema with the default, if the function would be given the same by JSON."""
    if "default" not in entry:
        return schema
    text = entry["default"]
    if "value" in entry:
        value = entry["value"]
        if value is None and schema and "enum" not in schema and not _takes_none(schema):
            # What many write instead of Optional.
            notes = {key: schema[key] for key in schema if key in ("description", "title")}
            bare = {key: schema[key] for key in schema if key not in notes}
            parts = bare.get("anyOf", [bare])
            schema = {"anyOf": [*parts, {"type": "null"}], **notes}
        if _is_exact(schema, value, text):
            return {**schema, "default": value}
    return {**schema, "$comment": f"default: {text}"}


def _takes_none(schema: Mapping[str, Any]) -> bool:
    kinds = {"type", "anyOf"} & schema.keys()
    return (
        not kinds or schema.get("type") == "null" or any(map(_takes_none, schema.get("anyOf", ())))
    )


def _is_exact(schema: Mapping[str, Any], value: Any, text: str) -> bool:
    document = {"properties": {"_": schema}, "required": [], "additionalProperties": False}
    values, mistakes = Checker(document, {}).check({"_": value}, fill=False)
    if mistakes:
        return False
    try:
        # Not of an array, which equals nothing else.
        return bool(ast.literal_eval(text) == values["_"])
    except (ValueError, SyntaxError):
        return False


def _annotations_of(function: Callable[..., Any] | None, names: Sequence[str]) -> dict[str, Any]:
    """Return the types of parameters, as far as they are known in this Python."""
    if function is None:
        return {}
    try:
        hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except Exception:
        # What the schema says of them is checked.
        return {}
    return {name: hints[name] for name in names if name in hints}
