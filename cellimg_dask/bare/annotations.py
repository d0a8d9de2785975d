"""Annotations of Python as JSON Schema, as far as JSON can say what they mean.

Beyond the words of JSON Schema there are two of our own: ``x-array`` for a NumPy array, and
``x-tuple`` for a list that Python has as a tuple. What nobody can say in JSON is
``{"x-python": text}``.
"""

from __future__ import annotations

import ast
import collections.abc
import math
import numbers
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Array

__all__ = ["Names", "is_plain", "plain", "schema_of"]

_SCALARS: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
    ((bool, np.bool_), {"type": "boolean"}),
    ((int, np.integer, numbers.Integral, typing.SupportsIndex, typing.SupportsInt),
     {"type": "integer"}),
    ((float, np.floating, numbers.Real, numbers.Number, typing.SupportsFloat), {"type": "number"}),
    ((str,), {"type": "string"}),
    ((pathlib.PurePath, os.PathLike), {"type": "string", "format": "path"}),
)  # fmt: skip
_LISTS = (
    list,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_BOUNDS = {
    "gt": "exclusiveMinimum",
    "ge": "minimum",
    "lt": "exclusiveMaximum",
    "le": "maximum",
    "multiple_of": "multipleOf",
}
_LENGTHS = {"min_length": ("minLength", "minItems"), "max_length": ("maxLength", "maxItems")}
_CHECKS = ("func", "__get_pydantic_core_schema__", "__get_validators__", "strict", "predicate")
"""Attributes of what checks values in ways that JSON Schema has no word for."""


class _NDArray:
    """What ``NDArray`` is before NumPy 1.21."""

    scalar: Any = None

    def __class_getitem__(cls, scalar: Any) -> Any:
        return type("NDArray", (_NDArray,), {"scalar": scalar})


class Names:
    """What annotations refer to, and what was found in them that JSON Schema cannot say.

    Parameters
    ----------
    space : mapping
        The globals of the function.
    """

    def __init__(self, space: Mapping[str, Any]) -> None:
        self._space = space
        self.unsaid: list[str] = []
        """Checks that are not in the schema."""

    def evaluate(self, text: str) -> Any:
        """Return what text in an annotation stands for; raises whatever it raises."""
        tree = _Unions().visit(ast.parse(text.strip(), mode="eval"))
        # Names that are imported for type checkers only are most often these.
        known: dict[str, Any] = dict(vars(collections.abc))
        known.update({name: getattr(typing, name) for name in typing.__all__})
        known.update(np=np, numpy=np, typing=typing, Path=pathlib.Path, Array=Array)
        known.update(npt=npt, ArrayLike=npt.ArrayLike, NDArray=getattr(npt, "NDArray", _NDArray))
        known.update(self._space)
        known["__cellimg_union__"] = typing.Union
        code = compile(ast.fix_missing_locations(tree), "<annotation>", "eval")
        return eval(code, known)


class _Unions(ast.NodeTransformer):
    """Makes ``Union[a, b]`` of ``a | b``, which Python before 3.10 cannot evaluate."""

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        if not isinstance(node.op, ast.BitOr):
            return node
        both = ast.Tuple([node.left, node.right], ast.Load())
        return ast.Subscript(ast.Name("__cellimg_union__", ast.Load()), both, ast.Load())


def schema_of(annotation: Any, names: Names) -> dict[str, Any]:
    """Return the JSON Schema of an annotation.

    Parameters
    ----------
    annotation : object
        A type, text, or what `typing` makes.
    names : Names
        What text refers to.
    """
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        try:
            return schema_of(names.evaluate(annotation), names)
        except Exception:
            return {"x-python": annotation}
    if annotation is Any or annotation is object:
        return {}
    if annotation is None or annotation is type(None):
        return {"type": "null"}
    array = _array(annotation, names)
    if array is not None:
        return {"type": "array", "x-array": array.to_dict()}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    # An alias stands for something else; so do NumPy's own since 2.5.
    alias = getattr(origin or annotation, "__value__", None)
    if alias is not None:
        return schema_of(alias[arguments] if arguments else alias, names)
    if isinstance(annotation, typing.TypeVar):
        options = annotation.__constraints__ or (annotation.__bound__ or Any,)
        return _any_of([schema_of(option, names) for option in options])
    if hasattr(annotation, "__supertype__"):
        return schema_of(annotation.__supertype__, names)
    if hasattr(annotation, "__metadata__") and origin is not None:
        schema = schema_of(annotation.__origin__, names)
        for item in annotation.__metadata__:
            schema = _with(schema, item, names)
        return schema
    if origin is typing.Literal:
        values = [plain(value) for value in arguments]
        if any(isinstance(value, _Unsayable) for value in values):
            return {"x-python": repr(annotation)}
        return {"enum": values}
    if origin is typing.Union or origin is getattr(types, "UnionType", typing.Union):
        return _any_of([schema_of(option, names) for option in arguments])
    return _simple(annotation, origin or annotation, arguments, names)


def _simple(kind: Any, origin: Any, arguments: tuple[Any, ...], names: Names) -> dict[str, Any]:
    if isinstance(origin, type):
        for kinds, schema in _SCALARS:
            if origin in kinds or (issubclass(origin, kinds[:2]) and origin.__module__ == "numpy"):
                return dict(schema)
        if issubclass(origin, pathlib.PurePath):
            return {"type": "string", "format": "path"}
    if origin in _LISTS:
        return {"type": "array", **_items(arguments[:1], names)}
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return {"type": "array", **_items(arguments[:1], names), "x-tuple": True}
        if kind is tuple or kind is typing.Tuple:  # noqa: UP006
            return {"type": "array", "x-tuple": True}
        parts = [schema_of(part, names) for part in arguments if part != ()]
        if not parts:
            return {"type": "array", "maxItems": 0, "x-tuple": True}
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    if origin in _MAPPINGS and (not arguments or arguments[0] in (str, Any)):
        values = schema_of(arguments[1], names) if arguments else {}
        return {"type": "object", "additionalProperties": values or True}
    return {"x-python": getattr(kind, "__qualname__", None) if isinstance(kind, type) else
            repr(kind)}  # fmt: skip


def _items(arguments: tuple[Any, ...], names: Names) -> dict[str, Any]:
    items = schema_of(arguments[0], names) if arguments else {}
    return {"items": items} if items else {}


def _any_of(options: list[dict[str, Any]]) -> dict[str, Any]:
    flat: list[Any] = []
    for option in options:
        for part in option["anyOf"] if set(option) == {"anyOf"} else [option]:
            if part not in flat:
                flat.append(part)
    if {} in flat:
        return {}
    return flat[0] if len(flat) == 1 else {"anyOf": flat}


def _array(annotation: Any, names: Names) -> Array | None:
    """Return what is known of an array type, None if it is none."""
    if annotation is np.ndarray or annotation is npt.ArrayLike:
        return Array()
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    alias = getattr(origin, "__value__", None)
    if alias is not None and arguments:
        return _array(alias[arguments], names)
    if isinstance(annotation, type) and origin is None:
        if issubclass(annotation, _NDArray):
            return Array(dtype=_dtype_names([annotation.scalar], names))
        if issubclass(annotation, np.ndarray):
            return Array()
    if not (isinstance(origin, type) and issubclass(origin, np.ndarray)):
        return None
    scalars = [
        scalar
        for argument in arguments[1:]
        if typing.get_origin(argument) is np.dtype
        for scalar in typing.get_args(argument)
    ]
    return Array(dtype=_dtype_names(scalars, names))


def _dtype_names(scalars: Iterable[Any], names: Names) -> tuple[str, ...]:
    found: list[str] = []
    for scalar in scalars:
        if isinstance(scalar, (str, typing.ForwardRef)):
            try:
                scalar = names.evaluate(
                    scalar if isinstance(scalar, str) else scalar.__forward_arg__
                )
            except Exception:
                return ()
        origin = typing.get_origin(scalar)
        if isinstance(origin, type) and issubclass(origin, np.generic):
            inner, scalar = (), origin
        elif isinstance(scalar, typing.TypeVar):
            inner = scalar.__constraints__ or (scalar.__bound__ or Any,)
        else:
            inner = typing.get_args(scalar)
        try:
            inner_names = _dtype_names(inner, names) if inner else Array(dtype=scalar).dtype
        except (TypeError, ValueError):
            return ()
        if not inner_names:
            return ()
        found.extend(inner_names)
    return tuple(found)


def _with(schema: dict[str, Any], item: Any, names: Names) -> dict[str, Any]:
    """Return a schema with what an item beside the type says."""
    if isinstance(item, str):
        return schema if "description" in schema else {**schema, "description": item}
    if isinstance(item, Array) or (isinstance(item, Mapping) and _is_about_arrays(item)):
        more = item if isinstance(item, Array) else Array.from_dict(item)
        return _with_array(schema, more)
    if isinstance(getattr(item, "documentation", None), str):
        return {**schema, "description": item.documentation}
    if isinstance(getattr(item, "metadata", None), (list, tuple)):
        # A field of pydantic's.
        for part in item.metadata:
            schema = _with(schema, part, names)
        for word in ("title", "description"):
            if isinstance(getattr(item, word, None), str):
                schema = {**schema, word: getattr(item, word)}
        return schema
    said = False
    for name, word in _BOUNDS.items():
        bound = _number(getattr(item, name, None))
        if bound is not None:
            schema, done = _bounded(schema, word, bound, ("integer", "number"))
            said |= done
    for name, words in _LENGTHS.items():
        length = _number(getattr(item, name, None))
        for word, kinds in zip(words, (("string",), ("array",))):
            if length is not None:
                schema, done = _bounded(schema, word, length, kinds)
                said |= done
    pattern = getattr(item, "pattern", None)
    if isinstance(pattern, str):
        schema, done = _bounded(schema, "pattern", pattern, ("string",))
        said |= done
    checks = any(getattr(item, name, None) is not None for name in (*_CHECKS, *_BOUNDS, *_LENGTHS))
    if checks and not said:
        names.unsaid.append(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(item)))
    return schema


def _is_about_arrays(item: Mapping[str, Any]) -> bool:
    return bool(item) and set(item) <= set(Array.__dataclass_fields__)


def _with_array(schema: dict[str, Any], more: Array) -> dict[str, Any]:
    """Return the schema of an array about which more is said; other types may stand beside it."""
    if "anyOf" in schema:
        parts = [_with_array(part, more) if "x-array" in part else part for part in schema["anyOf"]]
        return {**schema, "anyOf": parts}
    given = schema.get("x-array", {})
    return {"type": "array", "x-array": {**given, **more.to_dict()}}


def _bounded(
    schema: dict[str, Any], word: str, value: Any, kinds: tuple[str, ...]
) -> tuple[dict[str, Any], bool]:
    if "anyOf" in schema:
        parts = [_bounded(part, word, value, kinds) for part in schema["anyOf"]]
        return {**schema, "anyOf": [part for part, _ in parts]}, any(done for _, done in parts)
    if schema.get("type") not in kinds or "x-array" in schema:
        return schema, False
    return {**schema, word: value}, True


def _number(value: Any) -> int | float | None:
    value = plain(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return None


class _Unsayable:
    """Stands for what JSON cannot say."""


def plain(value: Any) -> Any:
    """Return a value in JSON's types, or something that is none of them.

    NumPy's scalars and arrays become Python's, tuples lists.
    """
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else _Unsayable()
    if type(value) in (list, tuple):
        parts = [plain(part) for part in value]
        unsayable = [part for part in parts if isinstance(part, _Unsayable)]
        return unsayable[0] if unsayable else parts
    if type(value) is dict and all(type(key) is str for key in value):
        inner = {key: plain(part) for key, part in value.items()}
        unsayable = [part for part in inner.values() if isinstance(part, _Unsayable)]
        return unsayable[0] if unsayable else inner
    return _Unsayable()


def is_plain(value: Any) -> bool:
    """Whether `plain` gave something in JSON's types."""
    return not isinstance(value, _Unsayable)
