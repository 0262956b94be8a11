"""Files of one idea and functions that fit on a screen: how long they may be, and which may be longer, with why."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "deepseek_jax"
FILE, NINETY_PERCENT, FUNCTION = 450, 330, 60  # lines
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "commands/compile.py:main": "its options, described, are most of it",
    "commands/plan.py:main": "its options, described, are most of it",
    "plan/planner.py:plan": "its arguments, described, are half of it",
    "parallel/experts.py:routed_experts": "its arguments, described, are half of it",
    "rl/loss.py:grpo_loss": "its arguments and its metrics, described, are half of it",
    "train/loop.py:run_stage": "its arguments, described, are half of it",
}


def lengths() -> dict[str, int]:
    """Lines of every file of the package, by its path within."""
    return {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def long_functions(source: str) -> Iterator[str]:
    """Names of functions above the limit, decorators and docstrings counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(of.lineno for of in node.decorator_list)])
            if node.end_lineno - first + 1 > FUNCTION:
                yield node.name


def test_no_file_is_long_but_those_with_a_reason():
    """A file that is no longer long leaves the list."""
    assert {name for name, count in lengths().items() if count > FILE} == LONG_FILES.keys()


def test_nine_files_in_ten_are_short():
    counts = sorted(lengths().values())
    assert counts[int(0.9 * len(counts))] <= NINETY_PERCENT


def test_no_function_is_long_but_those_with_a_reason():
    found = {f"{name}:{function}" for name in lengths() for function in long_functions((PACKAGE / name).read_text())}
    assert found == LONG_FUNCTIONS.keys()


def test_a_long_function_is_noticed():
    body = "    pass\n" * FUNCTION
    assert list(long_functions(f"class A:\n  def f(self):\n{body}")) == ["f"]
    assert list(long_functions(f"def f():\n{body[9:]}")) == []
    assert list(long_functions(f"@cache\ndef f():\n{body[9:]}")) == ["f"]
