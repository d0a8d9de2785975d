"""Contents: equal for the same computation in any process, another after every edit."""

from __future__ import annotations

import collections
import enum
import functools
import importlib
import logging
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.special
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

import cellimg_dask as ci
from cellimg_dask.blocks.content import (
    NoContentError,
    array_content,
    digest,
    dtype_content,
    value_content,
)


def of(value: Any) -> str:
    return digest(value_content(value))


def defined(source: str, name: str = "f", module: str = "some_script") -> Any:
    """Return what a source text defines, as a script would."""
    space: dict[str, Any] = {"__name__": module}
    exec(compile(textwrap.dedent(source), "<script>", "exec", dont_inherit=True), space)
    return space[name]


SAME = {
    "lines moved": ("def f(a):\n    return a + 1", "\n\n\n\ndef f(a):\n\n    return a + 1"),
    "comments": ("def f(a): return a + 1", "# Adds.\ndef f(a):  # one\n    return a + 1"),
    "formatting": ("def f(a,b=2): return (a+b)", "def f(\n    a,\n    b=2,\n):\n    return a + b"),
    "docstring edited": ('def f(a):\n    "1"\n    return a', 'def f(a):\n    "2"\n    return a'),
    "docstring added": ("def f(a): a[:] = 1", 'def f(a):\n    """Fill."""\n    a[:] = 1'),
    "docstring of a generator's helper": (
        "def g(a):\n    yield a\n    yield None\ndef f(a): return list(g(a))",
        'def g(a):\n    """Yield."""\n    yield a\n    yield None\ndef f(a): return list(g(a))',
    ),
    "docstring of a class": (
        "class C:\n    x = 1\ndef f(a): return a + C.x",
        'class C:\n    """C."""\n\n    x = 1\ndef f(a): return a + C.x',
    ),
    "annotations": ("def f(a): return a", "def f(a: int) -> int: return a"),
    "the function's name": ("def f(a): return a", "def g(a): return a\nf = g"),
    "an unused global": ("N = 1\ndef f(a): return a", "N = 2\ndef f(a): return a"),
    "an unused function": ("def g(): return 1\ndef f(a): return a", "def f(a): return a"),
    "order of a dict": ("D = {1: 2, 3: 4}\nf = lambda a: D", "D = {3: 4, 1: 2}\nf = lambda a: D"),
    "other lines of a nested function": (
        "def f(a):\n    g = lambda b: b + 1\n    return g(a)",
        "def f(a):\n    # Adds.\n\n    g = lambda b: b + 1\n    return g(a)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_what_changes_nothing(what):
    before, after = SAME[what]
    assert of(defined(before)) == of(defined(after))


EDITS = {
    "body": ("def f(a): return a + 1", "def f(a): return a + 2"),
    "operator": ("def f(a): return a + 1", "def f(a): return a - 1"),
    "kind of a constant": ("def f(a): return a + 1", "def f(a): return a + 1.0"),
    "sign of zero": ("def f(a): return a * 0.0", "def f(a): return a * -0.0"),
    "a text that is returned": ("def f(a): return 'x'", "def f(a): return 'y'"),
    "method called": ("def f(a): return a.min()", "def f(a): return a.max()"),
    "keyword": ("def f(a): return a.sum(axis=0)", "def f(a): return a.mean(axis=0)"),
    "default": ("def f(a, n=1): return a + n", "def f(a, n=2): return a + n"),
    "keyword-only default": ("def f(a, *, n=1): return a + n", "def f(a, *, n=2): return a + n"),
    "order of parameters": ("def f(a, b): return a - b", "def f(b, a): return a - b"),
    "kind of a parameter": ("def f(*a): return a", "def f(**a): return a"),
    # The same steps, but for what is caught.
    "what try covers": (
        "def f(a):\n    try:\n        a()\n        a()\n    except E: return 1",
        "def f(a):\n    try:\n        a()\n    except E: return 1\n    else:\n        a()",
    ),
    "exception caught": (
        "def f(a):\n    try: return a()\n    except KeyError: return 1",
        "def f(a):\n    try: return a()\n    except ValueError: return 1",
    ),
    "a generator": ("def f(a):\n    return [a]", "def f(a):\n    yield [a]"),
    "global": ("N = 1\ndef f(a): return a + N", "N = 2\ndef f(a): return a + N"),
    "item of a global": ("N = [1, 2]\ndef f(a): return N", "N = [1, 3]\ndef f(a): return N"),
    "global array": (
        "import numpy as np\nN = np.arange(9)\ndef f(a): return a + N",
        "import numpy as np\nN = np.arange(9) // 1 * 1; N[8] = 7\ndef f(a): return a + N",
    ),
    "global in a lambda inside": (
        "N = 1\ndef f(a): return map(lambda b: b + N, a)",
        "N = 2\ndef f(a): return map(lambda b: b + N, a)",
    ),
    "global that hides a builtin": (
        "def f(a): return max(a)",
        "def max(a): return 1\ndef f(a): return max(a)",
    ),
    "closure": (
        "def make(n):\n    def f(a): return a + n\n    return f\nf = make(1)",
        "def make(n):\n    def f(a): return a + n\n    return f\nf = make(2)",
    ),
    "function in a closure": (
        "def make(g):\n    def f(a): return g(a)\n    return f\nf = make(lambda a: a)",
        "def make(g):\n    def f(a): return g(a)\n    return f\nf = make(lambda a: -a)",
    ),
    "helper": (
        "def g(a): return a + 1\ndef f(a): return g(a)",
        "def g(a): return a + 2\ndef f(a): return g(a)",
    ),
    "helper of a helper": (
        "def h(a): return 1\ndef g(a): return h(a)\ndef f(a): return g(a)",
        "def h(a): return 2\ndef g(a): return h(a)\ndef f(a): return g(a)",
    ),
    "helper that calls back": (
        "def g(a): return f(a - 1) + 1 if a else 0\ndef f(a): return g(a)",
        "def g(a): return f(a - 1) + 2 if a else 0\ndef f(a): return g(a)",
    ),
    "recursion": (
        "def f(a): return f(a - 1) if a else 0",
        "def f(a): return f(a - 1) if a else 1",
    ),
    "helper in a table": (
        "def g(a): return 1\nT = {'g': [g]}\ndef f(a): return T['g'][0](a)",
        "def g(a): return 2\nT = {'g': [g]}\ndef f(a): return T['g'][0](a)",
    ),
    "which of two equal helpers": (
        "def g(a): return 1\ndef h(a): return 2\nT = (g, h)\ndef f(a): return T",
        "def g(a): return 1\ndef h(a): return 2\nT = (h, g)\ndef f(a): return T",
    ),
    "cached helper": (
        "import functools\n@functools.cache\ndef g(a): return 1\ndef f(a): return g(a)",
        "import functools\n@functools.cache\ndef g(a): return 2\ndef f(a): return g(a)",
    ),
    "decorated by one's own": (
        "def d(g):\n    def inner(a): return g(a)\n    return inner\n@d\ndef f(a): return 1",
        "def d(g):\n    def inner(a): return g(a)\n    return inner\n@d\ndef f(a): return 2",
    ),
    "own decorator": (
        "def d(g):\n    def inner(a): return g(a)\n    return inner\n@d\ndef f(a): return 1",
        "def d(g):\n    def inner(a): return -g(a)\n    return inner\n@d\ndef f(a): return 1",
    ),
    "decorated by the standard library's wraps": (
        ("import functools\ndef d(g):\n    @functools.wraps(g)\n    def inner(a): return g(a)\n"
        "    return inner\n@d\ndef f(a): return 1"),
        ("import functools\ndef d(g):\n    @functools.wraps(g)\n    def inner(a): return g(a)\n"
        "    return inner\n@d\ndef f(a): return 2"),
    ),
    "attribute of the function": (
        "def f(a): return a * f.scale\nf.scale = 1",
        "def f(a): return a * f.scale\nf.scale = 2",
    ),
    "method": (
        "class C:\n    def m(self): return 1\ndef f(a): return C().m()",
        "class C:\n    def m(self): return 2\ndef f(a): return C().m()",
    ),
    "static method": (
        "class C:\n    @staticmethod\n    def m(): return 1\ndef f(a): return C.m()",
        "class C:\n    @staticmethod\n    def m(): return 2\ndef f(a): return C.m()",
    ),
    "class method": (
        "class C:\n    @classmethod\n    def m(cls): return 1\ndef f(a): return C.m()",
        "class C:\n    @classmethod\n    def m(cls): return 2\ndef f(a): return C.m()",
    ),
    "property": (
        "class C:\n    @property\n    def m(self): return 1\ndef f(a): return C().m",
        "class C:\n    @property\n    def m(self): return 2\ndef f(a): return C().m",
    ),
    "cached property": (
        ("import functools\nclass C:\n    @functools.cached_property\n    def m(self): return 1\n"
        "def f(a): return C().m"),
        ("import functools\nclass C:\n    @functools.cached_property\n    def m(self): return 2\n"
        "def f(a): return C().m"),
    ),
    "class attribute": (
        "class C:\n    n = 1\ndef f(a): return C.n",
        "class C:\n    n = 2\ndef f(a): return C.n",
    ),
    "list that is a class attribute": (
        "class C:\n    n = [1]\ndef f(a): return C.n",
        "class C:\n    n = [2]\ndef f(a): return C.n",
    ),
    "array that is a class attribute": (
        "import numpy as np\nclass C:\n    n = np.ones(1)\ndef f(a): return C.n",
        "import numpy as np\nclass C:\n    n = np.zeros(1)\ndef f(a): return C.n",
    ),
    "class in a class": (
        "class C:\n    class D:\n        n = 1\ndef f(a): return C.D.n",
        "class C:\n    class D:\n        n = 2\ndef f(a): return C.D.n",
    ),
    "base class": (
        "class B:\n    def m(self): return 1\nclass C(B): pass\ndef f(a): return C().m()",
        "class B:\n    def m(self): return 2\nclass C(B): pass\ndef f(a): return C().m()",
    ),
    "method that calls super": (
        ("class B:\n    def m(self): return 1\nclass C(B):\n    def m(self): return super().m()\n"
        "def f(a): return C().m()"),
        ("class B:\n    def m(self): return 2\nclass C(B):\n    def m(self): return super().m()\n"
        "def f(a): return C().m()"),
    ),
    "callable object": (
        ("class C:\n    def __init__(self, n): self.n = n\n"
        "    def __call__(self, a): return self.n\n"
        "f = C(1)"),
        ("class C:\n    def __init__(self, n): self.n = n\n"
        "    def __call__(self, a): return self.n\n"
        "f = C(2)"),
    ),
    "bound method": (
        ("class C:\n    def __init__(self, n): self.n = n\n    def m(self, a): return self.n\n"
        "f = C(1).m"),
        ("class C:\n    def __init__(self, n): self.n = n\n    def m(self, a): return self.n\n"
        "f = C(2).m"),
    ),
    "slots": (
        "class C:\n    __slots__ = 'n'\n    def __init__(self, n): self.n = n\nf = C(1)",
        "class C:\n    __slots__ = 'n'\n    def __init__(self, n): self.n = n\nf = C(2)",
    ),
    "default of a dataclass": (
        ("from dataclasses import dataclass\n@dataclass\nclass C:\n    n: int = 1\n"
        "def f(a): return C().n"),
        ("from dataclasses import dataclass\n@dataclass\nclass C:\n    n: int = 2\n"
        "def f(a): return C().n"),
    ),
    "value of an enum": (
        "import enum\nclass E(enum.Enum):\n    A = 1\ndef f(a, e=E.A): return e.value",
        "import enum\nclass E(enum.Enum):\n    A = 2\ndef f(a, e=E.A): return e.value",
    ),
    "member of an enum by name": (
        "import enum\nclass E(enum.IntEnum):\n    A = 1\ndef f(a): return E.A",
        "import enum\nclass E(enum.IntEnum):\n    A = 2\ndef f(a): return E.A",
    ),
    "items of a list of one's own kind": (
        "class L(list): pass\nN = L([1])\ndef f(a): return N",
        "class L(list): pass\nN = L([2])\ndef f(a): return N",
    ),
    "items of a dict of one's own kind": (
        "class L(dict): pass\nN = L(a=1)\ndef f(a): return N",
        "class L(dict): pass\nN = L(a=2)\ndef f(a): return N",
    ),
    "values of an array of one's own kind": (
        "import numpy as np\nclass L(np.ndarray): pass\nN = np.ones(2).view(L)\nf = lambda a: N",
        "import numpy as np\nclass L(np.ndarray): pass\nN = np.zeros(2).view(L)\nf = lambda a: N",
    ),
    "argument of a partial": (
        "import functools\ndef g(a, n): return n\nf = functools.partial(g, n=1)",
        "import functools\ndef g(a, n): return n\nf = functools.partial(g, n=2)",
    ),
    "function of a partial": (
        "import functools\ndef g(a, n): return n\nf = functools.partial(g, n=1)",
        "import functools\ndef g(a, n): return -n\nf = functools.partial(g, n=1)",
    ),
    "table whose method is called": (
        "import numpy as np\nf = np.array([1, 2, 3]).take",
        "import numpy as np\nf = np.array([1, 2, 4]).take",
    ),
    "table that is indexed": (
        "import numpy as np\nf = np.array([1, 2, 3]).__getitem__",
        "import numpy as np\nf = np.array([1, 2, 4]).__getitem__",
    ),
    "dict whose method is called": ("f = {1: 2}.get", "f = {1: 3}.get"),
    "which package's function": ("from math import floor as f", "from math import ceil as f"),
    "which ufunc": ("from numpy import sin as f", "from numpy import cos as f"),
    "package imported inside": (
        "def f(a):\n    from math import floor as g\n    return g(a)",
        "def f(a):\n    from math import ceil as g\n    return g(a)",
    ),
    "mask of an array": (
        "import numpy as np\nN = np.ma.array([1, 2], mask=[0, 1])\ndef f(a): return N",
        "import numpy as np\nN = np.ma.array([1, 2], mask=[1, 0])\ndef f(a): return N",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_every_edit_is_another_content(what):
    before, after = map(defined, EDITS[what])
    assert of(before) == of(defined(EDITS[what][0]))
    assert of(before) != of(after)


# ---------------------------------------------------------------- modules of the user's


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module, and give up what was imported of it before."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    names = set()

    def write(name: str, source: str) -> None:
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        if name.endswith(".__init__"):
            name = name.removesuffix(".__init__")
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))
        # A file that is written twice within a second looks the same to the import system.
        stamp = time.time_ns() + 10**9 * (len(names) + 1)
        os.utime(path, ns=(stamp, stamp))
        names.add(name)
        for known in list(sys.modules):
            if known.partition(".")[0] == name.partition(".")[0]:
                del sys.modules[known]
        importlib.invalidate_caches()
        names.add(f"{name} {stamp}")

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    for known in list(sys.modules):
        if known.partition(".")[0].startswith("users_"):
            del sys.modules[known]


USES = {
    "by attribute": "import users_own\ndef f(a): return users_own.g(a)",
    "by name": "from users_own import g\ndef f(a): return g(a)",
    "as another name": "import users_own as own\ndef f(a): return own.g(a)",
    "inside": "def f(a):\n    import users_own\n    return users_own.g(a)",
    "inside by name": "def f(a):\n    from users_own import g\n    return g(a)",
    "inside by another name": "def f(a):\n    from users_own import g as h\n    return h(a)",
    "in a lambda": "import users_own\nf = lambda a: [users_own.g(b) for b in a]",
    "in a closure": (
        "import users_own\ndef make(m):\n    def f(a): return m.g(a)\n    return f\n"
        "f = make(users_own)"
    ),
    "in a class": (
        "import users_own\nclass C:\n    def m(self): return users_own.g(1)\nf = lambda a: C().m()"
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_an_edit_of_a_module_of_the_users_is_seen(user_module, use):
    user_module("users_own", "N = 1\nM = 1\ndef g(a): return N\ndef other(a): return M\n")
    before = of(defined(USES[use]))
    user_module("users_own", "M = 1\ndef other(a): return M\n\nN = 1\ndef g(a): return N  # same\n")
    assert of(defined(USES[use])) == before
    user_module("users_own", "N = 1\nM = 2\ndef g(a): return N\ndef other(a): return M\n")
    assert of(defined(USES[use])) == before, "what is not used does not count"
    user_module("users_own", "N = 2\nM = 1\ndef g(a): return N\ndef other(a): return M\n")
    assert of(defined(USES[use])) != before


@pytest.mark.parametrize(
    "use",
    [
        "import users_kit.part\ndef f(a): return users_kit.part.g(a)",
        "from users_kit import part\ndef f(a): return part.g(a)",
        "def f(a):\n    import users_kit.part\n    return users_kit.part.g(a)",
        "def f(a):\n    from users_kit import part\n    return part.g(a)",
        "def f(a):\n    from users_kit.part import g\n    return g(a)",
        "from users_kit import through as f",
    ],
)
def test_an_edit_in_a_package_of_the_users_is_seen(user_module, use):
    init = "def through(a):\n    from .part import g\n    return g(a)\n"
    user_module("users_kit.__init__", init)
    user_module("users_kit.part", "def g(a): return 1\n")
    before = of(defined(use))
    user_module("users_kit.part", "def g(a):\n    # one\n    return 1\n")
    assert of(defined(use)) == before
    user_module("users_kit.part", "def g(a): return 2\n")
    assert of(defined(use)) != before


def test_content_is_the_same_before_and_after_the_function_imported_something(user_module):
    user_module("users_own", "def g(a): return a\n")
    function = defined("def f(a):\n    import users_own, colorsys\n    return users_own.g(a)")
    sys.modules.pop("colorsys", None)
    before = of(function)
    assert function(3) == 3
    assert of(function) == before
    # A name that happens to be that of a module says nothing.
    loaded = defined("def f(a): return a.colorsys")
    sys.modules.pop("colorsys", None)
    before = of(loaded)
    importlib.import_module("colorsys")
    assert of(loaded) == before


def test_an_import_that_fails_here_is_part_of_the_content_or_refused(user_module):
    source = "def f(a):\n    try:\n        import users_absent\n    except ImportError: pass\n"
    without = of(defined(source))
    assert of(defined(source)) == without
    user_module("users_absent", "")
    assert of(defined(source)) != without
    user_module("users_absent", "raise RuntimeError('no GPU')")
    with pytest.raises(NoContentError, match=r"users_absent.*RuntimeError: no GPU"):
        of(defined(source))


def test_block_code_is_its_code_and_what_it_imports(user_module):
    user_module("users_own", "def g(a): return 1\ndef h(a): return 1\n")
    code = ci.BlockCode("block.data[...] = g(block.inputs[0])", init="from users_own import g")
    before = of(code)
    again = "# Fills.\nblock.data[...] = g(\n    block.inputs[0])"
    assert of(ci.BlockCode(again, code.init)) == before
    assert of(ci.BlockCode("block.data[...] = -g(block.inputs[0])", code.init)) != before
    assert of(ci.BlockCode(code.code, "from users_own import h as g")) != before
    user_module("users_own", "def g(a): return 1\ndef h(a): return 2\n")
    assert of(code) == before
    user_module("users_own", "def g(a): return 2\ndef h(a): return 2\n")
    assert of(code) != before


def test_installed_packages_are_their_name_and_version(monkeypatch):
    from cellimg_dask.blocks import content

    def f(a):
        import skimage.filters

        return ndimage.gaussian_filter(skimage.filters.sobel(a), 1)

    now = {"f": of(f), "function": of(ndimage.gaussian_filter), "module": of(ndimage)}
    versions = {"scipy": "99", "scikit-image": "1"}
    real = content.version
    content._version.cache_clear()
    monkeypatch.setattr(content, "version", lambda name: versions.get(name) or real(name))
    try:
        assert all(
            of(value) != now[name]
            for name, value in {
                "f": f,
                "function": ndimage.gaussian_filter,
                "module": ndimage,
            }.items()
        )
        before = of(f)
        content._version.cache_clear()
        # Found by the name of its distribution, whether or not it was imported.
        versions["scikit-image"] = "2"
        assert of(f) != before
    finally:
        content._version.cache_clear()


def test_a_module_that_is_called_as_one_of_pythons_is_the_users(tmp_path):
    path = tmp_path / "signal.py"
    path.write_text("def f(a): return a + 1\n")
    spec = importlib.util.spec_from_file_location("signal", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = of(module.f)
    path.write_text("def f(a): return a + 2\n")
    os.utime(path, (1, 1))
    spec.loader.exec_module(module)
    assert of(module.f) != before


def test_many_functions_that_call_each_other_are_described_in_no_time():
    names = [f"g{number}" for number in range(40)]
    calls = " + ".join(f"{name}(a)" for name in names)
    source = "\n".join(f"def {name}(a): return {calls}" for name in names)
    space: dict[str, Any] = {}
    exec(source, space)
    before = of(space["g0"])
    exec("def g39(a): return 1", space)
    assert of(space["g0"]) != before


PROGRAM = """
import sys
sys.path[:0] = {path!r}
{early}
import functools, numpy as np
from cellimg_dask.blocks.content import digest, value_content
import users_everything
print(digest(value_content(users_everything.f)))
"""

EVERYTHING = """
import enum, functools, logging, math, re
from dataclasses import dataclass, field
from typing import NamedTuple
import numpy as np
from scipy import ndimage
import skimage

log = logging.getLogger("users")
WORDS = {"one", "two", "three", "four"}
TABLE = {b"x": 1, ("a", 2.5): None, frozenset((1, "b", 2.0)): [..., 1j]}
LOOKUP = np.arange(12, dtype=">i2").reshape(3, 4)
ABSENT = object()

class Kind(enum.Flag):
    A = 1
    B = 2

class Pair(NamedTuple):
    a: int
    b: int = 2

@dataclass
class Options:
    kind: Kind = Kind.A | Kind.B
    pairs: list = field(default_factory=lambda: [Pair(1)])
    @functools.cached_property
    def total(self): return sum(pair.a for pair in self.pairs)
    def again(self): return f({self.total})

def helper(a, names={"p", "q", "r"}):
    import colorsys
    return {name for name in names if name in {"x", "y", "zz"}}

def f(a, options=Options(), pattern=re.compile("a+")):
    log.info("%s", skimage.__name__)
    if options is ABSENT or a in ("e", "d"):
        return helper(a), WORDS, math.pi
    return functools.partial(ndimage.gaussian_filter, sigma=np.float32(2)), TABLE, LOOKUP
"""


def test_content_is_the_same_in_every_process(user_module, tmp_path):
    user_module("users_everything", EVERYTHING)

    def seen(seed: int, early: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(path=[str(tmp_path / "modules")], early=early)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = seen(1)
    assert len(first) == 33
    # Also where other modules were imported before.
    assert seen(2, "import colorsys, signal, random, test, skimage.filters, scipy.signal") == first
    here = importlib.import_module("users_everything")
    assert digest(value_content(here.f)) + "\n" == first


# ---------------------------------------------------------------- what has no content


class Locked:
    def __init__(self):
        self.guard = threading.Lock()


class Lucky(random.Random):
    pass


LOCK = threading.Lock()


@pytest.mark.parametrize(
    ("value", "culprit"),
    [
        (threading.Lock(), "value is a _thread.lock"),
        ({"a": [1, threading.RLock()]}, r"value\['a'\]\[1\] is a _thread.RLock"),
        ((n for n in range(3)), "value is a builtins.generator"),
        (lambda a: a[LOCK], "global LOCK is a _thread.lock"),
        (Locked(), "value.guard is a _thread.lock"),
        (Locked, None),
        (functools.partial(max, key=Locked()), r"the arguments of value\[1\]\['key'\].guard"),
        (np.array([None]), "an array of Python objects"),
        ({"x": np.array(["a"], np.dtypes.StringDType())}, r"value\['x'\].*Python objects"),
        (np.zeros(2, [("a", "O")]), "Python objects"),
        (np.zeros(2, [("a", "O")])[0], "Python objects"),
        (np.frompyfunc(lambda a: a, 1, 1), "ufunc"),
        (np.random.default_rng(1), "numpy.random._generator.Generator"),
        (Lucky(1), "Lucky"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (Fraction(1, 2), "fractions.Fraction"),
        (iter([1]), "builtins.list_iterator"),
        (np.nditer([1]), "nditer"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(value, culprit):
    if culprit is None:
        value_content(value)
    else:
        with pytest.raises(NoContentError, match=culprit):
            value_content(value)


def test_an_open_file_is_refused_by_name(tmp_path):
    with (tmp_path / "log").open("w") as file:

        def f(a):
            file.write("x")

        with pytest.raises(NoContentError, match=r"file of .*TextIOWrapper, of which cannot be"):
            value_content(f)
    with pytest.raises(NoContentError, match="file of f"):
        value_content(f, "f")


def test_stores_are_not_taken_for_their_handles(tmp_path):
    import h5py
    import zarr

    stored = zarr.create_array(tmp_path / "a.zarr", data=np.arange(4))
    with h5py.File(tmp_path / "a.h5", "w") as file, pytest.raises(NoContentError, match="h5py"):
        value_content({"a": file})
    with pytest.raises(NoContentError):
        value_content(lambda a: a + stored[:])
    image = ci.map_cells(np.negative, np.arange(4))
    with pytest.raises(NoContentError):
        value_content(lambda a: a + image[:])


def test_plain_objects_of_packages_have_content():
    assert of(ci.Roi((0,), (2,))) == of(ci.Roi((0,), (2,))) != of(ci.Roi((0,), (3,)))
    assert of(logging.getLogger("a")) != of(logging.getLogger("b"))
    assert of(np.ndarray.sum) != of(np.ndarray.min)
    assert of(str.upper) != of(str.lower)
    assert of(scipy.special.gamma) != of(scipy.special.erf)
    assert of(math.floor) != of(math.ceil)
    assert of(re.compile("a")) != of(re.compile("a", re.IGNORECASE)) != of(re.compile(b"a"))
    # What only stands for something.
    assert of(object()) == of(object())


def test_a_path_is_also_the_file_there(tmp_path):
    path = tmp_path / "model.bin"
    nothing = of(path)
    path.write_bytes(b"one")
    first = of(path)
    path.write_bytes(b"two")
    assert len({nothing, first, of(path)}) == 3
    path.write_bytes(b"one")
    assert of(path) == first
    assert of(pathlib.PurePosixPath("a")) != of("a")


# ---------------------------------------------------------------- values


class Colour(enum.Enum):
    RED = 1
    BLUE = "1"


class Point(NamedTuple):
    x: int
    y: int


@dataclass
class Options:
    a: Any
    b: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Tight:
    a: Any


DIFFERENT = [
    1, 1.0, True, "1", b"1", 1 + 0j, None, ..., 0, 0.0, -0.0, False, "", b"", (), [], {}, set(),
    math.nan, math.inf, -math.inf, 2**70, "None", "True", (1,), [1], {1}, {1: None}, [[1]], [(1,)],
    np.int64(1), np.int32(1), np.float64(1), np.float32(1), np.True_, np.bytes_(b"1"),
    np.str_("1"), np.complex64(1), np.float64(-0.0), np.float64(0.0), np.float64("nan"),
    np.datetime64(1, "s"), np.datetime64(1, "ms"), np.array(1), np.array([1]), np.array([[1]]),
    np.array([1.0]), np.array([1], "i4"), np.array([1], ">i8"), np.array([True]), np.array([]),
    np.zeros((0, 2)), np.zeros((2, 0)), np.zeros(2), -np.zeros(2), np.array(["1"]),
    np.array([b"1"]), np.zeros(1, "i4,f8"), np.zeros(1, [("a", "i4"), ("b", "f8")]),
    np.zeros(1, [("b", "i4"), ("a", "f8")]), np.zeros(1, [("a", "i4", 2)]),
    np.zeros(1, "V12"), np.zeros(1, [("a", "i4"), ("b", "f8")])[0], np.zeros(1, "V12")[0],
    np.dtype("i4"), np.dtype(">i4"), np.dtype("i4,f8"), np.int32, int, float, np.dtype("O"),
    np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 0]}),
    np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [4, 0]}),
    range(3), range(4), slice(3), slice("3"), slice(None), slice("None"), (None, 3, None),
    Colour.RED, Colour.BLUE, Point(1, 2), Point(2, 1), (1, 2), [1, 2], Options(1), Options(1, [2]),
    Options(1.0), Tight(1), Tight(2), frozenset((1, 2)), {"a": 1, "b": 2}, {"a": 2, "b": 1},
    {"a": {"b": 1}}, {("a", "b"): 1}, [{"a": 1}], [{"a": 1}, {}], ["a", "b"], ["ab"], ["a,b"],
]  # fmt: skip


def test_different_values_differ():
    found: dict[str, Any] = {}
    for value in DIFFERENT:
        content = of(value)
        assert content not in found, (value, found.get(content))
        found[content] = value


def test_attributes_that_are_no_fields_count():
    one, two = Options(1), Options(1)
    one.extra, two.extra = 1, 2
    assert of(one) != of(two) != of(Options(1))


def test_what_was_computed_from_attributes_does_not_count():
    source = """
        from functools import cached_property
        class Options:
            def __init__(self, sigma):
                self.sigma = sigma
            @cached_property
            def radius(self):
                return 4 * self.sigma
    """
    make = defined(source, "Options")
    options, before = make(2), of(make(2))
    assert options.radius == 8
    assert of(options) == before
    assert of(defined(source.replace("4", "3"), "Options")(2)) != before


def test_dtypes_of_pandas():
    import pandas as pd

    dtypes = [
        "Int64",
        "string",
        "str",
        "datetime64[ns, UTC]",
        pd.CategoricalDtype(["a", "b"]),
        pd.CategoricalDtype(["b", "a"]),
        pd.CategoricalDtype([1, 2]),
        pd.CategoricalDtype(["a", "b"], ordered=True),
        pd.CategoricalDtype(),
    ]
    contents = [of(pd.api.types.pandas_dtype(dtype)) for dtype in dtypes]
    assert len(set(contents)) == len(dtypes)
    assert contents[1] == of(pd.StringDtype())
    assert contents[4] == of(pd.CategoricalDtype(["a", "b"]))


@pytest.mark.parametrize("head", ["", "    __slots__ = ('sigma',)\n"])
def test_what_was_pickled_is_still_the_same(head):
    options = defined(f"class Options:\n{head}    pass", "Options")()
    options.sigma = 2
    before = of(options)
    options.__reduce_ex__(4)
    assert of(options) == before


def test_layout_in_memory_does_not_count(tmp_path):
    array = np.arange(24).reshape(2, 3, 4)
    assert of(array) == of(np.asfortranarray(array)) == of(np.arange(48)[::2].reshape(2, 3, 4) // 2)
    np.save(tmp_path / "a.npy", array)
    assert of(np.load(tmp_path / "a.npy", mmap_mode="r")) == of(array)
    assert array_content(array) == array_content(array.copy())


def test_circles_end():
    circle: list[Any] = [1]
    circle.append(circle)
    other: list[Any] = [1]
    other.append(other)
    assert of(circle) == of(other) != of([1, [1]])
    pair: dict[str, Any] = {}
    pair["self"] = [pair]
    assert of(pair) != of({"self": []})


def test_sets_of_functions_do_not_depend_on_their_order():
    def make(n):
        return lambda a: a + n

    one, two = {make(n) for n in range(20)}, {make(n) for n in reversed(range(20))}
    assert of(one) == of(two) != of({make(n) for n in range(1, 21)})


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.sampled_from([np.int8(1), np.float32(0.5), np.True_, np.uint64(3)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=3)
        | st.frozensets(st.integers() | st.text(max_size=2), max_size=3)
    ),
    max_leaves=8,
)


def written(value: Any) -> str:
    """Return an independent text that is equal for equal values of equal kind only."""
    if isinstance(value, dict):
        return f"{{{sorted((written(k), written(v)) for k, v in value.items())}}}"
    if isinstance(value, frozenset):
        return f"set{sorted(map(written, value))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}[{', '.join(map(written, value))}]"
    return f"{type(value).__name__} {value!r}"


@settings(max_examples=60)
@given(plain, plain)
@example([1], [True])
@example({"a": 1, "b": 2}, {"b": 2, "a": 1})
@example([0.0], [-0.0])
@example([math.nan], [math.nan])
def test_contents_are_equal_exactly_where_values_are(one, two):
    assert (of(one) == of(two)) == (written(one) == written(two))


@given(plain)
def test_a_copy_has_the_same_content(value):
    import copy
    import pickle

    assert of(value) == of(copy.deepcopy(value)) == of(pickle.loads(pickle.dumps(value)))


dtypes = st.sampled_from(
    [np.dtype(d) for d in ("?", "u1", "<i2", ">i2", "f2", "<f8", ">f8", "c8", "S2", "U1", "i1,f4")]
)


@given(dtypes, dtypes)
def test_dtypes_are_equal_exactly_where_their_content_is(one, two):
    assert (dtype_content(one) == dtype_content(two)) == (one == two)


@given(st.data(), dtypes, st.lists(st.integers(0, 3), max_size=3))
def test_one_changed_element_is_another_content(data, dtype, shape):
    size = math.prod(shape)
    content = data.draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    array = np.frombuffer(content, dtype, count=size).reshape(shape).copy()
    assert of(array) == of(array.copy())
    if size and dtype.kind in "iuf?":
        position = data.draw(st.integers(0, size - 1))
        edited = array.copy()
        flat = edited.reshape(-1).view(np.uint8)
        flat[position * dtype.itemsize] ^= 1
        assert of(edited) != of(array)
        assert of([{"a": edited}]) != of([{"a": array}])
