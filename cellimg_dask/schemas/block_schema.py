"""`BlockSchema`: what a block function takes and gives."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cellimg_dask.bare.arrays import Array
from cellimg_dask.blocks.errors import ParameterError
from cellimg_dask.schemas.checking import Checker
from cellimg_dask.schemas.dialect import checked_parameters

__all__ = ["BlockSchema"]


@dataclass(frozen=True)
class BlockSchema:
    """What a block function takes and gives: its arrays, and its parameters as JSON Schema.

    Made by `describe`. It is called like the function, after its parameters were checked, and
    stands for it in `map_cells` and the like.

    Raises
    ------
    TypeError, ValueError
        If a part is wrong.

    Notes
    -----
    Never changes; equal if the documents are. What `parameters` and `to_dict` return are copies.

    Examples
    --------
    >>> import numpy as np
    >>> from numpy.typing import NDArray
    >>> def above(image: NDArray[np.uint16], threshold: float = 100) -> NDArray[np.bool_]:
    ...     return image > threshold
    >>> from cellimg_dask.schemas.describe import describe
    >>> schema = describe(above)
    >>> schema.inputs[0].dtype, schema.outputs[0].dtype
    (('uint16',), ('bool',))
    >>> schema.parameters["properties"]["threshold"]
    {'type': 'number', 'default': 100}
    >>> schema.validate({"threshold": 20})
    {'threshold': 20.0}
    """

    name: str
    """How messages call the function."""
    function: Callable[..., Any] = field(compare=False)
    """What is called with the arrays and the parameters."""
    reference: str
    """``module:function`` or ``file.py:function``."""
    inputs: tuple[Array, ...] = ()
    """Arrays that it takes, in this order."""
    outputs: tuple[Array, ...] = ()
    """Arrays that it gives, as far as that is known."""
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The JSON Schema of the parameters; `parameters` is a copy that may be changed."""
    description: str = ""
    """What the function does, in a sentence."""
    annotations: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Types of the parameters that say more than JSON Schema can."""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be callable, got {type(self.function).__name__}")
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "outputs", tuple(self.outputs))
        object.__setattr__(self, "document", checked_parameters(self.document))
        _check_inputs(self.inputs, self.document["properties"])

    __hash__ = None  # type: ignore[assignment]

    @property
    def __name__(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parameters(self) -> dict[str, Any]:
        """Keyword parameters, as JSON Schema 2020-12 of an object.

        Two words are added to it: ``x-array`` says what is known of a parameter that is an array,
        and ``x-tuple`` that Python has a list as a tuple.
        """
        return copy.deepcopy(dict(self.document))

    def validate(self, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return parameters as the function takes them.

        Integers become floats where a number is expected, lists tuples, strings paths, lists of
        numbers arrays. Those that are not given are there with the default that the schema says.

        Parameters
        ----------
        params : mapping of names to values, optional
            What is to be checked; values as of JSON, or of Python and NumPy.

        Raises
        ------
        ParameterError
            If any of them is wrong, is missing, or is not known; it names all that are.
        ImportError
            If pydantic is not installed.
        """
        return self._checked(params, fill=True)

    def checked(self, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return parameters as `validate` does, and nothing beside those that are given."""
        return self._checked(params, fill=False)

    def _checked(self, params: Mapping[str, Any] | None, *, fill: bool) -> dict[str, Any]:
        if params is not None and not isinstance(params, Mapping):
            raise TypeError(f"params must be a mapping of names, got {type(params).__name__}")
        values, mistakes = self._checker.check(params or {}, fill=fill)
        arrays = {item.name for item in self.inputs}
        for name in mistakes.keys() & arrays:
            mistakes[name] = "is an array that is given after the function, and no parameter"
        if mistakes:
            raise ParameterError(self.name, mistakes)
        return values

    @cached_property
    def _checker(self) -> Checker:
        return Checker(self.document, self.annotations)

    def __call__(self, *arrays: Any, **params: Any) -> Any:
        """Call the function, with parameters that `validate` has seen."""
        return self.function(*arrays, **self.validate(params))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in JSON's types; written to a file, that is a description."""
        return {
            "name": self.name,
            **({"description": self.description} if self.description else {}),
            "function": self.reference,
            "inputs": [item.to_dict() for item in self.inputs],
            "outputs": [item.to_dict() for item in self.outputs],
            "parameters": self.parameters,
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_checker", None)
        return state


def _check_inputs(inputs: tuple[Array, ...], parameters: Mapping[str, Any]) -> None:
    names = [item.name for item in inputs]
    for number, item in enumerate(inputs):
        place = f"inputs[{number}]"
        if not item.name:
            raise ValueError(f"{place} has no name")
        if names.index(item.name) != number:
            raise ValueError(f"{place} is called {item.name!r}, as an input before it")
        if item.name in parameters:
            raise ValueError(f"{item.name!r} is an input and a parameter, too")
        before = inputs[number - 1] if number else None
        if before is not None and before.variadic:
            raise ValueError(
                f"{place} comes after {before.name!r}, which takes all arrays there are"
            )
        if before is not None and before.optional and not (item.optional or item.variadic):
            raise ValueError(f"{place} must be optional, as {before.name!r} before it is")
