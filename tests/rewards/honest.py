# ruff: noqa: E501
"""Right programs of many shapes with tests that use what they define; all must pass all their tests."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Honest:
    """A right program and tests that it passes.

    Args:
      name: for the test's id.
      source: the program.
      tests: statements, every one of which holds.
      setup: of the tests.
      entry_point: as in `Assertions`.
      prompt: as in `Assertions`.
    """

    name: str
    source: str
    tests: tuple[str, ...]
    setup: str = ""
    entry_point: str = ""
    prompt: str = ""


def case(name: str, source: str, *tests: str, setup: str = "", entry_point: str = "", prompt: str = "") -> Honest:
    return Honest(name=name, source=source, tests=tests, setup=setup, entry_point=entry_point, prompt=prompt)


STACK = """
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self):
        if not self.items: raise IndexError("pop from an empty stack")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __bool__(self): return bool(self.items)
    def __iter__(self): return iter(self.items)
    def __contains__(self, item): return item in self.items
    def __reversed__(self): return reversed(self.items)
    def __getitem__(self, i): return self.items[i]
    def __setitem__(self, i, value): self.items[i] = value
    def __delitem__(self, i): del self.items[i]
    def __repr__(self): return f"Stack({self.items!r})"
"""
VECTOR = """
import math
class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __eq__(self, o): return isinstance(o, Vector) and (self.x, self.y) == (o.x, o.y)
    def __hash__(self): return hash((self.x, self.y))
    def __add__(self, o): return Vector(self.x + o.x, self.y + o.y)
    def __radd__(self, o): return self if o == 0 else NotImplemented
    def __sub__(self, o): return Vector(self.x - o.x, self.y - o.y)
    def __mul__(self, k): return Vector(self.x * k, self.y * k)
    __rmul__ = __mul__
    def __neg__(self): return Vector(-self.x, -self.y)
    def __abs__(self): return math.hypot(self.x, self.y)
    def __matmul__(self, o): return self.x * o.x + self.y * o.y
    def __iadd__(self, o): self.x += o.x; self.y += o.y; return self
    def __lt__(self, o): return abs(self) < abs(o)
    def __round__(self, n=0): return Vector(round(self.x, n), round(self.y, n))
    def __format__(self, spec): return f"<{self.x:{spec}}|{self.y:{spec}}>"
    def __str__(self): return f"({self.x}, {self.y})"
    @property
    def length(self): return abs(self)
    @classmethod
    def unit(cls): return cls(1, 0)
    @staticmethod
    def dimensions(): return 2
"""
SHAPES = """
from abc import ABC, abstractmethod
class Shape(ABC):
    @abstractmethod
    def area(self): ...
class Square(Shape):
    def __init__(self, a): self.a = a
    def area(self): return self.a ** 2
class Circle(Shape):
    def __init__(self, r): self.r = r
    def area(self): return 3.14159 * self.r ** 2
def largest(shapes): return max(shapes, key=lambda s: s.area())
"""
ACCOUNT = """
class BankError(Exception): pass
class InsufficientFunds(BankError):
    def __init__(self, needed, available):
        super().__init__(f"need {needed}, have {available}")
        self.needed, self.available = needed, available
class Account:
    def __init__(self, balance=0): self._balance = balance
    @property
    def balance(self): return self._balance
    @balance.setter
    def balance(self, value):
        if value < 0: raise ValueError("negative")
        self._balance = value
    def withdraw(self, amount):
        if amount > self._balance: raise InsufficientFunds(amount, self._balance)
        self._balance -= amount
        return self._balance
"""
NODE = """
class Node:
    def __init__(self, value, next=None): self.value, self.next = value, next
def build(values):
    head = None
    for value in reversed(values): head = Node(value, head)
    return head
def reverse(head):
    last = None
    while head: head.next, last, head = last, head, head.next
    return last
"""

HONEST = [
    case(
        "iterator-that-begins-anew",
        "class Count:\n    def __init__(self, n): self.n = n\n    def __iter__(self): self.i = 0; return self\n"
        "    def __next__(self):\n        if self.i >= self.n: raise StopIteration\n        self.i += 1\n"
        "        return self.i\n",
        "c = Count(3)\nassert list(c) == [1, 2, 3] and list(c) == [1, 2, 3]",
        "assert sum(Count(50)) == 1275 and iter(c := Count(1)) is c",
    ),
    case(
        "data-of-its-own-as-arguments",
        "from collections import namedtuple\nfrom enum import IntEnum\nP = namedtuple('P', 'x y')\n"
        "class L(IntEnum):\n    A = 1\n    B = 2\nclass S(str): pass\ndef flip(p): return P(p.y, p.x)\n"
        "def after(level): return L(level + 1) if isinstance(level, L) else None\ndef same(s): return isinstance(s, S)\n",
        "assert flip(P(1, 2)) == P(2, 1) == (2, 1) and flip(flip(P([3], 4))).x == [3]",
        "assert after(L.A) == L.B == 2 and after(L.A).name == 'B'",
        "assert same(S('a')) and not same('a')",
    ),
    case("length", STACK, "s = Stack()\nassert len(s) == 0 and not s\ns.push(1).push(2)\nassert len(s) == 2 and s"),
    case("iteration", STACK, "assert [x for x in Stack([1, 2])] == [1, 2]", "assert sum(Stack([4, 5])) == 9"),
    case("unpacking", STACK, "a, *b = Stack([1, 2, 3])\nassert a == 1 and b == [2, 3]"),
    case("membership", STACK, "s = Stack()\ns.push(4)\nassert 4 in s and 5 not in s"),
    case("reversal", STACK, "assert list(reversed(Stack([1, 2]))) == [2, 1]"),
    case("items", STACK, "s = Stack([1, 2, 3])\ns[0] = 9\ndel s[1]\nassert s[0] == 9 and list(s) == [9, 3]"),
    case("slices", STACK, "assert Stack([1, 2, 3])[1:] == [2, 3]"),
    case("representation", STACK, "assert repr(Stack([1])) == 'Stack([1])' and f'{Stack([1])!r}' == 'Stack([1])'"),
    case("fluent", STACK, "s = Stack()\nassert s.push(1) is s and s.push(2) is not Stack()"),
    case(
        "common-exception",
        STACK,
        "try:\n    Stack().pop()\nexcept IndexError as e:\n    assert str(e) == 'pop from an empty stack'\n"
        "else:\n    assert False",
    ),
    case("attribute", STACK, "s = Stack()\ns.items = [7]\nassert s.pop() == 7 and hasattr(s, 'items')"),
    case("deleted-attribute", "class A: pass\n", "a = A()\na.x = 1\ndel a.x\nassert not hasattr(a, 'x')"),
    case("equality", VECTOR, "assert Vector(1, 2) == Vector(1, 2)", "assert Vector(1, 2) != Vector(2, 1)"),
    case("unequal-to-data", VECTOR, "assert Vector(1, 2) != (1, 2) and not Vector(1, 2) == 5"),
    case("arithmetic", VECTOR, "assert Vector(1, 2) + Vector(3, 4) - Vector(1, 1) == Vector(3, 5)"),
    case("scalars", VECTOR, "assert Vector(1, 2) * 3 == Vector(3, 6)", "assert 2 * Vector(1, 2) == Vector(2, 4)"),
    case("unary", VECTOR, "assert -Vector(1, 2) == Vector(-1, -2)", "assert abs(Vector(3, 4)) == 5.0"),
    case("matrix-product", VECTOR, "assert Vector(1, 2) @ Vector(3, 4) == 11"),
    case("in-place", VECTOR, "v = w = Vector(1, 1)\nv += Vector(1, 0)\nassert v == Vector(2, 1) and v is w"),
    case("sum-of-objects", VECTOR, "v = Vector(0, 0)\nassert sum([Vector(1, 2), Vector(3, 4)]) == Vector(4, 6) != v"),
    case("set-of-objects", VECTOR, "assert len({Vector(1, 2), Vector(1, 2), Vector(2, 1)}) == 2"),
    case("keys", VECTOR, "d = {Vector(1, 2): 'a'}\nassert d[Vector(1, 2)] == 'a' and Vector(0, 0) not in d"),
    case("sorting", VECTOR, "s = sorted([Vector(3, 4), Vector(0, 1)])\nassert [v.y for v in s] == [1, 4]"),
    case("comparison", VECTOR, "assert Vector(0, 1) < Vector(3, 4) and max(Vector(1, 0), Vector(0, 9)).y == 9"),
    case("text", VECTOR, "assert str(Vector(1, 2)) == '(1, 2)' and f'{Vector(1, 2):.1f}' == '<1.0|2.0>'"),
    case("rounding", VECTOR, "assert round(Vector(1.26, 2.0), 1) == Vector(1.3, 2.0)"),
    case("property", VECTOR, "assert Vector(3, 4).length == 5"),
    case("class-method", VECTOR, "assert Vector.unit() == Vector(1, 0)", "assert isinstance(Vector.unit(), Vector)"),
    case("static-method", VECTOR, "assert Vector.dimensions() == 2 == Vector(0, 0).dimensions()"),
    case("list-of-objects", VECTOR, "assert [Vector(0, 1)] == [Vector(0, 1)] and Vector(0, 1) in [Vector(0, 1)]"),
    case("type", VECTOR, "assert type(Vector(1, 2)) is Vector and type(Vector(1, 2)).__name__ == 'Vector'"),
    case("abstract-base", SHAPES, "assert isinstance(Square(2), Shape) and issubclass(Circle, Shape)"),
    case("abstract-refused", SHAPES, "try:\n    Shape()\n    assert False\nexcept TypeError:\n    pass"),
    case("polymorphism", SHAPES, "assert [round(s.area(), 2) for s in [Square(2), Circle(1)]] == [4, 3.14]"),
    case("objects-as-arguments", SHAPES, "a, b = Square(2), Square(3)\nassert largest([a, b]) is b"),
    case(
        "own-exception",
        ACCOUNT,
        "try:\n    Account(5).withdraw(7)\nexcept InsufficientFunds as e:\n"
        "    assert (e.needed, e.available, str(e)) == (7, 5, 'need 7, have 5')\nelse:\n    assert False",
    ),
    case(
        "base-exception-of-own",
        ACCOUNT,
        "try:\n    Account().withdraw(1)\n    ok = False\nexcept BankError:\n    ok = True\nassert ok",
    ),
    case(
        "exception-hierarchy",
        ACCOUNT,
        "assert issubclass(InsufficientFunds, BankError) and issubclass(BankError, Exception)",
    ),
    case(
        "property-setter",
        ACCOUNT,
        "a = Account(1)\na.balance = 5\nassert a.balance == 5 and a.withdraw(2) == 3",
        "try:\n    Account().balance = -1\n    assert 0\nexcept ValueError as e:\n    assert 'neg' in str(e)",
    ),
    case(
        "raised-and-caught-inside",
        "class E(Exception): pass\ndef f(x):\n    try:\n        if x: raise E\n        return 0\n    except E:\n        return 1\n",
        "assert (f(0), f(1)) == (0, 1)",
    ),
    case(
        "assertion-raised",
        "def f(x):\n    assert x > 0, 'positive'\n    return x\n",
        "try:\n    f(-1)\nexcept AssertionError as e:\n    assert str(e) == 'positive'\nelse:\n    raise RuntimeError",
    ),
    case(
        "exit-raised",
        "import sys\ndef f(): sys.exit(3)\n",
        "try:\n    f()\nexcept SystemExit as e:\n    assert e.code == 3\nelse:\n    assert False",
    ),
    case(
        "library-exception",
        "import json\ndef f(s): return json.loads(s)\n",
        "import json\ntry:\n    f('{')\n    assert False\nexcept json.JSONDecodeError as e:\n    assert e.pos == 1",
    ),
    case(
        "exception-value",
        "def f(): return ValueError('x')\n",
        "assert isinstance(f(), ValueError) and f().args == ('x',)",
    ),
    case(
        "linked-list",
        NODE,
        "h = reverse(build([1, 2, 3]))\nv = []\nwhile h:\n    v.append(h.value)\n    h = h.next\nassert v == [3, 2, 1]",
    ),
    case("nested-objects", NODE, "n = Node(1, Node(2))\nassert n.next.value == 2 and n.next.next is None"),
    case(
        "named-tuple",
        "from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\n    y: int = 2\n    def s(self): return self.x + self.y\n",
        "p = P(1)\nassert p == (1, 2) and p.x == 1 and p.s() == 3 and p._asdict() == {'x': 1, 'y': 2}",
        "x, y = P(5, 6)\nassert (x, y) == (5, 6) and P(1) in {P(1, 2)} and isinstance(P(1), tuple) and repr(P(1)) == 'P(x=1, y=2)'",
    ),
    case(
        "data-class",
        "from dataclasses import dataclass, field\n@dataclass(order=True)\nclass P:\n    x: int\n    tags: list = field(default_factory=list)\n",
        "assert P(1) == P(1, []) and P(1) < P(2) and P(3).tags == []",
        "assert repr(P(1)) == 'P(x=1, tags=[])' and sorted([P(2), P(1)])[0].x == 1",
    ),
    case(
        "frozen-data-class",
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass P:\n    x: int\n",
        "import dataclasses\ntry:\n    P(1).x = 2\n    assert False\nexcept dataclasses.FrozenInstanceError:\n    pass",
        "assert len({P(1), P(1)}) == 1",
    ),
    case(
        "enum",
        "from enum import Enum, IntEnum\nclass C(Enum):\n    A = 1\n    B = 'b'\nclass L(IntEnum):\n    LOW = 1\n    HIGH = 2\ndef f(x): return C.A if x else C.B\n",
        "assert f(1) is C.A and f(0) == C.B and C.A.name == 'A' and C('b') is C.B",
        "assert [c.value for c in C] == [1, 'b'] and C['A'] is C.A and len(C) == 2",
        "assert L.HIGH > L.LOW and L.HIGH == 2 and L(1) is L.LOW and isinstance(L.LOW, int)",
        "assert f(1) in (C.A, C.B) and f(1) in {C.A}",
    ),
    case(
        "generator",
        "def f(n):\n    for i in range(n): yield i * i\n",
        "assert list(f(4)) == [0, 1, 4, 9]",
        "g = f(2)\nassert next(g) == 0 and next(g) == 1 and next(g, None) is None",
        "assert sum(f(2000)) == sum(i * i for i in range(2000))",
    ),
    case(
        "endless-generator",
        "def f():\n    a, b = 0, 1\n    while True:\n        yield a\n        a, b = b, a + b\n",
        "import itertools\nassert list(itertools.islice(f(), 50))[-1] == 7778742049",
        "assert [x for x, _ in zip(f(), range(4))] == [0, 1, 1, 2]",
    ),
    case(
        "generator-protocol",
        "def f():\n    total = 0\n    while True:\n        x = yield total\n        if x is None: return\n        total += x\n",
        "g = f()\nnext(g)\nassert g.send(3) == 3 and g.send(4) == 7\ng.close()",
        "import types\nassert isinstance(f(), types.GeneratorType)",
    ),
    case(
        "iterator-class",
        "class Count:\n    def __init__(self, n): self.n = n\n    def __iter__(self): return self\n    def __next__(self):\n        if self.n <= 0: raise StopIteration\n        self.n -= 1\n        return self.n\n",
        "assert list(Count(3)) == [2, 1, 0]",
        "c = Count(1)\nassert next(c) == 0\ntry:\n    next(c)\n    assert False\nexcept StopIteration:\n    pass",
    ),
    case(
        "sequence-protocol",
        "class R:\n    def __getitem__(self, i):\n        if i > 2: raise IndexError\n        return i * 2\n",
        "assert list(R()) == [0, 2, 4] and R()[1] == 2",
    ),
    case(
        "callable-class",
        "class Adder:\n    def __init__(self, n): self.n = n\n    def __call__(self, x): return x + self.n\n",
        "add = Adder(3)\nassert add(4) == 7 and callable(add) and list(map(add, [1, 2])) == [4, 5]",
    ),
    case(
        "context-manager-class",
        "class T:\n    def __init__(self): self.log = []\n    def __enter__(self): self.log.append('in'); return self\n    def __exit__(self, kind, error, trace): self.log.append(kind.__name__ if kind else 'out'); return kind is ValueError\n",
        "t = T()\nwith t as u:\n    assert u is t\nassert t.log == ['in', 'out']",
        "t = T()\nwith t:\n    raise ValueError\nassert t.log == ['in', 'ValueError']",
    ),
    case(
        "context-manager-function",
        "from contextlib import contextmanager\n@contextmanager\ndef f(log):\n    log.append(1)\n    try: yield 5\n    finally: log.append(2)\nLOG = []\ndef use():\n    return f(LOG)\n",
        "with use() as v:\n    assert v == 5\nassert LOG[-2:] != [2, 2]",
    ),
    case(
        "closure",
        "def counter():\n    n = 0\n    def tick():\n        nonlocal n\n        n += 1\n        return n\n    return tick\n",
        "c, d = counter(), counter()\nassert [c(), c(), d()] == [1, 2, 1]",
    ),
    case(
        "decorator",
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def g(*a, **k): return 2 * f(*a, **k)\n    return g\n",
        "@twice\ndef h(x, y=1): return x + y\nassert h(3) == 8 and h(1, y=2) == 6 and h.__name__ == 'h'",
    ),
    case(
        "counting-decorator",
        "def counted(f):\n    def g(*a):\n        g.calls += 1\n        return f(*a)\n    g.calls = 0\n    return g\n",
        "g = counted(lambda x: x)\ng(1), g(2)\nassert g.calls == 2",
    ),
    case(
        "compose",
        "def compose(*fs):\n    def h(x):\n        for f in reversed(fs): x = f(x)\n        return x\n    return h\n",
        "assert compose(lambda x: x + 1, lambda x: x * 2)(5) == 11",
        "assert compose(str, len)('abc') == '3'",
        "import math, operator\nassert compose(math.sqrt, operator.neg)(-9) == 3.0",
    ),
    case(
        "callback",
        "def apply(f, xs): return [f(x) for x in xs]\n",
        "assert apply(lambda x: x * x, [1, 2]) == [1, 4]",
        "assert apply(str.upper, ['a']) == ['A']",
        "seen = []\napply(seen.append, [1, 2])\nassert seen == [1, 2]",
    ),
    case(
        "callback-raises",
        "def safe(f):\n    try: return f()\n    except ZeroDivisionError: return 'caught'\n",
        "assert safe(lambda: 1 / 0) == 'caught' and safe(lambda: 4) == 4",
    ),
    case(
        "callback-error-through",
        "def run(f): return f()\n",
        "class Mine(Exception): pass\ndef bad(): raise KeyError('k')\ntry:\n    run(bad)\n    assert False\nexcept KeyError as e:\n    assert e.args == ('k',)",
    ),
    case(
        "key-function",
        "def by(xs, key): return sorted(xs, key=key)\n",
        "from operator import itemgetter\nassert by([(2, 'a'), (1, 'b')], itemgetter(0))[0] == (1, 'b')",
        "assert by(['bb', 'a'], len) == ['a', 'bb']",
    ),
    case(
        "recursion",
        "def depth(x): return 1 + max(map(depth, x), default=0) if isinstance(x, list) else 0\n",
        "assert depth([1, [2, [3]]]) == 3",
    ),
    case(
        "mutated-list",
        "def f(a): a.reverse(); a.append(0)\n",
        "a = [1, 2]\nb = a\nassert f(a) is None and a == [2, 1, 0] and b is a",
    ),
    case(
        "mutated-matrix",
        "def f(m):\n    m[:] = [list(r) for r in zip(*m[::-1])]\n",
        "m = [[1, 2], [3, 4]]\nf(m)\nassert m == [[3, 1], [4, 2]]",
    ),
    case(
        "mutated-row",
        "def f(m): m[0][0] = 9\n",
        "row = [1]\nm = [row, row]\nf(m)\nassert row == [9] and m[1] == [9] and m[0] is row",
    ),
    case(
        "mutated-dictionary",
        "def f(d):\n    d['n'] = d.get('n', 0) + 1\n    return d\n",
        "d = {}\nassert f(d) is d and f(d) == {'n': 2} == d",
    ),
    case("mutated-set", "def f(s, x): s.discard(x)\n", "s = {1, 2}\nf(s, 2)\nassert s == {1}"),
    case(
        "shared-items",
        "def f(n): return [[0] * n] * n\n",
        "m = f(2)\nassert m[0] is m[1]\nm[0][0] = 5\nassert m[1] == [5, 0]",
    ),
    case(
        "collections",
        "from collections import *\ndef c(): return Counter('aab')\ndef d(): return deque([1, 2], maxlen=2)\ndef e(): return defaultdict(list, a=[1])\ndef o(): return OrderedDict(a=1)\ndef m(): return ChainMap({'a': 1}, {'b': 2})\n",
        "assert c().most_common(1) == [('a', 2)] and c() + c() == {'a': 4, 'b': 2}",
        "q = d()\nq.append(3)\nassert list(q) == [2, 3] and q.popleft() == 2",
        "x = e()\nx['b'].append(2)\nassert x == {'a': [1], 'b': [2]}",
        "assert list(o().items()) == [('a', 1)]",
        "assert m()['b'] == 2 and 'a' in m()",
    ),
    case(
        "dictionary-views",
        "def f(): return {'a': 1}.keys()\ndef g(): return {'a': 1}.items()\n",
        "assert f() == {'a'} and sorted(f()) == ['a'] and list(g()) == [('a', 1)]",
    ),
    case(
        "numbers",
        "from decimal import Decimal\nfrom fractions import Fraction\ndef d(): return Decimal('1.10')\ndef f(): return Fraction(1, 3)\ndef c(): return 1 + 2j\n",
        "from decimal import Decimal\nassert d() == Decimal('1.1') and str(d()) == '1.10'",
        "from fractions import Fraction\nassert f() * 3 == 1 and f() == Fraction(2, 6)",
        "assert c().imag == 2 and abs(c()) ** 2 > 4.99",
    ),
    case(
        "dates",
        "import datetime as dt\ndef f(s): return dt.datetime.strptime(s, '%Y-%m-%d')\ndef g(): return dt.timedelta(days=2)\ndef z(): return dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)\n",
        "import datetime\nassert f('2020-02-03') == datetime.datetime(2020, 2, 3) and g().days == 2 and (f('2020-02-03') + g()).day == 5",
        "assert z().utcoffset().total_seconds() == 0",
    ),
    case(
        "array",
        "from array import array\ndef f(): return array('i', [1, 2])\ndef b(): return bytearray(b'ab')\ndef m(): return memoryview(b'xyz')\n",
        "from array import array\nassert f() == array('i', [1, 2]) and list(f()) == [1, 2] and b() == b'ab' and bytes(m()) == b'xyz'",
    ),
    case(
        "pattern",
        "import re\ndef f(s): return re.match(r'(\\d+)-(?P<w>\\w+)', s)\n",
        "m = f('12-ab')\nassert m.group(1) == '12' and m['w'] == 'ab' and f('x') is None and m",
    ),
    case(
        "async",
        "import asyncio\nasync def f(n):\n    await asyncio.sleep(0)\n    return n + 1\nasync def all_of(ns): return await asyncio.gather(*map(f, ns))\n",
        "import asyncio\nassert asyncio.run(f(1)) == 2 and asyncio.run(all_of([1, 2])) == [2, 3]",
        "import asyncio\nasync def t():\n    return await asyncio.gather(f(1), f(2))\nassert asyncio.run(t()) == [2, 3]",
    ),
    case(
        "async-generator",
        "async def f(n):\n    for i in range(n): yield i\n",
        "import asyncio\nasync def t(): return [x async for x in f(3)]\nassert asyncio.run(t()) == [0, 1, 2]",
    ),
    case(
        "async-context",
        "class T:\n    async def __aenter__(self): return 4\n    async def __aexit__(self, *a): return False\n",
        "import asyncio\nasync def t():\n    async with T() as v:\n        return v\nassert asyncio.run(t()) == 4",
    ),
    case(
        "async-callback",
        "async def f(g): return 1 + await g()\n",
        "import asyncio\nasync def g(): return 2\nassert asyncio.run(f(g)) == 3",
    ),
    case(
        "printing",
        "def f(x): print('got', x)\n",
        "import io, contextlib\nb = io.StringIO()\nwith contextlib.redirect_stdout(b):\n    f(1)\n    f(2)\nassert b.getvalue() == 'got 1\\ngot 2\\n'",
    ),
    case(
        "cache",
        "from functools import lru_cache\n@lru_cache(maxsize=None)\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)\n",
        "assert f(60) == 1548008755920 and f.cache_info().misses == 61\nf.cache_clear()\nassert f.cache_info().currsize == 0",
    ),
    case(
        "partial",
        "from functools import partial\ndef f(a, b): return a - b\ng = partial(f, 10)\n",
        "assert g(3) == 7 and g.args == (10,)",
    ),
    case(
        "singleton",
        "class S:\n    one = None\n    def __new__(cls):\n        cls.one = cls.one or super().__new__(cls)\n        return cls.one\n",
        "assert S() is S() and S.one is S()",
    ),
    case(
        "inheritance",
        "class A:\n    def who(self): return 'A'\nclass B(A):\n    def who(self): return super().who() + 'B'\nclass C(B): pass\n",
        "assert C().who() == 'AB' and isinstance(C(), A) and not isinstance(A(), B)",
    ),
    case(
        "multiple-inheritance",
        "class A: a = 1\nclass B: b = 2\nclass C(A, B): pass\n",
        "assert (C().a, C.b) == (1, 2) and issubclass(C, B) and [k.__name__ for k in C.__mro__[:3]] == ['C', 'A', 'B']",
    ),
    case(
        "list-subclass",
        "class L(list):\n    def total(self): return sum(self)\n",
        "x = L([1, 2])\nx.append(3)\nassert x == [1, 2, 3] and x.total() == 6 and len(x) == 3 and isinstance(x, list)",
    ),
    case(
        "dict-subclass",
        "class D(dict):\n    def __getattr__(self, k): return self[k]\n",
        "d = D(a=1)\nassert d.a == 1 and d['a'] == 1 and d == {'a': 1} and 'a' in d",
    ),
    case(
        "int-subclass",
        "class Celsius(float):\n    def fahrenheit(self): return self * 9 / 5 + 32\n",
        "assert Celsius(100).fahrenheit() == 212 and Celsius(5) == 5.0 and Celsius(1) < 2",
    ),
    case(
        "slots",
        "class P:\n    __slots__ = ('x',)\n    def __init__(self, x): self.x = x\n",
        "try:\n    P(1).y = 2\n    assert False\nexcept AttributeError:\n    pass",
        "assert P(1).x == 1",
    ),
    case(
        "descriptor",
        "class Positive:\n    def __set_name__(self, o, n): self.n = '_' + n\n    def __get__(self, i, o=None): return getattr(i, self.n)\n    def __set__(self, i, v):\n        if v <= 0: raise ValueError(v)\n        setattr(i, self.n, v)\nclass Item:\n    price = Positive()\n    def __init__(self, p): self.price = p\n",
        "i = Item(3)\ni.price = 4\nassert i.price == 4",
        "try:\n    Item(-1)\n    assert 0\nexcept ValueError:\n    pass",
    ),
    case(
        "dynamic-attributes",
        "class Any_:\n    def __getattr__(self, n): return n.upper()\n",
        "assert Any_().hello == 'HELLO'",
    ),
    case(
        "total-ordering",
        "from functools import total_ordering\n@total_ordering\nclass V:\n    def __init__(self, s): self.t = tuple(map(int, s.split('.')))\n    def __eq__(self, o): return self.t == o.t\n    def __lt__(self, o): return self.t < o.t\n",
        "assert V('1.10') > V('1.9') and V('1.0') <= V('1.0') and max([V('1.2'), V('1.10')]).t == (1, 10)",
    ),
    case(
        "heap-of-objects",
        "class T:\n    def __init__(self, p): self.p = p\n    def __lt__(self, o): return self.p < o.p\n",
        "import heapq\nh = [T(3), T(1), T(2)]\nheapq.heapify(h)\nassert [heapq.heappop(h).p for _ in range(3)] == [1, 2, 3]",
    ),
    case(
        "module-state",
        "count = 0\ndef tick():\n    global count\n    count += 1\n",
        "tick()\nassert count in (0, 1)",
        "assert count == 1",
    ),
    case("constants", "LIMIT = 10\nNAMES = ('a', 'b')\n", "assert LIMIT == 10 and NAMES[1] == 'b'"),
    case(
        "keyword-arguments",
        "def f(a, /, b, *c, d=4, **e): return (a, b, c, d, e)\n",
        "assert f(1, 2, 3, d=5, x=6) == (1, 2, (3,), 5, {'x': 6})",
    ),
    case(
        "objects-of-the-tests",
        "def total(items): return sum(i.price for i in items)\ndef rename(i): i.name = i.name.upper()\n",
        "i = Item('a', 3)\nrename(i)\nassert i.name == 'A' and total([i, Item('b', 4)]) == 7",
        setup="class Item:\n    def __init__(self, name, price): self.name, self.price = name, price\n",
    ),
    case(
        "tree-of-the-tests",
        "def depth(t): return 0 if t is None else 1 + max(depth(t.left), depth(t.right))\n",
        "assert depth(Tree(1, Tree(2), None)) == 2",
        setup="class Tree:\n    def __init__(self, v, left=None, right=None): self.v, self.left, self.right = v, left, right\n",
    ),
    case(
        "stream-of-the-tests",
        "def words(f): return [w for line in f for w in line.split()]\n",
        "import io\nassert words(io.StringIO('a b\\nc')) == ['a', 'b', 'c']",
    ),
    case(
        "generator-of-the-tests",
        "def first(g, n): return [next(g) for _ in range(n)]\n",
        "import itertools\nassert first(itertools.count(), 3) == [0, 1, 2]",
        "assert first((x for x in 'abc'), 2) == ['a', 'b']",
    ),
    case("own-name-in-helper", "def f(x): return x + 1\n", "assert check(f)", setup="def check(f): return f(1) == 2\n"),
    case(
        "star-imports",
        "def f(): return 2.0\n",
        "from math import *\nassert isclose(sqrt(4), f())",
        "assert list(product([1], [2])) == [(1, f())]",
        setup="from itertools import *",
    ),
    case(
        "human-eval",
        "def add_one(x: List[int]) -> List[int]:\n    return [inc(v) for v in x]\n",
        "check(candidate)",
        setup="def check(candidate):\n    assert candidate([1]) == [2] == add_one([inc(0)])\n",
        entry_point="add_one",
        prompt="from typing import List\ndef inc(v):\n    return v + 1\n\ndef add_one(x: List[int]) -> List[int]:\n    '''Adds.'''\n",
    ),
    case(
        "human-eval-prompt-as-setup",
        "def solve(n: int) -> Optional[int]:\n    return n * 2\n",
        "check(candidate)",
        "assert solve(2) == 4",
        setup="from typing import Optional\ndef solve(n: int) -> Optional[int]:\n    '''Doubles.'''\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert solve(3) == 6\n",
        entry_point="solve",
    ),
    case(
        "starter-as-setup",
        "def solve(n): return n + 1\n",
        "assert solve(1) == 2",
        setup="def solve(n):\n    '''The next number.'''\n",
    ),
    case(
        "leet-code",
        "class Solution:\n    def helper(self, x): return x + 1\n    def next(self, nums: List[int], target: int = 0) -> Optional[int]:\n        return self.helper(nums[0]) + inf * 0 if 0 else self.helper(nums[0])\n",
        "check(candidate)",
        setup="def check(candidate):\n    assert candidate(nums=[1], target=3) == 2\n",
        entry_point="Solution().",
    ),
    case(
        "leet-code-method",
        "class Solution:\n    def two_sum(self, nums: List[int], t: int) -> List[int]:\n        d = defaultdict(int)\n        return sorted(nums)[:2]\n",
        "assert candidate([3, 1, 2], 4) == [1, 2]",
        entry_point="Solution().two_sum",
    ),
    case(
        "leet-code-design",
        "class LRUCache:\n    def __init__(self, capacity): self.c, self.d = capacity, {}\n    def get(self, k):\n        if k not in self.d: return -1\n        self.d[k] = self.d.pop(k)\n        return self.d[k]\n    def put(self, k, v):\n        self.d.pop(k, None)\n        self.d[k] = v\n        if len(self.d) > self.c: del self.d[next(iter(self.d))]\n",
        "c = LRUCache(2)\nc.put(1, 1)\nc.put(2, 2)\nassert c.get(1) == 1\nc.put(3, 3)\nassert c.get(2) == -1 and c.get(3) == 3",
    ),
    case(
        "library-as-value",
        "def f(): return 0.3\n",
        "m = math\nassert m.isclose(f(), 0.1 + 0.2)",
        "assert isclose(f(), 0.3)",
    ),
    case(
        "arrays-of-numpy",
        "import numpy as np\ndef f(n): return np.arange(n) ** 2\ndef g(): return np.float64(0.5)\ndef h(a): a += 1\n",
        "assert np.array_equal(f(3), [0, 1, 4]) and f(3).sum() == 5 and g() == 0.5",
        "assert (f(3) == np.array([0, 1, 4])).all() and f(2).dtype == int",
        setup="import numpy as np",
    ),
    case(
        "observer",
        "class Subject:\n    def __init__(self): self.fs = []\n    def on(self, f): self.fs.append(f); return f\n    def emit(self, *a): return [f(*a) for f in self.fs]\n",
        "s = Subject()\nlog = []\ns.on(lambda x: log.append(x))\ns.emit(3)\nassert log == [3]",
        "s = Subject()\n@s.on\ndef g(x): return x + 1\nassert s.emit(1) == [2] and g(5) == 6",
    ),
    case(
        "threads",
        "import threading\nclass Counter_:\n    def __init__(self): self.n, self.lock = 0, threading.Lock()\n    def add(self):\n        with self.lock: self.n += 1\ndef run(k):\n    c = Counter_()\n    ts = [threading.Thread(target=c.add) for _ in range(k)]\n    for t in ts: t.start()\n    for t in ts: t.join()\n    return c.n\n",
        "assert run(64) == 64",
    ),
    case(
        "vars",
        "class P:\n    '''A point.'''\n    def __init__(self): self.x = 1\n",
        "assert vars(P()) == {'x': 1} and P().__dict__ == {'x': 1} and P.__doc__ == 'A point.' and P().__class__ is P",
    ),
    case(
        "function-attributes",
        "def f(a, b=2):\n    'Doc.'\n    return a\n",
        "assert f.__name__ == 'f' and f.__doc__ == 'Doc.' and f.__defaults__ == (2,)",
    ),
    case(
        "copies",
        "class P:\n    def __init__(self): self.items = [1]\n",
        "import copy\na = P()\nb, c = copy.deepcopy(a), copy.copy(a)\na.items = [2]\n"
        "assert b.items == [1] == c.items and b is not a",
    ),
    case(
        "attribute-that-tests-change",
        "class N:\n    def __init__(self, v): self.v, self.children = v, []\n    def total(self): return self.v + sum(c.total() for c in self.children)\n    def clear(self): self.children.clear()\n",
        "n = N(1)\nn.children.append(N(2))\nn.children.append(N(3))\nn.children[0].children.append(N(4))\nassert n.total() == 10 and len(n.children) == 2",
        "n = N(1)\nc = n.children\nc.append(N(2))\nn.clear()\nassert c == [] and n.children is c",
    ),
    case(
        "attribute-that-the-program-changes",
        "class C:\n    def __init__(self): self.d = {}\n    def put(self, k, v): self.d[k] = v\n",
        "c = C()\nd = c.d\nc.put('a', 1)\nd['b'] = 2\nc.put('c', 3)\nassert d == c.d == {'a': 1, 'b': 2, 'c': 3}",
        "cs = [C() for _ in range(40)]\nfor i, c in enumerate(cs): c.d[i] = i\nassert all(c.d == {i: i} for i, c in enumerate(cs))",
    ),
    case(
        "interval",
        "class Interval:\n    def __init__(self, a, b): self.a, self.b = a, b\n    def __contains__(self, x): return self.a <= x < self.b\n",
        "assert 3 in Interval(1, 5) and 5 not in Interval(1, 5)",
        "i = Interval(0, 1)\nassert 0 in i",
    ),
    case(
        "cause",
        "def f():\n    try: 1 / 0\n    except ZeroDivisionError as e: raise ValueError('x') from e\n",
        "try:\n    f()\nexcept ValueError as e:\n    assert isinstance(e.__cause__, ZeroDivisionError)\nelse:\n    assert False",
    ),
    case(
        "generic-class",
        "from typing import Generic, TypeVar\nT = TypeVar('T')\nclass Box(Generic[T]):\n    def __init__(self, v: T): self.v = v\n",
        "assert Box[int](3).v == 3 and Box('a').v == 'a'",
    ),
    case(
        "mock",
        "def f(db): return db.get('k') + 1\n",
        "from unittest.mock import Mock\nm = Mock()\nm.get.return_value = 3\nassert f(m) == 4\nm.get.assert_called_once_with('k')",
    ),
    case(
        "structural-match",
        "class P:\n    __match_args__ = ('x', 'y')\n    def __init__(self, x, y): self.x, self.y = x, y\n",
        "match P(1, 2):\n    case P(1, b):\n        assert b == 2\n    case _:\n        assert False",
    ),
    case(
        "unit-test",
        "def f(n): return n * n\n",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(2), 4)\n        with self.assertRaises(TypeError): f('a')\nr = unittest.TestResult()\nT('test').run(r)\nassert r.wasSuccessful() and r.testsRun == 1",
    ),
    case(
        "signature",
        "def f(a, b=1): return a\n",
        "import inspect\nassert list(inspect.signature(f).parameters) == ['a', 'b'] and inspect.isfunction(f)",
    ),
    case(
        "protocol",
        "from typing import Protocol, runtime_checkable\n@runtime_checkable\nclass HasSize(Protocol):\n    def size(self): ...\nclass A:\n    def size(self): return 1\n",
        "assert isinstance(A(), HasSize)",
    ),
    case(
        "exception-group",
        "def f(): raise ExceptionGroup('g', [ValueError(1)])\n",
        "try:\n    f()\nexcept* ValueError as g:\n    assert len(g.exceptions) == 1",
    ),
]
