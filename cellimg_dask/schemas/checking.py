"""Values held against JSON Schema, by pydantic."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.bare.arrays import Array
from cellimg_dask.schemas.words import value_words, words

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

__all__ = ["Checker", "unknown_name"]


class Checker:
    """Checks the parameters of one function, and makes of them what the function takes.

    Parameters
    ----------
    schema : mapping
        As `checked_parameters` returns it.
    annotations : mapping of str to types
        Of parameters about which the schema does not say all.

    Raises
    ------
    ImportError
        If pydantic is not installed.
    """

    def __init__(self, schema: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
        try:
            from pydantic import TypeAdapter
            from pydantic_core import SchemaValidator
        except ImportError as error:
            raise ImportError(
                "checking parameters needs pydantic: pip install 'cellimg-dask[batch]'"
            ) from error
        self._schema = schema
        properties = schema["properties"]
        self._validators = {name: SchemaValidator(_core(part)) for name, part in properties.items()}
        self._adapters = {name: TypeAdapter(annotation) for name, annotation in annotations.items()}
        more = schema["additionalProperties"]
        self._more = None if more is False else SchemaValidator(_core({} if more is True else more))

    def check(
        self, params: Mapping[str, Any], *, fill: bool
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the values as the function takes them, and what is wrong, by parameter.

        With ``fill``, parameters that are not given and have a default are there, too.
        """
        properties = self._schema["properties"]
        values: dict[str, Any] = {}
        mistakes: dict[str, str] = {}
        for name, value in params.items():
            if name in properties:
                self._one(name, properties[name], self._validators[name], value, values, mistakes)
            elif self._more is not None:
                more = self._schema["additionalProperties"]
                self._one(name, {} if more is True else more, self._more, value, values, mistakes)
            else:
                mistakes[name] = unknown_name(name, properties)
        for name, schema in properties.items():
            if name in params:
                continue
            if name in self._schema["required"]:
                about = schema.get("description", "")
                mistakes[name] = f"is missing: expected {words(schema)}" + (about and f" ({about})")
            elif fill and "default" in schema:
                self._one(name, schema, self._validators[name], schema["default"], values, mistakes)
        return values, mistakes

    def _one(
        self,
        name: str,
        schema: Mapping[str, Any],
        validator: Any,
        value: Any,
        values: dict[str, Any],
        mistakes: dict[str, str],
    ) -> None:
        from pydantic_core import ValidationError

        given = value if _takes_arrays(schema) else _without_numpy(value)
        try:
            checked = validator.validate_python(given)
            if name in self._adapters:
                checked = self._adapters[name].validate_python(checked)
            values[name] = checked
        except ValidationError as error:
            mistakes |= dict(_mistakes(name, schema, given, error.errors(include_url=False)))


def unknown_name(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return what is wrong with a parameter that a function does not have."""
    near = get_close_matches(name, list(known), 1)
    if near:
        return f"no such parameter; did you mean {near[0]}?"
    return f"no such parameter; there {'is' if len(known) == 1 else 'are'} " + (
        ", ".join(known) or "none"
    )


def _is_any(schema: Mapping[str, Any]) -> bool:
    return not {"type", "enum", "anyOf"} & schema.keys()


def _takes_arrays(schema: Mapping[str, Any]) -> bool:
    return (
        "x-array" in schema or _is_any(schema) or any(map(_takes_arrays, schema.get("anyOf", ())))
    )


def _without_numpy(value: Any) -> Any:
    """Return NumPy's scalars and small arrays as Python's numbers and lists, also inside lists."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist() if value.size <= 1000 else value
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy, value))
    if type(value) is dict:
        return {key: _without_numpy(part) for key, part in value.items()}
    return value


def _mistakes(
    name: str, schema: Mapping[str, Any], value: Any, errors: Sequence[Any]
) -> Iterator[tuple[str, str]]:
    """Yield what is wrong inside a parameter, down to where there are no alternatives."""
    for error in errors:
        where, inner, place = name, schema, value
        location = list(error["loc"])
        while location:
            below = _below(inner, place, location[0])
            if below is None:
                break
            step = location.pop(0)
            where += f"[{step}]" if isinstance(step, int) else f".{step}"
            inner, place = below
        if error["type"] == "missing" and len(location) == 1:
            part = inner.get("properties", {}).get(location[0], {})
            yield f"{where}.{location[0]}", f"is missing: expected {words(part)}"
        elif error["type"] == "extra_forbidden" and len(location) == 1:
            known = inner.get("properties", {})
            text = unknown_name(str(location[0]), known).replace("parameter", "entry")
            yield f"{where}.{location[0]}", text
        elif error["type"] in ("value_error", "assertion_error") and error["msg"][-2:] != ", ":
            text = error["msg"].partition(", ")[2]
            yield where, f"{text}; expected {words(inner)}, got {value_words(place)}"
        else:
            yield where, f"expected {words(inner)}, got {value_words(place)}"


def _below(schema: Mapping[str, Any], value: Any, step: Any) -> tuple[Any, Any] | None:
    """Return schema and value of a part, None if it is not that of a plain list or mapping."""
    try:
        inner = value[step]
    except (LookupError, TypeError):
        return None
    if schema.get("type") == "array" and "x-array" not in schema and isinstance(step, int):
        parts = schema.get("prefixItems", [])
        part = parts[step] if step < len(parts) else schema.get("items", {})
    elif schema.get("type") == "object":
        part = schema.get("properties", {}).get(step, schema.get("additionalProperties", {}))
    else:
        return None
    return (part, inner) if isinstance(part, Mapping) else None


def _core(schema: Mapping[str, Any]) -> CoreSchema:
    """Return what pydantic's core makes a validator of.

    It accepts what JSON Schema accepts, so strings are no numbers, and booleans neither.
    """
    from pydantic_core import core_schema as cs

    if _is_any(schema):
        return cs.any_schema()
    if "enum" in schema:
        return cs.no_info_plain_validator_function(_OneOf(schema["enum"]))
    if "anyOf" in schema:
        return cs.union_schema([_core(part) for part in schema["anyOf"]])
    kind = schema["type"]
    if kind == "null":
        return cs.none_schema()
    if kind == "boolean":
        return cs.bool_schema(strict=True)
    if kind == "number":
        bounds = {name: schema[word] for name, word in _BOUNDS.items() if word in schema}
        return cs.no_info_before_validator_function(
            _no_boolean, cs.float_schema(strict=True, **bounds)
        )
    if kind == "integer":
        bounds = {
            name: _ROUND[name](schema[word]) for name, word in _BOUNDS.items() if word in schema
        }
        return cs.no_info_before_validator_function(_whole, cs.int_schema(strict=True, **bounds))
    if kind == "string":
        text = cs.str_schema(
            min_length=schema.get("minLength"),
            max_length=schema.get("maxLength"),
            pattern=schema.get("pattern"),
            regex_engine="python-re",
            strict=True,
        )
        if schema.get("format") != "path":
            return text
        return cs.no_info_after_validator_function(
            Path, cs.no_info_before_validator_function(_path_text, text)
        )
    if kind == "object":
        return _object_core(schema)
    if "x-array" in schema:
        array = Array.from_dict(schema["x-array"])
        return cs.no_info_plain_validator_function(_ArrayOf(array))
    return _list_core(schema)


_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
}
_ROUND: dict[str, Callable[[float], int]] = {
    "ge": math.ceil,
    "gt": math.floor,
    "le": math.floor,
    "lt": math.ceil,
    "multiple_of": int,
}


def _list_core(schema: Mapping[str, Any]) -> CoreSchema:
    from pydantic_core import core_schema as cs

    counts = {"min_length": schema.get("minItems"), "max_length": schema.get("maxItems")}
    items = schema.get("items", {})
    parts = schema.get("prefixItems")
    core: CoreSchema
    if parts is None:
        core = cs.list_schema(_core(items), **counts)
        if schema.get("x-tuple"):
            core = cs.no_info_after_validator_function(tuple, core)
    else:
        every = [_core(part) for part in parts]
        if items is False:
            core = cs.tuple_schema(every, **counts)
        else:
            every.append(_core(items))
            core = cs.tuple_schema(every, variadic_item_index=len(parts), **counts)
    core = cs.no_info_before_validator_function(_list_or_tuple, core)
    if schema.get("uniqueItems"):
        core = cs.no_info_after_validator_function(_different, core)
    return core


def _object_core(schema: Mapping[str, Any]) -> CoreSchema:
    from pydantic_core import core_schema as cs

    required = schema.get("required", [])
    fields = {
        name: cs.typed_dict_field(_core(part), required=name in required)
        for name, part in schema.get("properties", {}).items()
    }
    more = schema.get("additionalProperties", True)
    extra: Any = {"extra_behavior": "forbid"}
    if more is not False:
        extra = {"extra_behavior": "allow"}
        if more is not True:
            extra["extras_schema"] = _core(more)
    return cs.no_info_before_validator_function(_named, cs.typed_dict_schema(fields, **extra))


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return _no_boolean(value)


def _path_text(value: Any) -> Any:
    return str(value) if isinstance(value, PurePath) else value


def _list_or_tuple(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError
    return value


def _named(value: Any) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError
    return value


def _different(value: Any) -> Any:
    if any(_same(a, b) for number, a in enumerate(value) for b in value[:number]):
        raise ValueError
    return value


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one in JSON, where true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(np.all(a == b))


class _OneOf:
    """Takes one of some values."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = values

    def __call__(self, value: Any) -> Any:
        if value is None or isinstance(value, (str, int, float)):
            for known in self._values:
                if _same(known, value):
                    return known
        raise ValueError


class _ArrayOf:
    """Takes arrays, or lists of numbers, of which values stay the same."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def __call__(self, value: Any) -> NDArray[Any]:
        if not hasattr(value, "__array__") and not isinstance(value, (list, tuple, int, float)):
            raise ValueError
        given = np.asarray(value)
        axes = self._array.axes
        if given.dtype.kind not in "biufc" or (axes is not None and given.ndim != len(axes)):
            raise ValueError
        if self._array.accepts(given.dtype):
            return given
        for name in self._array.dtype:
            kind = np.dtype(_OF_KIND.get(name, name))
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = given.astype(kind)
            # Only the precision of floats may be lost.
            if np.can_cast(given.dtype, kind, "same_kind") or np.array_equal(made, given):
                return made
        raise ValueError


_OF_KIND = {
    "number": "float64",
    "integer": "int64",
    "signedinteger": "int64",
    "unsignedinteger": "uint64",
    "inexact": "float64",
    "floating": "float64",
    "complexfloating": "complex128",
}
"""What an array becomes that is of none of these kinds."""
