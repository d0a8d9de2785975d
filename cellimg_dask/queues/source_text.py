"""Functions as text that another Python can run, with whatever they use."""

from __future__ import annotations

import ast
import base64
import enum
import functools
import io
import keyword
import linecache
import logging
import math
import re
from pathlib import PurePath
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

import numpy as np

from cellimg_dask.bare import compiled
from cellimg_dask.blocks.named import NamedFunction
from cellimg_dask.queues.places import folder_of, public_name

__all__ = ["ADVICE", "source_of"]

ADVICE = (
    'put the function into a file or module of its own and name it, as "path/to/file.py:function" '
    'or "module:function"; or write it as BlockCode; or use backend="processes" without an env'
)
_LARGEST = 1 << 20
"""Arrays and bytes beyond this size are not written into text."""
_ANNOTATIONS = 0x1000000
"""Of code: annotations are not evaluated."""

_Node: TypeAlias = ast.FunctionDef | ast.Lambda


def source_of(function: Any, name: str) -> dict[str, Any]:
    """Return the description of a function by the text that makes it.

    Parameters
    ----------
    function : callable
        One that is written in Python, or `functools.partial` of one.
    name : str
        How messages call it.

    Raises
    ------
    TypeError
        If something that it uses cannot be written down; the message says what.
    """
    text = _Text()
    made = text.expression(function, name)
    if not made.isidentifier():
        made = text.keep(made, name)
    spec: dict[str, Any] = {"source": text.finished(), "name": made}
    if text.folders:
        spec["folders"] = list(text.folders)
    return spec


class _Text:
    """Text that makes things, each under a name of its own, and at its end binds globals to them.

    Functions see the names that a worker's ``init`` has bound before their own globals.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._globals: dict[str, tuple[Any, str]] = {}
        self._made: dict[int, tuple[Any, str]] = {}
        self._open: set[int] = set()
        self._count = 0
        self.folders: dict[str, None] = {}
        """Where modules of the user's are."""

    def finished(self) -> str:
        """Return the text."""
        ends = [
            f"{name} = _given.get({name!r}, {made})\n" for name, (_, made) in self._globals.items()
        ]
        begin = "from __future__ import annotations\n_given = dict(globals())\n"
        return "".join([begin, *self._parts, *ends])

    def expression(self, value: Any, name: str) -> str:
        """Return what evaluates to a value after the text so far."""
        atom = _atom(value)
        if atom is not None:
            return atom
        if id(value) in self._made:
            return self._made[id(value)][1]
        if id(value) in self._open:
            raise TypeError(f"{name} is used by itself, in a way that cannot be sent; {ADVICE}")
        self._open.add(id(value))
        try:
            made = self._make(value, name)
        finally:
            self._open.discard(id(value))
        self._made[id(value)] = value, made
        return made

    def keep(self, expression: str, name: str) -> str:
        """Give the value of an expression a name."""
        made = self._new(name)
        self._parts.append(f"{made} = {expression}\n")
        return made

    def _new(self, name: str) -> str:
        self._count += 1
        last = name.rpartition(" ")[2].rpartition(".")[2]
        readable = last if last.isidentifier() and not keyword.iskeyword(last) else "made"
        return f"_{self._count}_{readable}"

    def _make(self, value: Any, name: str) -> str:
        kind = type(value)
        if kind in (tuple, list, set, frozenset):
            items = [self.expression(item, f"an item of {name}") for item in value]
            inside = f"[{', '.join(items)}]"
            return self.keep(inside if kind is list else f"{kind.__name__}({inside})", name)
        if kind is dict:
            items = [
                f"{self.expression(k, f'a key of {name}')}: {self.expression(v, f'{name}[{k!r}]')}"
                for k, v in value.items()
            ]
            return self.keep(f"{{{', '.join(items)}}}", name)
        if isinstance(value, (np.ndarray, np.generic)):
            return self.keep(_array(value, name), name)
        if isinstance(value, functools.partial):
            inner = [
                self.expression(value.func, name),
                *(self.expression(v, f"an argument of {name}") for v in value.args),
                *(f"{k}={self.expression(v, f'{k} of {name}')}" for k, v in value.keywords.items()),
            ]
            return self.keep(f"__import__('functools').partial({', '.join(inner)})", name)
        if isinstance(value, enum.Enum):
            return f"{self.expression(kind, f'the class of {name}')}[{value.name!r}]"
        if isinstance(value, logging.Logger):
            return self.keep(f"__import__('logging').getLogger({value.name!r})", name)
        if isinstance(value, ModuleType):
            return self._module(value, name)
        if isinstance(value, NamedFunction):
            if value.file is None:
                return self._imported(value.place, value.attribute, name)
            return self.keep(f"_import_file({value.place!r}).{value.attribute}", name)
        public = public_name(value) if callable(value) else None
        if public is not None:
            return self._imported(*public, name)
        if isinstance(value, FunctionType):
            return self._function(value, name)
        is_class = isinstance(value, type)
        what = f"the class {value.__qualname__}" if is_class else f"a {kind.__qualname__}"
        raise TypeError(f"{name} is {what}, which cannot be sent to another Python; {ADVICE}")

    def _module(self, module: ModuleType, name: str) -> str:
        title = module.__name__
        if getattr(module, "__spec__", None) is None or title.startswith("cellimg_file."):
            raise TypeError(f"{name} is the module {title}, which cannot be imported; {ADVICE}")
        self._search(title)
        return self.keep(f"__import__('importlib').import_module({title!r})", name)

    def _imported(self, module: str, title: str, name: str) -> str:
        self._search(module)
        return self.keep(f"__import__('importlib').import_module({module!r}).{title}", name)

    def _search(self, module: str) -> None:
        folder = folder_of(module)
        if folder is not None:
            self.folders[folder] = None

    def _function(self, function: FunctionType, name: str) -> str:
        variables = dict(
            zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        )
        itself, enclosed = None, {}
        for variable, cell in variables.items():
            try:
                value = cell.cell_contents
            except ValueError:
                raise TypeError(
                    f"{name} uses {variable!r} of the function around it, which has no value yet"
                ) from None
            if value is function:
                itself = variable
            else:
                enclosed[variable] = self.expression(value, f"{name}'s variable {variable}")
        written, node, code = _written(function, list(enclosed), itself, name)
        made = self._new(name)
        if written.startswith("def _maker"):
            self._parts.append(f"{written}{made} = _maker({', '.join(enclosed.values())})\n")
        else:
            self._parts.append(f"{written}{made} = {function.__code__.co_name}\n")
        # Known before what it uses: that may be the function itself.
        self._made[id(function)] = function, made
        for attribute in ("__defaults__", "__kwdefaults__"):
            value = getattr(function, attribute)
            if value:
                default = self.expression(value, f"the defaults of {name}")
                self._parts.append(f"{made}.{attribute} = {default}\n")
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                for alias in inner.names:
                    self._search(alias.name)
            elif isinstance(inner, ast.ImportFrom):
                if inner.level:
                    raise TypeError(f"{name} imports relatively to its package; {ADVICE}")
                self._search(str(inner.module))
        for variable in sorted(compiled.globals_read(code) & function.__globals__.keys()):
            self._bind(variable, function.__globals__[variable], name)
        return made

    def _bind(self, variable: str, value: Any, name: str) -> None:
        known = self._globals.get(variable)
        if known is None:
            # Before it is made: what it uses may use it.
            self._globals[variable] = value, ""
            made = self.expression(value, f"{name}'s global {variable}")
            self._globals[variable] = value, made
        elif known[0] is not value:
            raise TypeError(
                f"{name} uses functions of several modules, and {variable!r} is not the same in "
                f"them; {ADVICE}"
            )


# ------------------------------------------------------------------------------ values


def _atom(value: Any) -> str | None:
    """Return a plain value as an expression, None where it is not one."""
    kind = type(value)
    if value is None or value is Ellipsis or value is NotImplemented:
        return str(value)
    if kind in (bool, int, str, range) or (kind is bytes and len(value) <= _LARGEST):
        return repr(value)
    if kind is float:
        return repr(value) if math.isfinite(value) else f"float('{value}')"
    if kind is complex:
        return f"complex({_atom(value.real)}, {_atom(value.imag)})"
    if kind is slice:
        ends = [_atom(end) for end in (value.start, value.stop, value.step)]
        return None if None in ends else f"slice({', '.join(map(str, ends))})"
    if isinstance(value, np.dtype):
        return f"__import__('numpy').dtype({_dtype(value)})"
    if isinstance(value, PurePath):
        return f"__import__('pathlib').Path({str(value)!r})"
    if kind is re.Pattern:
        return f"__import__('re').compile({value.pattern!r}, {value.flags})"
    return None


def _dtype(dtype: np.dtype[Any]) -> str:
    if dtype.names is not None:
        assert dtype.fields is not None
        fields = [dtype.fields[name] for name in dtype.names]
        formats = ", ".join(_dtype(field[0]) for field in fields)
        offsets = [field[1] for field in fields]
        return (
            f"{{'names': {list(dtype.names)}, 'formats': [{formats}], 'offsets': {offsets}, "
            f"'itemsize': {dtype.itemsize}}}"
        )
    if dtype.subdtype is not None:
        return f"({_dtype(dtype.subdtype[0])}, {dtype.subdtype[1]})"
    return repr(dtype.str)


def _array(value: Any, name: str) -> str:
    if value.dtype.hasobject or (isinstance(value, np.ndarray) and type(value) is not np.ndarray):
        raise TypeError(f"{name} is a {type(value).__qualname__}, which cannot be sent; {ADVICE}")
    if value.nbytes > _LARGEST:
        raise TypeError(
            f"{name} is an array of {value.nbytes / 2**20:.1f} MiB, too large to be sent with the "
            f"function: give it as one of params=, as an input, or load it in init"
        )
    file = io.BytesIO()
    np.save(file, value, allow_pickle=False)
    text = base64.b64encode(file.getvalue()).decode()
    read = f"__import__('io').BytesIO(__import__('base64').b64decode('{text}'))"
    return f"__import__('numpy').load({read}){'' if isinstance(value, np.ndarray) else '[()]'}"


# ------------------------------------------------------------------------------ functions


def _written(
    function: FunctionType, variables: list[str], itself: str | None, name: str
) -> tuple[str, _Node, CodeType]:
    """Return the statement that makes a function, how it is written, and its code.

    Where it is not written at the left margin, or is a lambda, the statement defines ``_maker``,
    which makes it from the variables of the function around it.
    """
    code = function.__code__
    # Of a file that has been changed since.
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise TypeError(f"the source of {name} is not known here; {ADVICE}")
    node = _definition("".join(lines), code)
    if node is None:
        raise TypeError(
            f"the source of {name}, in {code.co_filename}, is not what it was made from: the file "
            f"has been changed since, or it was made by other means; {ADVICE}"
        )
    begin = f"def _maker({', '.join(variables)}):\n"
    if isinstance(node, ast.Lambda):
        result = itself or "_lambda"
        body = _without_defaults(lines, node)
        written = f"{begin} {result} = ({body}\n )\n return {result}\n"
    elif node.decorator_list:
        raise TypeError(
            f"{name} has a decorator, {ast.unparse(node.decorator_list[0])!r}, which cannot be "
            f"sent with it; {ADVICE}"
        )
    else:
        own = f"{_without_defaults(lines, node)}\n"
        indent = own[: len(own) - len(own.lstrip())]
        written = f"{begin}{own}{indent}return {code.co_name}\n" if indent else own
    # Annotations in it are not evaluated where it goes.
    sent = compile(written, "<source>", "exec", _ANNOTATIONS, dont_inherit=True)
    inner = next(part for part in compiled.codes(sent) if part.co_name == code.co_name)
    return written, node, inner


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> tuple[list[_Node], list[CodeType]]:
    """Return all functions in a text, as they are written and as they are compiled."""
    try:
        tree = ast.parse(text)
        codes = list(compiled.codes(compile(text, "<source>", "exec", dont_inherit=True)))
    except (SyntaxError, ValueError):
        return [], []
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    return nodes, codes


def _definition(text: str, code: CodeType) -> _Node | None:
    """Return where code is written in a text, None where the text does not make it."""
    nodes, codes = _parsed(text)
    line = code.co_firstlineno
    found: list[_Node] = []
    if not any(_same(code, each) for each in codes if each.co_firstlineno == line):
        return None
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            begin = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            if node.name == code.co_name and begin == line:
                found.append(node)
        elif code.co_name == "<lambda>" and node.lineno == line:
            found.append(node)
    if len(found) > 1:
        # Several lambdas in a line: what each computes last stands where its body stands.
        places = set(code.co_positions())
        found = [node for node in found if _place(node) in places]
    return found[0] if len(found) == 1 else None


def _place(node: _Node) -> Any:
    body = node.body if isinstance(node, ast.Lambda) else node
    return body.lineno, body.end_lineno, body.col_offset, body.end_col_offset


def _without_defaults(lines: list[str], node: _Node) -> str:
    """Return the text of a function, with None for defaults: these were evaluated already."""
    assert node.end_lineno is not None
    own = [line.encode() for line in lines[node.lineno - 1 : node.end_lineno]]
    own[-1] = own[-1][: node.end_col_offset]
    defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
    for default in sorted(defaults, key=lambda each: (-each.lineno, -each.col_offset)):
        assert default.end_lineno is not None
        first, last = default.lineno - node.lineno, default.end_lineno - node.lineno
        before = own[first][: default.col_offset]
        after = own[last][default.end_col_offset :]
        own[first : last + 1] = [before + b"None" + after]
    if isinstance(node, ast.Lambda):
        own[0] = own[0][node.col_offset :]
    return b"".join(own).decode()


def _same(first: Any, second: Any) -> bool:
    """Whether two codes do the same, wherever they are written."""
    if type(first) is not type(second):
        return False
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if not isinstance(first, CodeType):
        # 0.0 and -0.0 are equal.
        exact = not isinstance(first, (float, complex)) or repr(first) == repr(second)
        return bool(first == second) and exact
    return all(
        _same(getattr(first, part), getattr(second, part))
        for part in (
            "co_name",
            "co_code",
            "co_names",
            "co_varnames",
            "co_freevars",
            "co_cellvars",
            "co_argcount",
            "co_posonlyargcount",
            "co_kwonlyargcount",
            "co_consts",
        )
    )
