"""The part of JSON Schema 2020-12 in which parameters are described.

It is checked when it is read: a word that nobody would look at is refused and not passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from cellimg_dask.bare.arrays import Array

__all__ = ["DIALECT", "checked_parameters", "checked_schema"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
"""What ``$schema`` says."""

_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
_NOTES = ("title", "description", "default", "examples", "deprecated", "$comment")
_OF_TYPE: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": (
        *("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
        *("x-array", "x-tuple"),
    ),
    "object": ("properties", "required", "additionalProperties"),
}
_ELSEWHERE = {
    "oneOf": "write anyOf",
    "allOf": "write one schema",
    "not": "say what is allowed",
    "patternProperties": "use additionalProperties",
    "definitions": "write $defs",
}


def checked_parameters(content: Any, place: str = "parameters") -> dict[str, Any]:
    """Return the JSON Schema of parameters in one form, with ``$schema`` first.

    Parameters
    ----------
    content : object
        An object's schema: ``properties``, and where needed ``required``,
        ``additionalProperties`` (if it is not there: false) and ``$defs``, which are put where
        they are referred to.
    place : str
        How messages call it.

    Raises
    ------
    TypeError, ValueError
        If it is no such schema, or has words that are not known here.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"{place} must be a JSON Schema, got {type(content).__name__}")
    given = content.get("$schema", DIALECT)
    if not isinstance(given, str) or given.rstrip("#") != DIALECT:
        raise ValueError(f"{place}.$schema must be {DIALECT}, got {given!r}")
    words = {"$schema", "$id", "$defs", "type", "properties", "required", "additionalProperties"}
    _known_words(content, words | set(_NOTES), place, hint="parameters stand in properties")
    if content.get("type", "object") != "object":
        raise ValueError(f"{place}.type must be 'object', got {content['type']!r}")
    definitions = content.get("$defs", {})
    if not isinstance(definitions, Mapping):
        raise TypeError(f"{place}.$defs must be a mapping, got {definitions!r}")
    more = content.get("additionalProperties", False)
    schema = _object(content, place, definitions, ())
    return {
        "$schema": DIALECT,
        "type": "object",
        "properties": schema.get("properties", {}),
        "required": schema.get("required", []),
        "additionalProperties": schema.get("additionalProperties", more),
    }


def checked_schema(
    content: Any,
    place: str,
    definitions: Mapping[str, Any] | None = None,
    open_refs: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return a schema without references, all of whose words are known.

    Raises
    ------
    TypeError, ValueError
        With the place in it that is wrong.
    """
    definitions = definitions or {}
    if content is True:
        return {}
    if not isinstance(content, Mapping):
        raise TypeError(f"{place} must be a schema such as {{type: number}}, got {content!r}")
    if "$ref" in content:
        return _referred(content, place, definitions, open_refs)
    notes = {word: content[word] for word in content if word in _NOTES}
    for word in ("title", "description", "$comment"):
        if not isinstance(notes.get(word, ""), str):
            raise TypeError(f"{place}.{word} must be text, got {notes[word]!r}")
    for word in ("enum", "const", "anyOf"):
        if word in content:
            allowed = {word, *_NOTES} | ({"type"} if word != "anyOf" else set())
            _known_words(content, allowed, place)
            if "type" in content:
                _types(content["type"], place)
            return {**_choice(word, content[word], place, definitions, open_refs), **notes}
    if "type" not in content:
        _known_words(content, set(_NOTES), place, hint="say its type")
        return notes
    kinds = _types(content["type"], place)
    known = {"type", *_NOTES, *(word for kind in kinds for word in _OF_TYPE.get(kind, ()))}
    _known_words(content, known, place)
    if len(kinds) > 1:
        # As alternatives, each with the words that are for it.
        parts = [
            checked_schema(
                {
                    "type": kind,
                    **{word: content[word] for word in _OF_TYPE.get(kind, ()) if word in content},
                },
                place,
                definitions,
                open_refs,
            )
            for kind in kinds
        ]
        return {"anyOf": parts, **notes}
    (kind,) = kinds
    schema: dict[str, Any] = {"type": kind}
    if kind in ("integer", "number"):
        schema |= {word: _bound(content, word, place) for word in _OF_TYPE[kind] if word in content}
        if kind == "integer" and schema.get("multipleOf", 1) % 1:
            raise ValueError(f"{place}.multipleOf must be an integer, got {schema['multipleOf']}")
    elif kind == "string":
        schema |= _string(content, place)
    elif kind == "array":
        schema |= _list(content, place, definitions, open_refs)
    elif kind == "object":
        schema |= _object(content, place, definitions, open_refs)
    return schema | notes


def _referred(
    content: Mapping[str, Any], place: str, definitions: Mapping[str, Any], above: tuple[str, ...]
) -> dict[str, Any]:
    _known_words(content, {"$ref", *_NOTES}, place)
    reference = content["$ref"]
    name = reference.removeprefix("#/$defs/") if isinstance(reference, str) else ""
    if name == reference or name not in definitions:
        raise ValueError(f"{place}.$ref is {reference!r}; it must be #/$defs/NAME, which is there")
    if name in above:
        raise ValueError(f"{place}.$ref leads back to {name}; a schema in itself is not known here")
    found = checked_schema(definitions[name], f"$defs.{name}", definitions, (*above, name))
    return found | {word: content[word] for word in content if word in _NOTES}


def _known_words(content: Mapping[Any, Any], known: set[str], place: str, hint: str = "") -> None:
    for word in content:
        if word in known:
            continue
        text = f"{place} has {word!r}, which "
        every = {"type", *(w for ws in _OF_TYPE.values() for w in ws), "enum", "const", "anyOf"}
        if word in _ELSEWHERE:
            text += f"is not known here: {_ELSEWHERE[word]}"
        elif word in every:
            text += f"says nothing beside {', '.join(map(str, content))}"
            text = text.replace(f", {word}", "") + (f"; {hint}" if hint else "")
        else:
            near = get_close_matches(str(word), sorted(known | every), 1)
            text += "is not known here"
            text += f"; did you mean {near[0]}?" if near else f"; {hint}" if hint else ""
        raise ValueError(text)


def _types(given: Any, place: str) -> list[str]:
    kinds = given if isinstance(given, list) else [given]
    for kind in kinds:
        if kind not in _TYPES:
            near = get_close_matches(str(kind), _TYPES, 1, 0.4)
            raise ValueError(
                f"{place}.type must be one of {', '.join(_TYPES)}, got {kind!r}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
    if not kinds:
        raise ValueError(f"{place}.type is empty")
    return kinds


def _choice(
    word: str, value: Any, place: str, definitions: Mapping[str, Any], above: tuple[str, ...]
) -> dict[str, Any]:
    if word == "const":
        _simple_value(value, f"{place}.const")
        return {"enum": [value]}
    if not isinstance(value, list) or not value:
        raise TypeError(f"{place}.{word} must be a list that is not empty, got {value!r}")
    if word == "enum":
        for item in value:
            _simple_value(item, f"{place}.enum")
        return {"enum": list(value)}
    parts = [
        checked_schema(part, f"{place}.anyOf[{number}]", definitions, above)
        for number, part in enumerate(value)
    ]
    return {"anyOf": parts} if len(parts) > 1 else parts[0]


def _simple_value(value: Any, place: str) -> None:
    if not (value is None or isinstance(value, (str, bool, int))) and not (
        isinstance(value, float) and math.isfinite(value)
    ):
        raise TypeError(f"{place} has {value!r}; give strings, numbers, booleans or null")


def _bound(content: Mapping[str, Any], word: str, place: str) -> float | int:
    value = content[word]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{place}.{word} must be a number, got {value!r}")
    if word == "multipleOf" and value <= 0:
        raise ValueError(f"{place}.multipleOf must be above 0, got {value!r}")
    return value


def _count(content: Mapping[str, Any], word: str, place: str) -> int:
    value = content[word]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{place}.{word} must be an integer of at least 0, got {value!r}")
    return value


def _string(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    schema: dict[str, Any] = {
        word: _count(content, word, place) for word in ("minLength", "maxLength") if word in content
    }
    if "pattern" in content:
        try:
            re.compile(content["pattern"])
        except (re.error, TypeError) as error:
            raise ValueError(f"{place}.pattern is no regular expression: {error}") from None
        schema["pattern"] = content["pattern"]
    if "format" in content:
        if content["format"] != "path":
            raise ValueError(
                f"{place}.format {content['format']!r} is not known here; there is path, and "
                f"pattern for all else"
            )
        schema["format"] = "path"
    return schema


def _list(
    content: Mapping[str, Any], place: str, definitions: Mapping[str, Any], above: tuple[str, ...]
) -> dict[str, Any]:
    if "x-array" in content:
        others = {"type", "x-array", *_NOTES}
        _known_words(content, others, place)
        try:
            array = Array.from_dict(content["x-array"])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{place}.x-array: {error}") from None
        return {"x-array": array.to_dict()}
    schema: dict[str, Any] = {}
    if "prefixItems" in content:
        parts = content["prefixItems"]
        if not isinstance(parts, list) or not parts:
            raise TypeError(f"{place}.prefixItems must be a list of schemas, got {parts!r}")
        schema["prefixItems"] = [
            checked_schema(part, f"{place}.prefixItems[{number}]", definitions, above)
            for number, part in enumerate(parts)
        ]
    if "items" in content:
        items = content["items"]
        if items is not False:
            items = checked_schema(items, f"{place}.items", definitions, above)
        if items != {}:
            schema["items"] = items
    schema |= {
        word: _count(content, word, place) for word in ("minItems", "maxItems") if word in content
    }
    if len(schema.get("prefixItems", ())) > schema.get("minItems", 0):
        raise ValueError(
            f"{place} needs minItems: {len(schema['prefixItems'])} beside prefixItems, since "
            f"all of these have to be given"
        )
    if schema.get("items") is False and "prefixItems" not in schema:
        raise ValueError(f"{place}.items is false without prefixItems; write maxItems: 0")
    for word in ("uniqueItems", "x-tuple"):
        if not isinstance(content.get(word, False), bool):
            raise TypeError(f"{place}.{word} must be true or false, got {content[word]!r}")
        if content.get(word):
            schema[word] = True
    return schema


def _object(
    content: Mapping[str, Any], place: str, definitions: Mapping[str, Any], above: tuple[str, ...]
) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    inside = place if place != "parameters" else "parameters.properties"
    properties = content.get("properties", {})
    if not isinstance(properties, Mapping):
        raise TypeError(f"{place}.properties must be a mapping, got {properties!r}")
    for name in properties:
        if not isinstance(name, str):
            raise TypeError(f"{place}.properties has {name!r}; names are strings")
    if properties:
        schema["properties"] = {
            name: checked_schema(part, f"{inside}.{name}", definitions, above)
            for name, part in properties.items()
        }
    required = content.get("required", [])
    if not isinstance(required, list):
        raise TypeError(f"{place}.required must be a list of names, got {required!r}")
    for name in required:
        if name not in properties:
            near = get_close_matches(str(name), list(properties), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{place}.required has {name!r}, which is not in properties{hint}")
    if required:
        schema["required"] = list(dict.fromkeys(required))
    more = content.get("additionalProperties", True)
    if more is not True and more is not False:
        more = checked_schema(more, f"{place}.additionalProperties", definitions, above) or True
    if "additionalProperties" in content:
        schema["additionalProperties"] = more
    return schema
