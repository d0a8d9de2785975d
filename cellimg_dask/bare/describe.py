"""What the signature of a function says, in JSON's types, for a program in another Python."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import traceback
import typing
from collections.abc import Callable
from typing import Any

import numpy as np

from .annotations import Names, is_plain, plain, schema_of

__all__ = ["answer", "describe"]


def describe(function: Callable[..., Any]) -> dict[str, Any]:
    """Return what the signature of a function says.

    Parameters
    ----------
    function : callable
        With a signature that Python can tell.

    Returns
    -------
    dict
        ``name``; ``place``, the module; ``doc``, the docstring or empty; ``parameters``, a list of
        ``{"name", "kind", "annotated", "schema", "unsaid"}`` and, where it has a default,
        ``default``: its text, and ``value``, if JSON has it; ``returns``, a list of schemas.

    Raises
    ------
    TypeError
        If Python cannot tell the signature.
    """
    signature, space = _signature(function)
    parameters = []
    for parameter in signature.parameters.values():
        names = Names(space)
        annotated = parameter.annotation is not parameter.empty
        entry = {
            "name": parameter.name,
            "kind": parameter.kind.name.lower(),
            "annotated": annotated,
            "schema": schema_of(parameter.annotation, names) if annotated else {},
            "unsaid": names.unsaid,
        }
        if parameter.default is not parameter.empty:
            entry["default"] = _text(parameter.default)
            value = plain(parameter.default)
            if is_plain(value):
                entry["value"] = value
        parameters.append(entry)
    inner = _innermost(function)
    name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return {
        "name": name,
        "place": getattr(inner, "__module__", None) or "",
        "doc": inspect.getdoc(inner) or "",
        "parameters": parameters,
        "returns": _returns(signature.return_annotation, Names(space)),
    }


def _signature(function: Any) -> tuple[inspect.Signature, dict[str, Any]]:
    """Return the signature, and the names that its annotations use."""
    more: dict[str, Any] = {}
    # Since Python 3.14 names in annotations are looked up late; what is not there stays text.
    form = getattr(inspect, "Format", None)
    if form is not None:
        more["annotation_format"] = form.FORWARDREF
    try:
        signature = inspect.signature(function, **more)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Python cannot tell the signature of {_text(function)} ({error}); describe it in a "
            f"file, or wrap it in a function"
        ) from None
    inner = inspect.unwrap(_innermost(function))
    if not hasattr(inner, "__globals__"):
        # A class, or an object that can be called.
        inner = vars(inner).get("__init__") if isinstance(inner, type) else type(inner).__call__
    inner = getattr(inner, "__func__", inner)
    return signature, getattr(inspect.unwrap(inner), "__globals__", {})


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _returns(annotation: Any, names: Names) -> list[dict[str, Any]]:
    if annotation is inspect.Signature.empty:
        return []
    if isinstance(annotation, str):
        try:
            annotation = names.evaluate(annotation)
        except Exception:
            return []
    if typing.get_origin(annotation) is tuple:
        parts = typing.get_args(annotation)
        return [schema_of(part, names) for part in parts if part is not Ellipsis and part != ()]
    return [schema_of(annotation, names)]


def _text(value: Any) -> str:
    try:
        # NumPy's scalars are written in two ways, and read as Python's anyhow.
        text = repr(value.item() if isinstance(value, np.generic) else value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:199]}…"


def answer(text: str) -> None:
    """Describe the function that JSON in ``text`` names, and write JSON to standard output.

    What else is printed, by Python or by libraries below it, goes to standard error.
    """
    out = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        from .functions import Functions

        content = {"described": describe(Functions().load(json.loads(text)))}
    except BaseException as error:
        content = {
            "failed": {
                "type": type(error).__name__,
                "kinds": [kind.__name__ for kind in type(error).__mro__],
                "message": str(error),
                "traceback": traceback.format_exc(),
            }
        }
    with os.fdopen(out, "w", encoding="utf-8") as file:
        json.dump(content, file)
