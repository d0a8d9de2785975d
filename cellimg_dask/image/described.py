"""What a function says of itself, held against what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cellimg_dask.bare.arrays import Array
from cellimg_dask.blocks.errors import ParameterError
from cellimg_dask.blocks.wrappers import function_name
from cellimg_dask.geometry import HaloLike
from cellimg_dask.image.input import Input
from cellimg_dask.schemas.block_schema import BlockSchema
from cellimg_dask.schemas.checking import unknown_name

__all__ = ["Call", "checked_call"]


@dataclass(frozen=True)
class Call:
    """How a function is called, checked."""

    function: Any
    """The function itself, of a schema."""
    items: list[Input]
    """With the halos that a schema says, where they have none."""
    params: Mapping[str, Any] | None
    """As the function takes them."""
    halo: HaloLike | None
    """As given, else the schema's, if it has one."""
    dtype: DTypeLike | None
    """As given, else the schema's, if it has one."""


def checked_call(
    f: Any,
    items: Iterable[Input],
    params: Mapping[str, Any] | None,
    *,
    halo: HaloLike | None = None,
    dtype: DTypeLike | None = None,
    dtype_read: DTypeLike | None = None,
    of_block: bool = False,
    before: int = 0,
) -> Call:
    """Return how a function is called, with what its schema says where nothing was given.

    Parameters
    ----------
    f : callable or BlockSchema
        What the user gave.
    items : iterable of Input
        Its arrays.
    params : mapping, optional
        Its keyword parameters.
    halo, dtype
        As given; None where they were not.
    dtype_read : dtype, optional
        What the arrays are made before the function is given them.
    of_block : bool
        Whether it is called with a `Block`, so that its own signature says nothing of arrays.
    before : int
        How many arguments come before the arrays.

    Raises
    ------
    ParameterError
        If a parameter is wrong, as far as schema or signature say.
    TypeError, ValueError
        If an array is not what the schema says.
    """
    items = list(items)
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(f"params must be a mapping of names, got {type(params).__name__}")
    if not isinstance(f, BlockSchema):
        if not of_block:
            _check_names(f, before + len(items), params or {})
        return Call(f, items, params, halo, dtype)
    arrays = _arrays_of(f, items)
    for number, (item, array) in enumerate(zip(items, arrays, strict=True)):
        _check_array(f"input {number} ({array.name}) of {f.name}", item, array, dtype_read)
    values = f.validate(params)
    if halo is None:
        halo = next((array.halo for array in arrays if array.halo is not None), None)
        # Others may have another halo; those that say nothing have the image's.
        items = [
            replace(item, halo=array.halo)
            if item.halo is None and array.halo not in (None, halo)
            else item
            for item, array in zip(items, arrays, strict=True)
        ]
    if dtype is None and len(f.outputs) == 1:
        dtype = f.outputs[0].concrete
    return Call(f.function, items, values, halo, dtype)


def _arrays_of(schema: BlockSchema, items: Sequence[Input]) -> list[Array]:
    """Return what the schema says of each input."""
    arrays = list(schema.inputs)
    if arrays and arrays[-1].variadic:
        last = arrays.pop()
        arrays += [last] * (len(items) - len(arrays))
    needed = [array for array in arrays if not array.optional and not array.variadic]
    if not len(needed) <= len(items) <= len(arrays):
        names = ", ".join(
            array.name + (" …" if array.variadic else " (optional)" if array.optional else "")
            for array in schema.inputs
        )
        raise TypeError(f"{schema.name} takes {names or 'no arrays'}; got {len(items)} inputs")
    return arrays[: len(items)]


def _check_array(what: str, item: Input, array: Array, dtype_read: DTypeLike | None) -> None:
    given = np.dtype(dtype_read or getattr(item.array.dtype, "numpy_dtype", item.array.dtype))
    if not array.accepts(given):
        names = " or ".join(array.dtype)
        raise TypeError(f"{what} is of dtype {given}, expected {names}; convert it first")
    if array.axes is not None and len(item.shape) != len(array.axes):
        axes = array.axes if isinstance(array.axes, str) else ", ".join(array.axes)
        raise ValueError(
            f"{what} has {len(item.shape)} axes (shape {item.shape}), expected "
            f"{len(array.axes)}: {axes}"
        )


def _check_names(f: Callable[..., Any], num_given: int, params: Mapping[str, Any]) -> None:
    """Refuse parameters that the function does not have, and missing ones."""
    for name in params:
        if not isinstance(name, str):
            raise TypeError(f"params must have strings as names, got {name!r}")
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        return
    positional = [
        one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    arrays = {one.name for one in positional[:num_given]}
    any_name = any(one.kind is one.VAR_KEYWORD for one in parameters)
    known = {
        one.name: one
        for one in parameters
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        and one.name not in arrays
        and (one.name != "task" or "task" in params)
    }
    mistakes = {}
    for name in params:
        if name in arrays and not any_name:
            mistakes[name] = "is an array that is given after the function, and no parameter"
        elif name not in known and not any_name:
            mistakes[name] = unknown_name(name, known)
    for name, one in known.items():
        if one.default is one.empty and name not in params:
            more = ", or one more array" if one in positional else ""
            mistakes[name] = f"is missing: give it in params{more}"
    if mistakes:
        raise ParameterError(function_name(f), mistakes)
