"""Tests by statements that raise, run against a program that lives in a sandbox of its own."""

import ast
import functools
import importlib.util
import json
import marshal
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.rewards.names import (
    assumed_imports,
    bound_names,
    class_names,
    free_names,
    program_names,
)
from deepseek_jax.rewards.protocol import RowsFailed
from deepseek_jax.rewards.sandbox import CompletedProgram, Limits, Program, run_linked
from deepseek_jax.rewards.sandbox import __path__ as _sandbox_path

CANDIDATE = "candidate"
PACKAGES = ("numpy",)
_SYNTAX = (SyntaxError, ValueError, RecursionError, MemoryError)
_INSIDE = ("wire", "proxies", "objects", "peer")
_MAIN = """
import sys, types
for name in ("deepseek_jax", "deepseek_jax.rewards", "deepseek_jax.rewards.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.path[0]]
from deepseek_jax.rewards.sandbox import {role}
{role}.main()
"""


class TestsUnusable(RowsFailed):
    """The tests themselves fail, whatever the program does; the message says what is wrong with them."""

    __test__ = False  # for pytest, which collects classes of such names


@dataclass(frozen=True, kw_only=True)
class Assertions:
    """Tests by statements that raise where the program is wrong.

    Args:
      tests: Python statements, one string a test.
      setup: statements that run before them, imports and helpers; trusted as the tests are. A definition of the entry
        point, or an empty one of a function that tests call, gives way to the program's.
      entry_point: what the tests call `candidate`: a function of the program's, as in HumanEval, or a method of a
        class that is made without arguments, "Solution().two_sum" or "Solution()." for the one that answers, as in
        LeetCode; "" where tests use the program's own names.
      prompt: the program's beginning as the model saw it, if that is part of the task. The program finds its imports
        and helpers, and so do the tests.

    Raises:
      ValueError: something is not Python.
    """

    tests: Sequence[str]
    setup: str = ""
    entry_point: str = ""
    prompt: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tests", tuple(self.tests))
        object.__setattr__(self, "setup", _completed(self.setup))
        object.__setattr__(self, "prompt", _completed(self.prompt))
        for text in self.tests:
            try:
                ast.parse(text)
            except _SYNTAX as error:
                raise _not_python(text, error) from None

    def __len__(self) -> int:
        return len(self.tests)


def count_assertions(source: str, tests: Assertions, *, limits: Limits, allow_unsandboxed: bool = False) -> int:
    """Runs assertions against a program, in two sandboxes.

    The tests run in one, the program in the other. Data crosses between them as itself, objects of the program's own
    as stand-ins whose operations ask the program (`deepseek_jax.rewards.sandbox.proxies`), so that tests of classes,
    generators or exceptions mean what they mean in one process. The program sees the arguments of its calls, and
    nothing else of the tests; what it does to its own process changes no verdict.

    What stays open to it: to answer well for arguments that it recognises; tests that any answer satisfies, or NaN;
    tests that only compare its own objects with each other, or call methods of its own that judge; tests that check
    for an exception of a common type. What tests cannot do: compare an object of the program's that a function of its
    returned with data (it is unequal), derive classes from the program's, let a result of the program's operators hear
    data (`(v + w) * 3`), hand over a module, or see a container change that both sides
    keep after the call that handed it over.

    Args:
      source: the program.
      tests: the tests.
      limits: of each sandbox; seconds count for all tests together.
      allow_unsandboxed: see `deepseek_jax.rewards.sandbox.run_program`.

    Returns:
      How many tests passed before the time was over.

    Raises:
      TestsUnusable: the setup or a test fails through no fault of the program's: it raises, needs what is not here,
        does not end, or runs out of memory. A test that passes although the setup failed has passed.
      SandboxUnavailable: programs cannot be isolated here, or this machine is out of memory or too busy.
    """
    plan = _plan(tests)
    config = {"names": plan.names, "classes": plan.classes, "setup": plan.setup, "tests": plan.tests}
    judge = _side("judge", {"judge.json": json.dumps(config)}, limits)
    files = {"solution.py": source, "player.json": json.dumps({"keywords": plan.keywords, "prelude": False})}
    prelude = _prelude(source, tests)
    if prelude:
        files |= {"prelude.py": prelude, "player.json": json.dumps({"keywords": plan.keywords, "prelude": True})}
    ran = run_linked(judge, _side("player", files, limits), allow_unsandboxed=allow_unsandboxed)
    return _passed(ran)


def wanted_names(tests: Assertions) -> frozenset[str]:
    """The program's names that tests use: what `extract_program` looks for."""
    plan = _plan(tests)
    return frozenset(re.match(r"\w*", name)[0] for name in plan.names.values())


def _passed(ran: CompletedProgram) -> int:
    """Reads the judge's lines."""
    lines = ran.stderr.decode(errors="replace").split("\n")
    words = [line[1:] for line in lines if line.startswith("!")]
    if "?" in lines:
        raise TestsUnusable(f"code_reward: tests: {words[0] if words else 'they fail'}; correct the row")
    if "s" not in lines:
        # Nothing was judged. The program may be why: it answers the first question, and those of the setup.
        if "<" not in lines and (ran.kind != "timeout" or "p" in lines):
            raise TestsUnusable(
                f"code_reward: tests: the setup did not run to its end ({ran.kind}, exit status {ran.code});"
                " correct the row, or raise assert_limits"
            )
    return lines.count("1")


def _side(role: str, files: dict[str, str], limits: Limits) -> Program:
    inside = {f"{name}.pyc": _compiled(name) for name in (*_INSIDE, role)}
    return Program(source=_MAIN.format(role=role), files={**inside, **files}, limits=limits, packages=PACKAGES)


@functools.cache
def _compiled(name: str) -> bytes:
    """A module's bytecode file, so that no run compiles it again."""
    path = Path(_sandbox_path[0], f"{name}.py")
    code = compile(path.read_bytes(), path.name, "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


class _Plan(NamedTuple):
    """What the judge does: the program's names by the tests' names for them, which are classes, statements of the
    setup, tests, and keywords that tests give the candidate."""

    names: dict[str, str]
    classes: list[str]
    setup: list[str]
    tests: list[str]
    keywords: list[str]


@functools.lru_cache(maxsize=1024)
def _plan(tests: Assertions) -> _Plan:
    bodies = [ast.parse(text) for text in tests.tests]
    called = {node.func.id for body in bodies for node in ast.walk(body) if isinstance(node, ast.Call)
              and isinstance(node.func, ast.Name)}  # fmt: skip
    entry = re.match(r"\w*", tests.entry_point)[0]
    setup = [
        statement
        for text in (tests.prompt, tests.setup)
        for statement in ast.parse(text).body
        if not _gives_way(statement, entry, called)
    ]
    future = "".join(ast.unparse(node) + "\n" for node in setup if _is_future(node))
    known = bound_names(_source(setup))
    free = free_names(_source(setup)) | {name for text in tests.tests for name in free_names(text, known)}
    trees = [*setup, *bodies]
    own, imports = program_names(free - {CANDIDATE} if tests.entry_point else free, trees)
    names = {name: name for name in own}
    if tests.entry_point:
        names[CANDIDATE] = tests.entry_point
    elif not names:
        names = _first_call(bodies)
    statements = [*imports, *(_statement(node, future) for node in setup if not _is_future(node))]
    classes = sorted(class_names(names, trees))
    return _Plan(names, classes, statements, [_statement(body, future) for body in bodies], _keywords(trees))


def _prelude(source: str, tests: Assertions) -> str:
    """What stands before the program: those of the prompt's definitions and the setup's imports that it uses and
    does not make; for a class `Solution` also what online judges import."""
    try:
        missing = free_names(source)
    except _SYNTAX:
        return ""
    entry = re.match(r"\w*", tests.entry_point)[0]
    visible = [node for node in ast.parse(tests.prompt).body if not _defines(node, entry)]
    visible += [node for node in ast.parse(tests.setup).body if isinstance(node, ast.Import | ast.ImportFrom)]
    found: list[ast.stmt] = []
    for node in reversed(visible):
        text = ast.unparse(node)
        if bound_names(text) & missing or "*" in text.partition("import")[2]:
            found.insert(0, node)
            missing |= free_names(text)
    assumed = assumed_imports(missing - bound_names(_source(found))) if "()." in tests.entry_point else []
    return "\n".join([*assumed, *map(ast.unparse, found)])


def _completed(text: str) -> str:
    """Python as it is, or a prompt that ends where a body should begin with an empty body."""
    try:
        ast.parse(text)
    except _SYNTAX as error:
        last = text.rstrip("\r\n\t ").rpartition("\n")[2]
        whole = f"{text.rstrip()}\n{' ' * (len(last) - len(last.lstrip()) + 4)}...\n"
        try:
            ast.parse(whole)
        except _SYNTAX:
            raise _not_python(text, error) from None
        return whole
    return text


def _not_python(text: str, error: BaseException) -> ValueError:
    return ValueError(f"code_reward: tests: {text[:80]!r} is not Python ({error}); correct the data set")


def _source(statements: Sequence[ast.stmt]) -> str:
    return "\n".join(map(ast.unparse, statements))


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _defines(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name


def _gives_way(node: ast.stmt, entry: str, called: set[str]) -> bool:
    """Whether a definition of the setup stands for the program's: the entry point's, or an empty one."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    return node.name == entry or (node.name in called and _is_empty(node))


def _is_empty(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return all(
        isinstance(part, ast.Pass)
        or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        or (isinstance(part, ast.Raise) and "NotImplementedError" in ast.unparse(part))
        or (isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and _is_empty(part))
        for part in node.body
    )


class _Identity(ast.NodeTransformer):
    """`a is b` as a call that knows stand-ins; what is compared with a constant stays."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        (operator, *more), right = node.ops, node.comparators[0]
        if more or not isinstance(operator, ast.Is | ast.IsNot) or isinstance(right, ast.Constant):
            return node
        call = ast.Call(func=ast.Name(id="_same_object", ctx=ast.Load()), args=[node.left, right], keywords=[])
        return call if isinstance(operator, ast.Is) else ast.UnaryOp(op=ast.Not(), operand=call)


def _statement(node: ast.AST, future: str) -> str:
    return future + ast.unparse(ast.fix_missing_locations(_Identity().visit(node)))


def _keywords(trees: Sequence[ast.AST]) -> list[str]:
    calls = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call))
    own = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == CANDIDATE)
    return sorted({keyword.arg for call in own for keyword in call.keywords if keyword.arg})


def _first_call(bodies: Sequence[ast.Module]) -> dict[str, str]:
    """Tests that name nothing but builtins ask for a function that shadows one (`assert sum(1, 2) == 3`): the first
    that they call."""
    calls = (node for body in bodies for node in ast.walk(body) if isinstance(node, ast.Call))
    name = next((call.func.id for call in calls if isinstance(call.func, ast.Name)), None)
    return {} if name is None else {name: name}
