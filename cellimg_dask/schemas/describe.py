"""`describe`: the schema of a block function, wherever it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cellimg_dask.bare import describe as signatures
from cellimg_dask.blocks.functions import BlockCode
from cellimg_dask.blocks.named import NamedFunction
from cellimg_dask.schemas.block_schema import BlockSchema
from cellimg_dask.schemas.description import is_description, read_description
from cellimg_dask.schemas.elsewhere import Environment, described_in
from cellimg_dask.schemas.signature import schema_from_signature

__all__ = ["describe"]


def describe(
    f: Callable[..., Any] | str | Path,
    env: Environment | None = None,
    *,
    inputs: int | None = None,
    before: int = 0,
    strict: bool = True,
    timeout_s: float = 300.0,
) -> BlockSchema:
    """Return what a block function takes and gives.

    From its signature: the first parameters that are annotated as arrays, or have no annotation
    and no default, are its inputs; a docstring in NumPy's style which says of one that it is no
    array ends them. An array with a default is an input if it is annotated with `Array`. The other
    parameters are those of JSON Schema, with what pydantic's ``Field`` and ``annotated_types``
    say. One that is called ``task`` is the running task, and none of them.

    Parameters
    ----------
    f : callable or str or Path
        A function; its name as ``"module:function"`` or ``"path/to/file.py:function"``; or the path
        of a description, a file ending in ``.yaml``, ``.yml`` or ``.json``.
    env : Env, optional
        Where a function that is named can be imported. It is not imported here then.
    inputs : int, optional
        How many of the first parameters are arrays, where the signature does not say so.
    before : int
        How many parameters come before the arrays and are none, such as the model of `segment`.
    strict : bool
        Whether a parameter of a type that JSON cannot say is an error; else it is not checked.
    timeout_s : float
        How long importing in ``env`` may take.

    Returns
    -------
    BlockSchema

    Raises
    ------
    TypeError, ValueError
        If JSON cannot say what the function takes, or a description is wrong.
    ImportError, FileNotFoundError, AttributeError, SyntaxError
        If there is no such function, or it cannot be imported.
    RuntimeError, TimeoutError
        If the environment's Python dies or takes too long.

    Examples
    --------
    >>> def smooth(image, sigma: float = 2.0, mode: Literal["reflect", "wrap"] = "reflect"):
    ...     '''Return the image without its noise.
    ...
    ...     Parameters
    ...     ----------
    ...     sigma : float
    ...         In voxels.
    ...     '''
    >>> from typing import Literal
    >>> schema = describe(smooth)
    >>> [item.name for item in schema.inputs], list(schema.parameters["properties"])
    (['image'], ['sigma', 'mode'])
    >>> schema.validate({"sgima": 3, "mode": "mirror"})
    Traceback (most recent call last):
    ...
    cellimg_dask.blocks.errors.ParameterError: parameters of smooth:
      sgima: no such parameter; did you mean sigma?
      mode: expected one of 'reflect', 'wrap', got 'mirror'
    """
    if isinstance(f, BlockSchema):
        return f
    if isinstance(f, BlockCode):
        raise TypeError("BlockCode has no parameters; describe a function")
    if isinstance(f, Path) or (isinstance(f, str) and is_description(f)):
        return read_description(Path(f))
    function: Callable[..., Any] = NamedFunction(f) if isinstance(f, str) else f
    if not callable(function):
        raise TypeError(
            f"describe takes a function, its name, or the path of a description, got "
            f"{type(f).__name__}"
        )
    if env is not None:
        if not isinstance(function, NamedFunction):
            raise TypeError(
                'a function of this process is not in env: name it, "module:function" or '
                '"path/to/file.py:function"'
            )
        said = described_in(env, _place(function), timeout_s)
        here = None
    else:
        here = function.function if isinstance(function, NamedFunction) else function
        said = signatures.describe(here)
    if isinstance(function, NamedFunction):
        reference = function.name
    else:
        reference = f"{said['place']}:{said['name']}"
    return schema_from_signature(
        said, function, reference, types_of=here, inputs=inputs, before=before, strict=strict
    )


def _place(function: NamedFunction) -> dict[str, Any]:
    """Return how another Python finds a function."""
    if function.file is not None:
        return {"file": str(function.file), "name": function.attribute}
    return {"name": function.name, "folders": [str(Path.cwd())]}
