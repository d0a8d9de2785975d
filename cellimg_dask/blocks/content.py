"""What a function and its parameters are, as text that is the same in every process.

A key on disk must change when the computation does, and only then. Names and addresses do not
serve (an edited function has the same name), nor does pickling (a moved line changes it). Here a
function is its compiled code, without line numbers, and whatever the code refers to: defaults,
enclosed and global values, other functions of the user's, also in modules that it imports. What
comes from an installed package is its name and the package's version. Compiled code is taken and
not the source text, because a file may have been edited since it was imported.
"""

from __future__ import annotations

import collections
import dis
import enum
import functools
import hashlib
import importlib.util
import json
import logging
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from itertools import accumulate
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellimg_dask.bare import compiled
from cellimg_dask.blocks.errors import CellimgError
from cellimg_dask.blocks.functions import BlockCode
from cellimg_dask.blocks.named import NamedFunction, importable
from cellimg_dask.blocks.wrappers import Shipped

__all__ = [
    "NoContentError",
    "array_content",
    "digest",
    "dtype_content",
    "is_installed",
    "is_installed_file",
    "value_content",
]


class NoContentError(CellimgError, TypeError):
    """Something has no content that could be compared; the message says what and where."""


def digest(content: Any) -> str:
    """Return 32 hexadecimal digits for a structure of JSON's types."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return _hash(text.encode())


def dtype_content(dtype: np.dtype[Any]) -> Any:
    """Return what a dtype is: of a structured one every field, with its place."""
    if dtype.names is not None:
        assert dtype.fields is not None
        fields = [[name, *map(_field, dtype.fields[name])] for name in dtype.names]
        return ["fields", dtype.itemsize, fields]
    if dtype.subdtype is not None:
        return ["subarray", dtype_content(dtype.subdtype[0]), list(dtype.subdtype[1])]
    return dtype.str


def array_content(array: NDArray[Any]) -> list[Any]:
    """Return shape, dtype and a hash of the values of an array."""
    if array.dtype.hasobject:
        raise NoContentError("an array of Python objects has no bytes of its own")
    flat = np.ascontiguousarray(array)
    values = flat.reshape(-1).view(np.uint8).data if flat.nbytes else b""
    return ["array", list(array.shape), dtype_content(array.dtype), _hash(values)]


def value_content(value: Any, name: str = "value") -> Any:
    """Return what a value is, in JSON's types.

    Parameters
    ----------
    value : object
        Numbers, strings, arrays, containers, dataclasses, functions, classes, modules, and
        objects of the user's own classes. A `Path` of a file is the file's content too.
    name : str
        How the message calls it.

    Raises
    ------
    NoContentError
        If it holds something of which nobody can say whether it has changed.

    Notes
    -----
    Modules of the user's that a function imports are imported here, as the function would.
    """
    return _Contents().of(value, name)


class _Contents:
    """Describes values, and notices circles.

    A function or class is described where it is met first; after that it is a number.
    """

    def __init__(self) -> None:
        self._open: dict[int, int] = {}
        self._seen: dict[int, tuple[int, Any]] = {}
        # What the function that is being described calls anything, itself or after a dot.
        self._names: frozenset[str] | None = None

    def of(self, value: Any, name: str) -> Any:
        simple = _simple(value)
        if simple is not None:
            return simple
        if id(value) in self._open:
            return ["circle", len(self._open) - self._open[id(value)]]
        self._open[id(value)] = len(self._open)
        try:
            return self._compound(value, name)
        finally:
            del self._open[id(value)]

    def _compound(self, value: Any, name: str) -> Any:
        kind = type(value)
        if isinstance(value, np.ndarray) and (kind is np.ndarray or is_installed(kind.__module__)):
            return self._array(value, name)
        if isinstance(value, np.generic):
            if value.dtype.hasobject:
                raise NoContentError(f"{name} holds Python objects, which have no bytes")
            return ["scalar", dtype_content(value.dtype), value.tobytes().hex()]
        if kind in (list, tuple):
            return [kind.__name__, [self.of(v, f"{name}[{i}]") for i, v in enumerate(value)]]
        if kind is slice:
            return ["slice", self.of((value.start, value.stop, value.step), name)]
        if kind is dict:
            keys = zip(self._apart(value, f"a key of {name}"), value, strict=True)
            ordered = sorted(keys, key=lambda pair: digest(pair[0]))
            return ["dict", [[key, self.of(value[k], f"{name}[{k!r}]")] for key, k in ordered]]
        if kind in (set, frozenset):
            return ["set", sorted(self._apart(value, f"an item of {name}"), key=digest)]
        if kind is BlockCode:
            return self._block_code(value, name)
        if kind is NamedFunction:
            return self._named(value, name)
        if kind is CodeType:
            return self._code(value, name)
        if kind is Shipped:
            return self._shipped(value, name)
        if kind is functools.partial:
            given = self.of([value.args, value.keywords], f"the arguments of {name}")
            return ["partial", self.of(value.func, name), given]
        if kind in (MethodType, BuiltinFunctionType, MethodWrapperType):
            return self._method(value, name)
        if kind in (MethodDescriptorType, WrapperDescriptorType, ClassMethodDescriptorType):
            return ["descriptor", self.of(value.__objclass__, name), value.__name__]
        if kind is property:
            return ["property", [self.of(f, name) for f in (value.fget, value.fset, value.fdel)]]
        if isinstance(value, enum.Enum):
            return ["enum", kind.__qualname__, value.name, self.of(value.value, name)]
        if isinstance(value, logging.Logger):
            return ["logger", value.name]
        if isinstance(value, ModuleType):
            return self._module(value, name)
        if isinstance(value, np.ufunc):
            return self._ufunc(value, name)
        if _goes_by_name(value):
            return ["name", value.__module__, value.__qualname__, _version(value.__module__)]
        if isinstance(value, (FunctionType, type)):
            if id(value) in self._seen:
                return ["seen", self._seen[id(value)][0]]
            self._seen[id(value)] = len(self._seen), value
            if isinstance(value, type):
                return self._class(value, name)
            return self._function(value, name)
        if kind.__module__.partition(".")[0] == "pandas" and hasattr(kind, "construct_array_type"):
            return self._pandas_dtype(value, name)
        inner = _wrapped(value)
        if inner is not value:
            return ["wrapped", kind.__qualname__, self.of(inner, name)]
        return self._instance(value, name)

    def _pandas_dtype(self, dtype: Any, name: str) -> Any:
        categories = getattr(dtype, "categories", None)
        values = None if categories is None else [str(categories.dtype), categories.tolist()]
        # It tells all but the categories.
        return [
            "pandas dtype",
            repr(dtype) if values is None else "category",
            *(self.of(part, name) for part in (values, getattr(dtype, "ordered", None))),
        ]

    def _apart(self, values: Iterable[Any], name: str) -> list[Any]:
        """Describe values whose order means nothing: each as if it were the first."""
        before, found = self._seen, []
        for value in values:
            self._seen = dict(before)
            found.append(self.of(value, name))
        self._seen = before
        return found

    def _array(self, array: NDArray[Any], name: str) -> Any:
        try:
            if isinstance(array, np.ma.MaskedArray):
                mask = array_content(np.ma.getmaskarray(array))
                fill = self.of(array.fill_value, name)
                return ["masked", array_content(np.asarray(array.data)), mask, fill]
            kind = "memmap" if isinstance(array, np.memmap) else type(array).__name__
            content = array_content(array.view(np.ndarray))
        except NoContentError as error:
            raise NoContentError(f"{name}: {error}") from None
        return content if kind in ("ndarray", "memmap") else [kind, content]

    def _shipped(self, shipped: Shipped, name: str) -> Any:
        try:
            return self.of(shipped.user, name)
        except NoContentError:
            if set(shipped.spec) != {"name"}:
                raise
            # Of a package of the environment, whose token tells the versions of its packages.
            return ["name", shipped.spec["name"]]

    def _block_code(self, code: BlockCode, name: str) -> Any:
        parts = [compile(text or "", "<BlockCode>", "exec") for text in (code.init, code.code)]
        with self._calling(parts):
            return ["BlockCode", [self._code(p, name) for p in parts], self._imports(parts, name)]

    def _named(self, named: NamedFunction, name: str) -> Any:
        function = importable(named)
        if function is not None:
            return self.of(function, name)
        if named.file is None:
            raise NoContentError(
                f"{name} is {named.name!r}, which cannot be imported here, so that nobody can say "
                f"whether it has changed"
            )
        try:
            files = {place: _hash(path.read_bytes()) for place, path in named.files().items()}
        except OSError as error:
            raise NoContentError(f"{name} is {named.name!r}: {error}") from None
        return ["file function", named.file.name, named.attribute, files]

    def _method(self, method: Any, name: str) -> Any:
        owner = getattr(method, "__self__", None)
        if isinstance(method, MethodType):
            return ["method", self.of(method.__func__, name), self.of(owner, f"self of {name}")]
        if owner is None or isinstance(owner, ModuleType):
            module = method.__module__ or "builtins"
            return ["name", module, method.__qualname__, _version(module)]
        return ["method", method.__name__, self.of(owner, f"self of {name}")]

    def _function(self, function: FunctionType, name: str) -> Any:
        code, known = function.__code__, function.__globals__
        with self._calling([code]):
            enclosed = {}
            for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
                try:
                    enclosed[variable] = self.of(cell.cell_contents, f"{variable} of {name}")
                except ValueError:
                    enclosed[variable] = ["not yet set"]
            used = sorted(compiled.globals_read(code) & known.keys())
            attributes = {key: v for key, v in vars(function).items() if key != "__wrapped__"}
            return [
                "function",
                self._code(code, name),
                self.of(function.__defaults__, f"the defaults of {name}"),
                self.of(function.__kwdefaults__, f"the defaults of {name}"),
                enclosed,
                {variable: self.of(known[variable], f"global {variable}") for variable in used},
                self._imports([code], name, known.get("__package__")),
                self.of(attributes, f"the attributes of {name}"),
            ]

    @contextmanager
    def _calling(self, codes: Sequence[CodeType]) -> Iterator[None]:
        before = self._names
        self._names = frozenset().union(*map(compiled.names, codes))
        try:
            yield
        finally:
            self._names = before

    def _code(self, code: CodeType, name: str) -> Any:
        # Constants are told where they are loaded: a docstring is not, and shifts the others.
        steps = [
            [s.opname, self.of(s.argval, name) if s.opcode in dis.hasconst else s.arg]
            for s in compiled.instructions(code)
        ]
        return [
            "code",
            sys.implementation.cache_tag,
            steps,
            list(code.co_names),
            list(code.co_varnames),
            list(code.co_freevars),
            list(code.co_cellvars),
            [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount],
            code.co_flags & _FLAGS,
            code.co_exceptiontable.hex(),
        ]

    def _imports(
        self, codes: Sequence[CodeType], name: str, package: str | None = None
    ) -> dict[str, Any]:
        """Describe what code imports when it runs."""
        wanted = {module for code in codes for module in _imported(code, package)}
        return {module: self._imported(module, name) for module in sorted(wanted)}

    def _imported(self, module: str, name: str) -> Any:
        try:
            spec = importlib.util.find_spec(module.partition(".")[0])
            if spec is not None and not is_installed_file(spec.origin):
                # The user's own. For others the version will do, and they may be slow to import.
                return self.of(importlib.import_module(module), name)
        except NoContentError:
            raise
        except (ImportError, ValueError):
            spec = None
        except Exception as error:
            raise NoContentError(
                f"{name} imports {module}, which fails here with {type(error).__name__}: {error}"
            ) from error
        return ["absent", module] if spec is None else ["module", module, _version(module)]

    def _module(self, module: ModuleType, name: str) -> Any:
        if is_installed(module.__name__):
            return ["module", module.__name__, _version(module.__name__)]
        # A module of the user's: what the function may use of it.
        used = [m for m in vars(module) if not m.startswith("__")]
        if self._names is not None:
            used = [m for m in self._names if hasattr(module, m)]
        title = module.__name__
        return ["module", {m: self.of(getattr(module, m), f"{title}.{m}") for m in sorted(used)}]

    def _ufunc(self, ufunc: np.ufunc, name: str) -> Any:
        for module in ("numpy", "scipy.special"):
            if getattr(sys.modules.get(module), ufunc.__name__, None) is ufunc:
                return ["name", module, ufunc.__name__, _version(module)]
        raise NoContentError(f"{name} is a ufunc that is neither NumPy's nor SciPy's")

    def _class(self, cls: type, name: str) -> Any:
        is_enum = issubclass(cls, enum.Enum)
        members = {
            key: self.of(_wrapped(member), f"{name}.{key}")
            for key, member in sorted(vars(cls).items())
            if key not in _NOT_CONTENT
            and not isinstance(member, _SLOTS)
            and not (is_enum and key.startswith("_"))
        }
        return ["class", cls.__qualname__, [self.of(base, name) for base in cls.__bases__], members]

    def _instance(self, value: Any, name: str) -> Any:
        kind = type(value)
        base = next(cls for cls in kind.__mro__ if not cls.__flags__ & _HEAP_TYPE)
        known = base in (object, *_BASES) and not _hides_something(kind, base)
        state = object.__getstate__(value) if known else None
        # Packages have objects that only stand for something, as object() does.
        if not known or (
            is_installed(kind.__module__)
            and not is_dataclass(value)
            and (base is not object or state)
        ):
            raise NoContentError(
                f"{name} is a {kind.__module__}.{kind.__qualname__}, of which cannot be said "
                f"whether it has changed"
            )
        held = None
        if base is not object:
            plain = value.view(np.ndarray) if base is np.ndarray else base(value)
            held = self.of(plain, name)
        parts = state if isinstance(state, tuple) else (state,)
        attributes = {
            key: item
            for part in parts
            for key, item in (part or {}).items()
            # It follows from the others, and may be there or not.
            if not isinstance(getattr(kind, key, None), functools.cached_property)
        }
        return [
            "object",
            self.of(kind, name),
            held,
            {key: self.of(item, f"{name}.{key}") for key, item in sorted(attributes.items())},
        ]


_NOT_CONTENT = frozenset(
    (
        "__abstractmethods__",
        "__annotate__",
        "__annotate_func__",
        "__annotations__",
        "__annotations_cache__",
        "__dataclass_fields__",
        "__dataclass_params__",
        "__dict__",
        "__doc__",
        "__firstlineno__",
        "__module__",
        "__orig_bases__",
        "__parameters__",
        "__qualname__",
        "__slotnames__",
        "__static_attributes__",
        "__weakref__",
        "_abc_impl",
    )
)
_SLOTS = (GetSetDescriptorType, MemberDescriptorType, collections._tuplegetter)  # type: ignore[attr-defined]
_BASES = (list, tuple, dict, set, frozenset, int, float, complex, str, bytes, np.ndarray)
_HEAP_TYPE = 1 << 9
# Of a code's flags those that say what kind of function it is, and not what its source imports.
_FLAGS = 0x3FF & ~0x10


def _hash(content: Any) -> str:
    # Processors have instructions for it: twice as quick as BLAKE2b on those of today.
    return hashlib.sha256(content).hexdigest()[:32]


def _field(part: Any) -> Any:
    return dtype_content(part) if isinstance(part, np.dtype) else part


def _simple(value: Any) -> Any:
    """Return the content of a plain value, or None where it is not one."""
    kind = type(value)
    if value is None or value is Ellipsis or value is NotImplemented:
        return [str(value)]
    if kind in (bool, int, str, range):
        return [kind.__name__, str(value)]
    if kind is float:
        return ["float", value.hex()]
    if kind is complex:
        return ["complex", value.real.hex(), value.imag.hex()]
    if kind in (bytes, bytearray):
        return ["bytes", _hash(value)]
    if isinstance(value, np.dtype):
        return ["dtype", dtype_content(value)]
    if isinstance(value, Path) and value.is_file():
        return ["file", str(value), _hash(value.read_bytes())]
    if isinstance(value, PurePath):
        return ["path", str(value)]
    if kind is re.Pattern:
        return ["pattern", repr(value.pattern), value.flags]
    return None


def _wrapped(member: Any) -> Any:
    """Return the function in a decorator of the standard library's."""
    if isinstance(member, (staticmethod, classmethod)):
        return member.__func__
    if isinstance(member, functools.cached_property):
        return member.func
    if type(member) is type(_version):
        return member.__wrapped__
    return member


def _imported(code: CodeType, package: str | None) -> Iterator[str]:
    """Return the full names of the modules that code imports, and of what might be one."""
    for part in compiled.codes(code):
        steps = compiled.instructions(part)
        for number, step in enumerate(steps):
            if step.opname == "IMPORT_NAME":
                level, members = (before.argval for before in steps[number - 2 : number])
                with suppress(ImportError):
                    full = importlib.util.resolve_name("." * level + step.argval, package)
                    # Importing a.b imports a, which the code may use too; what is imported
                    # from a package may be a module.
                    yield from accumulate(full.split("."), "{}.{}".format)
                    yield from (f"{full}.{member}" for member in members or ())


def _hides_something(cls: type, base: type) -> bool:
    """Whether objects have more in them than ``base``, attributes and slots: memory of C code."""
    slots = [vars(part).get("__slots__", ()) for part in cls.__mro__]
    count = sum(1 if isinstance(names, str) else len(tuple(names)) for names in slots)
    count += bool(cls.__dictoffset__) + bool(cls.__weakrefoffset__)
    return cls.__basicsize__ > base.__basicsize__ + count * tuple.__itemsize__


def _goes_by_name(value: Any) -> bool:
    """Whether a function or class is found in an installed package under its name."""
    module, title = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not callable(value) or not isinstance(title, str) or not is_installed(module):
        return False
    found: Any = sys.modules.get(str(module))
    for part in title.split("."):
        found = getattr(found, part, None)
    return found is value


def is_installed(module: str | None) -> bool:
    """Whether a module belongs to an installed package, so that its version says what it is."""
    if not isinstance(module, str) or module == "__main__":
        return False
    if module.partition(".")[0] == __name__.partition(".")[0]:
        # Also where it is used from a checkout, which has state that is no content.
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        # Built in, or made by hand.
        return module.partition(".")[0] in sys.stdlib_module_names
    return is_installed_file(file)


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple({Path(sysconfig.get_path(name)).resolve() for name in names})


@functools.lru_cache(maxsize=4096)
def is_installed_file(file: str | None) -> bool:
    """Whether a file is one of Python's own or of an installed package."""
    if file in ("built-in", "frozen"):
        return True
    if file is None:
        return False
    path = Path(file).resolve()
    # Debian, and pip with --user, put packages where sysconfig does not say.
    return bool({"site-packages", "dist-packages"}.intersection(path.parts)) or any(
        folder in path.parents for folder in _installed_folders()
    )


_distributions = functools.cache(packages_distributions)


@functools.lru_cache(maxsize=1024)
def _version(module: str) -> str:
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return f"{sys.version_info[0]}.{sys.version_info[1]}"
    # Not from the module itself, which may not have been imported yet.
    with suppress(PackageNotFoundError):
        return version(top)
    for name in _distributions().get(top, ()):
        with suppress(PackageNotFoundError):
            return version(name)
    return str(getattr(sys.modules.get(top), "__version__", "unknown"))
