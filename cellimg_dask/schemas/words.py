"""JSON Schema in words: what a parameter has to be, for messages and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["array_words", "value_words", "words"]

_NAMES = {
    "integer": ("an integer", "integers"),
    "number": ("a number", "numbers"),
    "string": ("a string", "strings"),
    "boolean": ("a boolean", "booleans"),
    "null": ("None", "None"),
}


def words(schema: Mapping[str, Any], *, many: bool = False) -> str:
    """Return what is expected, for instance ``"a number above 0"``.

    Parameters
    ----------
    schema : mapping
        As `checked_schema` lets through.
    many : bool
        Whether several are meant: ``"numbers above 0"``.
    """
    if "enum" in schema:
        values = [value_words(value) for value in schema["enum"]]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if "anyOf" in schema:
        return " or ".join(words(part, many=many) for part in schema["anyOf"])
    kind = schema.get("type")
    if "x-array" in schema:
        return array_words(schema["x-array"], many=many)
    if kind == "array":
        return _list_words(schema, many)
    if kind == "object":
        return _object_words(schema, many)
    if kind == "string" and schema.get("format") == "path":
        return "paths" if many else "a path"
    if kind is None:
        return "anything"
    return _NAMES[kind][many] + _bounds(schema)


def value_words(value: Any) -> str:
    """Return a value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def array_words(content: Mapping[str, Any], *, many: bool = False) -> str:
    """Return what is expected of an array."""
    dtype = content.get("dtype", [])
    names = [dtype] if isinstance(dtype, str) else dtype
    axes = content.get("axes")
    text = "arrays" if many else "an array"
    text += f" of {' or '.join(names)}" if names else ""
    if axes is not None:
        text += f" with axes {axes if isinstance(axes, str) else ', '.join(axes)}"
    return text


def _list_words(schema: Mapping[str, Any], many: bool) -> str:
    text = "lists" if many else "a list"
    parts = schema.get("prefixItems")
    if parts is not None:
        same = all(part == parts[0] for part in parts)
        if same and schema.get("items") is False:
            return f"{text} of {len(parts)} {words(parts[0], many=len(parts) != 1)}"
        rest = schema.get("items")
        inner = ", ".join(map(words, parts)) + ("" if rest is False else ", …")
        return f"{text} of {inner}"
    low, high = schema.get("minItems"), schema.get("maxItems")
    count = ""
    if low is not None and low == high:
        count = f"{low} "
    elif low is not None or high is not None:
        count = " to ".join(
            [f"at least {low}"] * (low is not None and high is None)
            + [f"at most {high}"] * (high is not None and low is None)
            + [f"{low}", f"{high}"] * (low is not None and high is not None)
        )
        count += " "
    items = schema.get("items")
    inner = "values" if items in (None, True, {}) else words(items, many=True)
    return f"{text} of {count}{'different ' if schema.get('uniqueItems') else ''}{inner}"


def _object_words(schema: Mapping[str, Any], many: bool) -> str:
    text = "mappings" if many else "a mapping"
    names = schema.get("properties", {})
    values = schema.get("additionalProperties", True)
    if names:
        return f"{text} with {', '.join(names)}"
    if isinstance(values, Mapping) and values:
        return f"{text} of names to {words(values, many=True)}"
    return text


def _bounds(schema: Mapping[str, Any]) -> str:
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        parts = [f"from {_number(low)} to {_number(high)}"]
        low = high = None
    else:
        parts = []
    parts += [
        f"{word} {_number(bound)}"
        for word, bound in (
            ("above", above),
            ("of at least", low),
            ("below", below),
            ("of at most", high),
        )
        if bound is not None
    ]
    if "multipleOf" in schema:
        parts.append(f"that is a multiple of {_number(schema['multipleOf'])}")
    shortest, longest = schema.get("minLength"), schema.get("maxLength")
    if shortest is not None:
        parts.append(f"of at least {shortest} characters")
    if longest is not None:
        parts.append(f"of at most {longest} characters")
    if "pattern" in schema:
        parts.append(f"that matches {schema['pattern']}")
    return f" {' and '.join(parts)}" if parts else ""


def _number(value: float) -> str:
    return json.dumps(value)
