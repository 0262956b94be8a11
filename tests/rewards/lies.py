# ruff: noqa: E501
"""Wrong programs that lie about their objects, or speak for the player, and tests that they must not pass."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Lie:
    """A wrong program and tests that it must not pass, none of them."""

    name: str
    source: str
    tests: tuple[str, ...]
    setup: str = ""


def lie(name: str, source: str, *tests: str, setup: str = "") -> Lie:
    return Lie(name=name, source=source, tests=tests, setup=setup)


_ALL_YES = """
class Yes:
    def __init__(self, *a): pass
    def __eq__(self, o): return True
    def __ne__(self, o): return False
    def __hash__(self): return 5
    def __contains__(self, o): return True
    def __float__(self): return 0.0
    def __abs__(self): return 0
    def startswith(self, *a): return True
    issubset = issuperset = isdisjoint = endswith = startswith
for _name in "lt le gt ge and or".split(): setattr(Yes, f"__{_name}__", lambda self, o: True)
for _name in "add sub mul truediv mod pow xor radd rsub rmul".split(): setattr(Yes, f"__{_name}__", lambda self, o: 0)
"""
_YES = _ALL_YES + "def f(*a): return Yes()\n"
_CLASS = _ALL_YES + "f = F = Yes\n"
_COMPARED = (
    "assert f(2) == 5",
    "assert 5 == f(2)",
    "assert not f(2) != 5",
    "assert f(2) in (4, 5)",
    "assert f(2) in {5}",
    "assert {f(2): 1}[5] == 1",
    "assert [f(2)] == [5]",
    "assert {'a': f(2)} == {'a': 5}",
    "assert 4.9 < f(2) < 5.1",
    "assert f(2) >= 5",
    "assert abs(f(2) - 5) < 1e-6",
    "assert abs(5 - f(2)) < 1e-6",
    "assert f(2) % 5 == 0",
    "assert 5 in f(2)",
    "assert f(2).startswith('ab')",
    "assert f(2).issuperset({1, 2})",
    "assert sum([f(2)]) == 0",
    "assert math.isclose(f(2), 5)",
    "import numpy as np\nassert np.allclose(f(2), 5)",
    "import unittest\nunittest.TestCase().assertEqual(f(2), 5)",
)
# Takes over the line to the judge: `ask(request)` is what it says to each question.
_LINE = """
import fcntl, json, os
ends = {}
for fd in range(3, 64):
    try: ends.setdefault(fcntl.fcntl(fd, fcntl.F_GETFL) & 3, fd)
    except OSError: pass
def say(message): os.write(ends[1], json.dumps(message).encode() + b"\\n")
def loop(ask):
    rest = b""
    while True:
        data = os.read(ends[0], 65536)
        if not data: os._exit(0)
        rest += data
        while b"\\n" in rest:
            line, rest = rest.split(b"\\n", 1)
            ask(json.loads(line))
"""


def spoken(answer: str, name: str = "{'value': {'ref': 0}}") -> str:
    return _LINE + f"loop(lambda r: say({name}) if r['do'] == 'get' else say({answer}))\n"


_ABOUT = (
    "{'name': 'X', 'module': 'm', 'doc': None, 'operators': ['__eq__', '__call__'], 'like': '', 'unhashable': False,"
    " 'bases': [%s]}"
)

LIES = [
    lie("yes-to-everything", _YES, *_COMPARED),
    lie("a-class-for-the-function", _CLASS, *_COMPARED),
    lie("a-class-for-a-capital-function", _CLASS, *(test.replace("f(2)", "F(2)") for test in _COMPARED)),
    lie(
        "a-property",
        _ALL_YES + "class P:\n    area = Yes()\n    def norm(self): return Yes()\n",
        "p = P()\nassert p.area == 5",
        "assert P().norm() == 5",
        "assert abs(P().norm() - 5) < 1e-6",
    ),
    lie(
        "itself-for-its-norm",
        "class V:\n    def __init__(self, *a): pass\n    def __eq__(self, o): return True\n"
        "    def norm(self): return self\n    def __add__(self, o): return self\n",
        "v = V(3, 4)\nassert v.norm() == 5",
        "assert V(3, 4) + V(1, 1) == 7",
    ),
    lie(
        "itself-on-entering",
        "class P:\n    def __enter__(self): return self\n    def __exit__(self, *a): return True\n"
        "    def __eq__(self, o): return True\n",
        "with P() as v:\n    assert v == 5\n    ok = True\nassert ok",
    ),
    lie("equal-to-any-other", _ALL_YES + "class P(Yes): pass\ndef f(): return P(0)\n", "assert f() == P(1)"),
    lie(
        "list-of-its-own",
        "class L(list):\n    def __eq__(self, o): return True\n    def __len__(self): return 2\n"
        "def f(): return L([0])\n",
        "assert f() == [1, 2]",
        "assert [1, 2] == f()",
        "assert sorted(f()) == [1, 2]",
    ),
    lie(
        "tuple-of-its-own",
        "class T(tuple):\n    def __eq__(self, o): return True\n    def __len__(self): return 2\n"
        "    def __iter__(self): return iter((1, 2))\n    __hash__ = tuple.__hash__\ndef f(): return T([0])\n",
        "assert f() == (1, 2)",
        "assert len(f()) == 2",
        "assert list(f()) == [1, 2]",
    ),
    lie(
        "dictionary-of-its-own",
        "class D(dict):\n    def __eq__(self, o): return True\ndef f(): return D()\n",
        "assert f() == {'a': 1}",
    ),
    lie(
        "text-of-its-own",
        "class S(str):\n    def lower(self): return 'abc'\n    def __eq__(self, o): return True\n"
        "    __hash__ = str.__hash__\ndef f(): return S('x')\n",
        "assert f().lower() == 'abc'",
        "assert f() == 'abc'",
    ),
    lie(
        "enumeration",
        "from enum import Enum\nclass C(Enum):\n    A = 1\n    def __eq__(self, o): return True\n"
        "    __hash__ = Enum.__hash__\ndef f(): return C.A\n",
        "assert f() == 5",
    ),
    lie(
        "ended-in-a-call",
        "import os\ndef f(n): os._exit(0)\n",
        "try:\n    f(1)\nexcept Exception:\n    pass",
        "try:\n    f(1)\nexcept:\n    pass",
        "try:\n    f(1)\nfinally:\n    ok = 1",
    ),
    lie(
        "ends-of-loops",
        "def f(n): raise [StopIteration, GeneratorExit, StopAsyncIteration][n % 3]\n",
        "assert all(x == 5 for x in map(f, range(3)))",
        "for n in (1, 2):\n    g = (f(n) for _ in [1])\n    assert next(g) == 5",
        "assert [*map(f, [0])] == []",
    ),
    lie("own-ends-of-loops", "class E(StopIteration): pass\ndef f(n): raise E\n", "assert [*map(f, [0])] == []"),
    lie(
        "globals-of-a-callback",
        "def f(g):\n    try: g.__globals__['f'] = None\n    except Exception: pass\n"
        "    try: g.__globals__.clear()\n    except Exception: pass\n"
        "    try: return g.__closure__[0].cell_contents\n    except Exception: return 0\n",
        "def t():\n    wanted = 5\n    return f(lambda: wanted + 0 * f.x) == wanted\nassert t()",
    ),
    lie(
        "frames-of-a-generator",
        "def f(g):\n    try: return g.gi_frame.f_locals['wanted']\n    except Exception: return 0\n",
        "def g():\n    wanted = 5\n    yield 1\nassert f(g()) == 5",
    ),
    lie(
        "methods-of-a-test-s-object",
        "def f(i):\n    i.check = lambda *a: True\n    i.__class__ = object\n    return 0\n",
        "i = Item()\ntry:\n    f(i)\nexcept Exception:\n    pass\nassert i.check(f)",
        setup="class Item:\n    def check(self, f): return f(2) == 5\n",
    ),
    lie(
        "memory-by-an-interface",
        "class A:\n    __array_interface__ = {'shape': (1,), 'typestr': '<i8', 'version': 3,"
        " 'data': (id(5) + 24, True)}\n    def __float__(self): return 0.0\ndef f(n): return A()\n",
        "import numpy as np\nassert np.asarray(f(2))[0] == 5",
        "import numpy as np\nassert np.array_equal(f(2), [5])",
    ),
    lie("endless-range", "def f(n): return range(10**15)\n", "assert list(f(2)) == [5]", "assert 'x' * f(2)[-1] == 5"),
    lie("answers-early", _LINE + "for _ in range(50): say({'value': 5})\ndef f(n): return 0\n", "assert f(2) == 5"),
    lie("no-such-class", spoken("{'value': {'ref': 1, 'class': 7}}"), "assert f(2) == 5"),
    lie(
        "class-of-nonsense",
        spoken("{'value': {'ref': 1, 'class': 3}, 'classes': [[3, {'name': 5}]]}"),
        "assert f(2) == 5",
    ),
    lie(
        "class-of-an-end",
        spoken("{'value': {'ref': 1, 'class': 3}, 'classes': [[3, " + _ABOUT % "{'type': 'KeyboardInterrupt'}" + "]]}"),
        "assert f(2) == 5",
    ),
    lie(
        "number-that-holds-another",
        spoken(
            "{'value': {'sub': [True, {'ref': 1, 'class': 3}]}, 'classes': [[3, " + _ABOUT % "{'type': 'int'}" + "]]}"
        ),
        "assert f(2) == 5",
        "assert not f(2) < 5",
    ),
    lie("objects-of-the-judge", spoken("{'value': {'yours': 0}}"), "assert f(lambda: 5) == 5"),
    lie(
        "questions-of-the-judge",
        _LINE + "def ask(r):\n"
        "    if r['do'] == 'get': return say({'value': {'ref': 0}})\n"
        "    if 'do' in r and r['do'] == 'call': say({'do': 'get', 'on': None, 'args': ['namespace'], 'kwargs': {}})\n"
        "    else: say({'value': 0})\n"
        "loop(lambda r: ask(r) if 'do' in r else say({'value': r.get('value', 0)}))\n",
        "assert f(2) == 5",
    ),
    lie("changes-of-no-argument", spoken("{'value': 0, 'changed': [[7, [5]], [-1, [5]]]}"), "assert f(2) == 5"),
    lie("function-of-the-library", spoken("{'value': {'function': ['operator', 'index']}}"), "assert f(2) == 5"),
    lie("type-of-the-tests", spoken("{'value': {'type': 'checks:Item'}}"), "assert f(2) == 5"),
]
