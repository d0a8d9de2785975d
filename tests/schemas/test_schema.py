"""What functions say of themselves, what is right for them, and what is said of what is wrong."""

from __future__ import annotations

import copy
import json
import math
import pickle
import typing
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Optional, TypeVar, Union

import annotated_types as at
import jsonschema
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from cellimg_dask.bare.annotations import Names, schema_of
from cellimg_dask.bare.arrays import Array
from cellimg_dask.blocks.errors import ParameterError
from cellimg_dask.schemas.block_schema import BlockSchema
from cellimg_dask.schemas.checking import Checker
from cellimg_dask.schemas.describe import describe
from cellimg_dask.schemas.dialect import DIALECT, checked_parameters, checked_schema
from cellimg_dask.schemas.words import words

if typing.TYPE_CHECKING:
    from collections.abc import Sequence  # What an annotation below has only for type checkers.


# ---------------------------------------------------------------- three functions


def test_the_schema_of_a_function_that_says_all(functions):
    assert describe(functions["smooth"]).to_dict() == {
        "name": "smooth",
        "description": "Return the image without its noise.",
        "function": f"{functions['smooth'].__module__}:smooth",
        "inputs": [
            {
                "name": "image",
                "dtype": "uint16",
                "axes": "zyx",
                "role": "image",
                "halo": [[1, 1], [8, 8], [8, 8]],
                "description": "A volume.",
            }
        ],
        "outputs": [
            {
                "name": "result",
                "dtype": "float32",
                "axes": "zyx",
                "role": "image",
                "description": "As large.",
            }
        ],
        "parameters": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {
                "sigma": {
                    "type": "number",
                    "exclusiveMinimum": 0,
                    "description": "In voxels.",
                    "default": 2,
                },
                "mode": {
                    "enum": ["reflect", "wrap"],
                    "description": "What lies beyond the border.",
                    "default": "reflect",
                },
                "size": {
                    "anyOf": [
                        {
                            "type": "array",
                            "prefixItems": [{"type": "integer"}] * 3,
                            "items": False,
                            "minItems": 3,
                        },
                        {"type": "null"},
                    ],
                    "default": None,
                },
                "weights": {
                    "anyOf": [{"type": "string", "format": "path"}, {"type": "null"}],
                    "default": None,
                },
            },
            "required": [],
            "additionalProperties": False,
        },
    }


def test_the_schema_of_a_function_of_many_arrays(functions):
    schema = describe(functions["merge"])
    assert schema.inputs == (
        Array(name="first", dtype="floating"),
        Array(name="others", dtype="floating", variadic=True),
    )
    assert schema.outputs == (
        Array(name="result-0", dtype="float64"),
        Array(name="result-1", dtype="uint8", role="labels"),
    )
    parameters = schema.parameters
    assert parameters["required"] == ["weights"]
    assert parameters["properties"] == {
        "weights": {"type": "array", "items": {"type": "number", "minimum": 0}},
        "kernel": {
            "anyOf": [{"type": "array", "x-array": {"dtype": "float32"}}, {"type": "null"}],
            "default": None,
        },
        "options": {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "default": {},
        },
    }


def test_the_schema_of_a_function_without_annotations(functions):
    schema = describe(functions["plain"])
    assert [item.name for item in schema.inputs] == ["image", "mask"]
    assert schema.inputs[1].description == "Where."
    assert schema.outputs == ()
    assert schema.parameters == {
        "$schema": DIALECT,
        "type": "object",
        "properties": {"threshold": {"description": "From 0 on."}, "n_iter": {"default": 3}},
        "required": ["threshold"],
        "additionalProperties": {"type": "boolean"},
    }
    assert [item.name for item in describe(functions["plain"], inputs=1).inputs] == ["image"]
    assert describe(functions["plain"], inputs=1).parameters["required"] == ["mask", "threshold"]


def test_every_schema_is_one_that_others_understand(functions):
    for function in functions.values():
        jsonschema.Draft202012Validator.check_schema(describe(function).parameters)


# ---------------------------------------------------------------- wrong parameters

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("smooth", {"sigma": 0}, "sigma: expected a number above 0, got 0"),
    ("smooth", {"sigma": "2"}, "sigma: expected a number above 0, got '2'"),
    ("smooth", {"sgima": 2.0}, "sgima: no such parameter; did you mean sigma?"),
    ("smooth", {"mode": "mirror"}, "mode: expected one of 'reflect', 'wrap', got 'mirror'"),
    ("smooth", {"size": [1, 2]}, "size: expected a list of 3 integers or None, got [1, 2]"),
    (
        "smooth",
        {"image": np.zeros(3)},
        "image: is an array that is given after the function, and no parameter",
    ),
    ("merge", {}, "weights: is missing: expected a list of numbers of at least 0"),
    ("merge", {"weights": [1, -1]}, "weights[1]: expected a number of at least 0, got -1"),
    (
        "merge",
        {"weights": [], "options": {"steps": 1.5}},
        "options.steps: expected an integer, got 1.5",
    ),
    (
        "merge",
        {"weights": [], "kernel": "gauss"},
        "kernel: expected an array of float32 or None, got 'gauss'",
    ),
    (
        "merge",
        {"weights": [], "task": 1},
        "task: no such parameter; there are weights, kernel, options",
    ),
    (
        "plain",
        {"n_iter": 2, "verbose": 1},
        """verbose: expected a boolean, got 1
  threshold: is missing: expected anything (From 0 on.)""",
    ),
]


@pytest.mark.parametrize(("name", "params", "message"), WRONG)
def test_wrong_parameters_and_their_messages(functions, name, params, message):
    schema = describe(functions[name])
    with pytest.raises(ParameterError) as caught:
        schema.validate(params)
    assert str(caught.value) == f"parameters of {name}:\n  {message}"
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.mistakes == caught.value.mistakes
    with pytest.raises(ValueError):
        schema(np.zeros((3, 3, 3), "u2"), **params)


def test_all_mistakes_are_told_at_once(functions):
    with pytest.raises(ParameterError) as caught:
        describe(functions["smooth"]).validate({"sigma": -1, "size": 3, "modes": "wrap"})
    assert set(caught.value.mistakes) == {"sigma", "size", "modes"}
    assert caught.value.function == "smooth"


def test_parameters_must_be_a_mapping(functions):
    with pytest.raises(TypeError, match="mapping of names, got list"):
        describe(functions["smooth"]).validate([1])


# ---------------------------------------------------------------- right parameters


def test_values_become_what_the_function_takes(functions):
    schema = describe(functions["smooth"])
    values = schema.checked({"sigma": 1, "size": [1, 2.0, np.int8(3)], "weights": "a/b.pt"})
    assert values == {"sigma": 1.0, "size": (1, 2, 3), "weights": Path("a/b.pt")}
    assert type(values["sigma"]) is float
    assert [type(n) for n in values["size"]] == [int] * 3
    assert schema.checked({"sigma": np.float32(0.5)}) == {"sigma": 0.5}
    merged = describe(functions["merge"]).checked({"weights": np.array([1, 2]), "kernel": [[1, 2]]})
    assert merged["weights"] == [1.0, 2.0]
    assert merged["kernel"].dtype == "f4"
    assert merged["kernel"].shape == (1, 2)


def test_defaults_are_filled_in_as_the_function_has_them(functions):
    assert describe(functions["smooth"]).validate() == {
        "sigma": 2.0,
        "mode": "reflect",
        "size": None,
        "weights": None,
    }


def test_a_default_that_json_would_change_stays_with_the_function():
    ones = np.ones(2)

    def f(image, sigma=(1, 2), size: int = "auto", top=math.inf, kernel=ones):
        return sigma

    schema = describe(f)
    assert schema.parameters["properties"] == {
        "sigma": {"$comment": "default: (1, 2)"},
        "size": {"type": "integer", "$comment": "default: 'auto'"},
        "top": {"$comment": "default: inf"},
        "kernel": {"$comment": "default: array([1., 1.])"},
    }
    assert schema.validate() == {}
    assert schema(np.zeros(2)) == (1, 2)


def test_a_schema_is_called_like_the_function(functions):
    result = describe(functions["smooth"])(np.ones((2, 2, 2), "u2"), sigma=3)
    np.testing.assert_array_equal(result, np.full((2, 2, 2), 3, "f4"))


def even(value: int) -> int:
    if value % 2:
        raise ValueError("is odd")
    return value


def test_what_json_schema_cannot_say_is_checked_as_well():
    def f(image, step: Annotated[int, at.Ge(0), pydantic.AfterValidator(even)] = 2): ...

    schema = describe(f)
    assert "AfterValidator" in schema.parameters["properties"]["step"]["$comment"]
    assert schema.validate({"step": 4}) == {"step": 4}
    with pytest.raises(ParameterError, match=r"step: is odd; expected an integer of at least 0"):
        schema.validate({"step": 3})
    with pytest.raises(ParameterError, match=r"step: expected an integer of at least 0, got -2"):
        schema.validate({"step": -2})


def test_what_a_schema_returns_may_be_changed(functions):
    schema = describe(functions["smooth"])
    before = schema.to_json()
    schema.parameters["properties"].clear()
    schema.to_dict()["inputs"].clear()
    assert schema.to_json() == before


def test_schemas_are_values(functions):
    one, other = describe(functions["smooth"]), describe(functions["smooth"])
    assert one == other != describe(functions["merge"])
    one.validate()
    assert pickle.loads(pickle.dumps(one)) == one
    assert copy.deepcopy(one) == one
    with pytest.raises(AttributeError):
        one.name = "other"
    assert describe(one) is one


# ---------------------------------------------------------------- annotations

Pixel = NewType("Pixel", int)
Number = TypeVar("Number", int, float)
Late = TypeVar("Late", bound="str")


class Colour(Enum):
    RED = 1


ANNOTATIONS: list[tuple[Any, Any]] = [
    (Any, {}),
    (bool, {"type": "boolean"}),
    (int, {"type": "integer"}),
    (np.int16, {"type": "integer"}),
    (np.float32, {"type": "number"}),
    (typing.SupportsFloat, {"type": "number"}),
    (Pixel, {"type": "integer"}),
    (Number, {"anyOf": [{"type": "integer"}, {"type": "number"}]}),
    (None, {"type": "null"}),
    (Optional[int], {"anyOf": [{"type": "integer"}, {"type": "null"}]}),  # noqa: UP045
    (Union[int, Union[str, int]], {"anyOf": [{"type": "integer"}, {"type": "string"}]}),  # noqa: UP007
    (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
    ("int | None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
    ("Literal['a|b', None]", {"enum": ["a|b", None]}),
    (list, {"type": "array"}),
    (list[int], {"type": "array", "items": {"type": "integer"}}),
    ("Sequence[float]", {"type": "array", "items": {"type": "number"}}),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}, "x-tuple": True}),
    (tuple[()], {"type": "array", "maxItems": 0, "x-tuple": True}),
    (
        tuple[int, str],
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "string"}],
            "items": False,
            "minItems": 2,
        },
    ),
    (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
    (Path, {"type": "string", "format": "path"}),
    (np.ndarray, {"type": "array", "x-array": {}}),
    (ArrayLike, {"type": "array", "x-array": {}}),
    ("NDArray[np.uint8 | np.uint16]", {"type": "array", "x-array": {"dtype": ["uint8", "uint16"]}}),
    (NDArray[np.bool_], {"type": "array", "x-array": {"dtype": "bool"}}),
    (NDArray[Any], {"type": "array", "x-array": {}}),
    (NDArray[np.generic], {"type": "array", "x-array": {}}),
    (
        Annotated[float, at.Interval(gt=0, le=1), at.MultipleOf(0.5)],
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.5},
    ),
    (
        Annotated[float | None, pydantic.Field(ge=0)],
        {"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}]},
    ),
    (Annotated[str, pydantic.Field(pattern="^a")], {"type": "string", "pattern": "^a"}),
    (
        Annotated[list[int], at.Len(1, 3)],
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    ),
    (Annotated[str, at.MinLen(2)], {"type": "string", "minLength": 2}),
    (Annotated[float, "in micrometres"], {"type": "number", "description": "in micrometres"}),
    (
        Annotated[NDArray[np.uint8], {"axes": "yx", "halo": 3}],
        {"type": "array", "x-array": {"dtype": "uint8", "axes": "yx", "halo": 3}},
    ),
]


@pytest.mark.parametrize(("annotation", "expected"), ANNOTATIONS, ids=repr)
def test_annotations(annotation, expected):
    schema = schema_of(annotation, Names({}))
    assert schema == expected
    # It is one that is read again, and of one form.
    assert checked_schema(json.loads(json.dumps(schema)), "it") == expected


@pytest.mark.parametrize(
    "annotation", [complex, bytes, Colour, set[int], dict[int, str], type, Literal[Colour.RED]]
)
def test_a_type_that_json_cannot_say_is_an_error_that_says_so(annotation):
    def f(image, odd=None):
        return image

    f.__annotations__["odd"] = annotation
    with pytest.raises(TypeError, match=r"f: parameter odd is of type .*, which JSON cannot say"):
        describe(f)
    assert describe(f, strict=False).validate({"odd": annotation}) == {"odd": annotation}


def test_names_that_only_type_checkers_import_are_found():
    def f(image: NDArray[np.uint8], sizes: Sequence[int] = ()): ...

    schema = describe(f).parameters["properties"]["sizes"]
    assert (schema["type"], schema["items"]) == ("array", {"type": "integer"})


def test_a_name_that_is_nowhere_is_an_error_that_names_the_parameter():
    def f(image, model: Unet = None): ...  # type: ignore[name-defined] # noqa: F821

    with pytest.raises(TypeError, match="parameter model is of type Unet"):
        describe(f)


def test_partial_methods_classes_and_objects_are_functions_too():
    class Filter:
        def __init__(self, image, sigma: float = 1): ...

        def __call__(self, image, size: int = 3): ...

        def method(self, image, order: int = 0): ...

        @staticmethod
        def static(image, n: Literal[1, 2] = 1): ...

    def properties(f):
        return describe(f).parameters["properties"]

    made = Filter(None)
    assert properties(Filter) == {"sigma": {"type": "number", "default": 1}}
    assert properties(made) == {"size": {"type": "integer", "default": 3}}
    assert properties(made.method) == {"order": {"type": "integer", "default": 0}}
    assert properties(Filter.static) == {"n": {"enum": [1, 2], "default": 1}}
    assert properties(partial(made.method, order=2)) == {"order": {"type": "integer", "default": 2}}


def test_inputs_that_may_be_left_out_say_so():
    def f(image, mask: Annotated[NDArray[np.bool_] | None, Array(role="mask")] = None, *, t=0): ...

    schema = describe(f)
    assert schema.inputs == (
        Array(name="image"),
        Array(name="mask", dtype="bool", role="mask", optional=True),
    )


def test_a_function_without_a_signature_is_an_error():
    with pytest.raises(TypeError, match="describe it in a file"):
        describe(dict)
    with pytest.raises(TypeError, match="takes a function, its name"):
        describe(3)  # type: ignore[arg-type]


def test_a_parameter_that_nobody_can_give():
    def f(image, sigma: float, /): ...

    with pytest.raises(TypeError, match="f takes sigma by its place only"):
        describe(f)


ARRAYS_WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"halo": -1}, ValueError, "widths are 0 or more"),
    ({"halo": 1.5}, TypeError, "halo must be an int"),
    ({"halo": (1, (2, 3, 4))}, ValueError, "give a width or"),
    ({"halo": (1, 2), "axes": "zyx"}, ValueError, "2 axes, but axes are 'zyx'"),
    ({"axes": "zyz"}, ValueError, "axis twice"),
    ({"axes": 3}, TypeError, "letters such as"),
    ({"axes": [1]}, TypeError, "axes must be names"),
    ({"dtype": "uint17"}, ValueError, "'uint17' is no dtype"),
    ({"dtype": object}, ValueError, "cannot be said"),
    ({"role": 3}, TypeError, "role must be a string"),
    ({"optional": 1}, TypeError, "optional must be True or False"),
    ({"optional": True, "variadic": True}, ValueError, "leave optional out"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARRAYS_WRONG)
def test_what_is_said_of_an_array_is_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        Array(**arguments)


@given(
    st.sampled_from(["u1", ">u2", "<f8", "?", "c8", "i8"]),
    st.lists(st.sampled_from(["uint16", "bool", "floating", "integer", "complex64"]), max_size=3),
)
def test_which_dtypes_are_accepted(dtype, names):
    kinds = {"floating": "f", "integer": "iu"}
    expected = not names or any(
        np.dtype(dtype).kind in kinds[n] if n in kinds else np.dtype(dtype).name == n for n in names
    )
    assert Array(dtype=names).accepts(dtype) == expected


# ---------------------------------------------------------------- against jsonschema and pydantic

numbers = st.integers(-3, 3) | st.sampled_from([-1.5, 0.5, 2.0])
bounds = st.fixed_dictionaries(
    {},
    optional={
        "minimum": numbers,
        "maximum": numbers,
        "exclusiveMinimum": numbers,
        "exclusiveMaximum": numbers,
        "multipleOf": st.integers(1, 3),
    },
)
counts = st.integers(0, 3)
simple_values = st.none() | st.booleans() | numbers | st.sampled_from(["", "a", "ab", "ba", "1"])
leaves = st.one_of(
    st.just({}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    bounds.map(lambda b: {"type": "integer", **b}),
    bounds.map(lambda b: {"type": "number", **b}),
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={
            "minLength": counts,
            "maxLength": counts,
            "pattern": st.sampled_from(["^a", "b", "a$"]),
        },
    ),
    st.lists(simple_values, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    simple_values.map(lambda value: {"const": value}),
    st.just({"type": ["integer", "null"], "minimum": 0}),
)


def larger(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": schemas,
            "minItems": counts,
            "maxItems": counts,
            "uniqueItems": st.booleans(),
        },
    )
    prefixed = st.builds(
        lambda parts, rest: {
            "type": "array",
            "prefixItems": parts,
            "minItems": len(parts),
            **rest,
        },
        st.lists(schemas, min_size=1, max_size=2),
        st.fixed_dictionaries({}, optional={"items": st.just(False) | schemas}),
    )
    mappings = st.builds(
        lambda names, needed, more: {
            "type": "object",
            "properties": names,
            "required": [name for name in names if name in needed],
            **more,
        },
        st.dictionaries(st.sampled_from("abc"), schemas, max_size=2),
        st.sets(st.sampled_from("abc")),
        st.fixed_dictionaries({}, optional={"additionalProperties": st.booleans() | schemas}),
    )
    either = st.lists(schemas, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
    return lists | prefixed | mappings | either


schemas = st.recursive(leaves, larger, max_leaves=5)
values = st.recursive(
    simple_values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner),
    max_leaves=5,
)


@given(schemas, values)
def test_what_is_accepted_is_what_json_schema_accepts(schema, value):
    reference = jsonschema.Draft202012Validator(schema)
    checked = checked_schema(schema, "it")
    document = checked_parameters({"properties": {"it": schema}})
    found, mistakes = Checker(document, {}).check({"it": value}, fill=False)
    assert (not mistakes) == reference.is_valid(value), (mistakes, found)
    # In its own form it says the same, and is put into words.
    assert jsonschema.Draft202012Validator(checked).is_valid(value) == reference.is_valid(value)
    assert checked_schema(checked, "it") == checked
    assert words(checked)
    if not mistakes:
        assert json.loads(json.dumps(found["it"])) == value
    for name, text in mistakes.items():
        assert name.startswith("it")
        assert "expected" in text or "no such" in text


simple_types: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [int, float, str, bool, None, Literal["a", 1], Annotated[int, at.Ge(0), at.Lt(3)]]
    ),
    st.sampled_from([Annotated[float, pydantic.Field(gt=-1)], Annotated[str, at.Len(1, 2)]]),
)
types = st.recursive(
    simple_types,
    lambda inner: st.one_of(
        inner.map(lambda t: list[t]),
        inner.map(lambda t: tuple[t, ...]),
        st.tuples(inner, inner).map(lambda pair: tuple[pair]),
        inner.map(lambda t: dict[str, t]),
        st.tuples(inner, inner).map(lambda pair: Union[pair]),  # noqa: UP007
        inner.map(lambda t: Annotated[list[t], at.MaxLen(2)]),
    ),
    max_leaves=4,
)
no_whole_floats = values.filter(lambda value: "2.0" not in repr(value))


@given(types, no_whole_floats)
def test_what_is_accepted_is_what_pydantic_accepts_in_json(annotation, value):
    try:
        expected = pydantic.TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
        right = True
    except pydantic.ValidationError:
        right = False
    schema = schema_of(annotation, Names({}))
    found, mistakes = Checker(checked_parameters({"properties": {"it": schema}}), {}).check(
        {"it": value}, fill=False
    )
    assert (not mistakes) == right, (schema, mistakes)
    if right:
        assert found["it"] == expected
        assert type(found["it"]) is type(expected)


# ---------------------------------------------------------------- round trip

arrays = st.builds(
    Array,
    name=st.text("abcdef_", min_size=1, max_size=5),
    axes=st.none() | st.sampled_from(["yx", "zyx", ("time", "y")]),
    role=st.none() | st.sampled_from(["image", "labels", "nuclei"]),
    halo=st.none() | st.integers(0, 9),
    dtype=st.lists(st.sampled_from(["uint8", "floating", ">f4"]), max_size=2, unique=True),
    description=st.sampled_from(["", "Über alles: 'quoted' # and so on"]),
)


@given(
    inputs=st.lists(arrays, max_size=3, unique_by=lambda a: a.name),
    outputs=st.lists(arrays, max_size=2),
    properties=st.dictionaries(st.sampled_from(["sigma", "n", "mode"]), schemas, max_size=3),
    suffix=st.sampled_from([".json", ".yaml"]),
)
def test_what_is_written_is_read_again(tmp_path_factory, inputs, outputs, properties, suffix):
    schema = BlockSchema(
        name="negative",
        function=np.negative,
        reference="numpy:negative",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        document={"properties": properties, "required": sorted(properties)[:1]},
        description="Über.",
    )
    path = tmp_path_factory.mktemp("described") / f"it{suffix}"
    path.write_text(schema.to_json(), encoding="utf-8")
    again = describe(path)
    assert again == schema
    assert again.to_json() == schema.to_json()
    assert again.function is not np.negative


def test_described_functions_are_read_again(functions, tmp_path):
    path = tmp_path / "it.json"
    for function in functions.values():
        schema = describe(function)
        path.write_text(schema.to_json())
        try:
            again = describe(str(path))
        except ValueError:
            pytest.fail(f"{schema.reference} cannot be read")
        assert again == schema
