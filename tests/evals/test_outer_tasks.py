"""Benchmarks whose graders run more than Python: a patch under a repository's tests, a checker, a compiler."""

import json
import shutil

import pytest

from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.graders import GraderConfig, Graders
from deepseek_jax.evals.outer import LANGUAGES, Ran, language_here
from deepseek_jax.evals.patches import applied, read_diff
from deepseek_jax.evals.task import Answered
from deepseek_jax.evals.tasks import TASKS
from deepseek_jax.evals.tasks.formal import claims
from deepseek_jax.evals.tasks.patches import prediction
from deepseek_jax.evals.tasks.port import for_language
from deepseek_jax.rewards.sandbox import available


@pytest.fixture
def graded(tmp_path):
    """Grades of completions of one row."""

    def of(task, row, *completions, **config):
        if available() is not None:
            pytest.skip(f"needs a sandbox: {available()}")
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        (problem,) = task.problems(open_source(str(tmp_path / "rows.jsonl")))
        with Graders(GraderConfig(**config)) as graders:
            task.ready(graders)
            return task.grade([Answered(problem, task.style("deepseek"), "", text) for text in completions], graders)

    return of


# --- patches --------------------------------------------------------------------------------------

FIXED = """diff --git a/calc/add.py b/calc/add.py
--- a/calc/add.py
+++ b/calc/add.py
@@ -1,2 +1,2 @@
 def add(a, b):
-    return a - b
+    return a + b
"""
TESTS = """diff --git a/tests/test_add.py b/tests/test_add.py
--- a/tests/test_add.py
+++ b/tests/test_add.py
@@ -3,2 +3,5 @@
 def test_zero():
     assert add(0, 0) == 0
+
+def test_two():
+    assert add(1, 1) == 2
"""
SWE = {
    "instance_id": "me__calc-1",
    "repo": "me/calc",
    "base_commit": "0" * 40,
    "problem_statement": "add subtracts",
    "test_patch": TESTS,
    "FAIL_TO_PASS": '["tests/test_add.py::test_two"]',
    "PASS_TO_PASS": '["tests/test_add.py::test_zero"]',
}


@pytest.fixture
def repositories(tmp_path):
    folder = tmp_path / "repositories" / "me__calc"
    (folder / "calc").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "calc" / "__init__.py").write_text("")
    (folder / "calc" / "add.py").write_text("def add(a, b):\n    return a - b\n")
    (folder / "tests" / "test_add.py").write_text(
        "from calc.add import add\n\ndef test_zero():\n    assert add(0, 0) == 0\n"
    )
    return folder.parent


def test_a_patch_is_right_where_the_tests_pass(graded, repositories):
    cheats = FIXED.replace("calc/add.py", "tests/test_add.py").replace("def add(a, b):", "from calc.add import add")
    outside = FIXED.replace("calc/add.py", "../../etc/passwd")
    given = (
        f"```diff\n{FIXED}```",
        FIXED,
        f"```diff\n{FIXED.replace('a + b', 'b - a')}```",
        cheats,
        outside,
        "I do not know.",
    )
    found = graded(TASKS["swebench"], SWE, *given, repositories=repositories)
    assert [grade.score for grade in found] == [1, 1, 0, 0, 0, 0]
    assert [grade.parts["applies"] for grade in found] == [1, 1, 1, 0, 0, 0]
    assert found[2].parts["tests"] == 0.5
    assert (repositories / "me__calc" / "calc" / "add.py").read_text().endswith("a - b\n")
    (missing,) = graded(TASKS["swebench"], SWE | {"repo": "me/other"}, FIXED, repositories=repositories)
    assert missing.score is None and "no folder of the repository" in missing.reason


def test_a_patch_is_wrong_only_where_the_own_one_of_the_row_passes(graded, repositories):
    """Tests whose library is not here, or whose names are not pytest's, say nothing; a patch that keeps them from
    starting is wrong, and so is one that forges what they say."""
    wrong = FIXED.replace("a + b", "b - a")
    (found,) = graded(TASKS["swebench"], SWE | {"patch": FIXED}, wrong, repositories=repositories)
    assert found.score == 0.0
    names = {"FAIL_TO_PASS": '["test_two (tests.test_add.AddTests)"]', "PASS_TO_PASS": "[]"}
    (found,) = graded(TASKS["swebench"], SWE | names | {"patch": FIXED}, FIXED, repositories=repositories)
    assert found.score is None and "1 of 1 tests fail with the row's own patch too, such as 'test_two (" in found.reason
    under_a_file = "--- /dev/null\n+++ b/calc/add.py/x.py\n@@ -0,0 +1 @@\n+x = 1\n"
    lines = ["import contextlib, os", "for out in range(3, 9):", "    with contextlib.suppress(OSError):",
             "        os.write(out, b'[' * 99999)", "os._exit(0)"]  # fmt: skip
    head = f"--- /dev/null\n+++ b/conftest.py\n@@ -0,0 +1,{len(lines)} @@\n"
    forging = head + "".join(f"+{line}\n" for line in lines)
    for row in (SWE, SWE | {"patch": FIXED}):
        found = graded(TASKS["swebench"], row, FIXED + under_a_file, forging, repositories=repositories)
        assert [grade.score for grade in found] == [0, 0]
    lacking = shutil.copytree(repositories, repositories.with_name("lacking"))
    (lacking / "me__calc" / "calc" / "__init__.py").write_text("import no_such_library\n")
    (found,) = graded(TASKS["swebench"], SWE | {"patch": FIXED}, wrong, repositories=lacking)
    assert found.score is None


def test_predictions_have_the_form_of_swe_bench():
    problem = TASKS["swebench"].read(SWE, 0)
    row = Answered(problem, TASKS["swebench"].style("deepseek"), "<think>", f"hm</think>```diff\n{FIXED}```")
    assert prediction(row, "m") == {"instance_id": "me__calc-1", "model_name_or_path": "m", "model_patch": FIXED}
    assert prediction(row._replace(completion="none"), "m")["model_patch"] == ""


def test_diffs_are_applied_as_git_applies_them():
    files = {"a.txt": b"1\n2\n3\n4\n5\n", "b.txt": b"x"}
    moved = "--- a/a.txt\n+++ b/a.txt\n@@ -1,2 +1,2 @@\n 3\n-4\n+four\n"
    assert applied(files, read_diff(moved))["a.txt"] == b"1\n2\n3\nfour\n5\n"
    new = "--- /dev/null\n+++ b/c/d.txt\n@@ -0,0 +1,2 @@\n+one\n+two\n"
    assert applied(files, read_diff(new)) == files | {"c/d.txt": b"one\ntwo\n"}
    gone = "--- a/b.txt\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n\\ No newline at end of file\n"
    assert applied(files, read_diff(gone)) == {"a.txt": files["a.txt"]}
    twice = "--- a/a.txt\n+++ b/a.txt\n@@ -1,1 +1,2 @@\n 1\n+1b\n@@ -5 +6 @@\n-5\n+five\n"
    assert applied(files, read_diff(twice))["a.txt"] == b"1\n1b\n2\n3\n4\nfive\n"
    for wrong in (
        "--- a/no.txt\n+++ b/no.txt\n@@ -1 +1 @@\n-1\n+2\n",
        "--- /dev/null\n+++ b/a.txt\n@@ -0,0 +1 @@\n+1\n",
        moved.replace(" 3", " 7"),
    ):
        with pytest.raises(ValueError):
            applied(files, read_diff(wrong))
    for wrong in ("", "text", "--- a/x\n+++ b/x\n@@ -1,9 +1 @@\n-1\n", "--- /etc/x\n+++ /etc/x\n@@ -1 +1 @@\n-1\n+2\n",
                  "--- a/../x\n+++ b/../x\n@@ -1 +1 @@\n-1\n+2\n"):  # fmt: skip
        with pytest.raises(ValueError):
            read_diff(wrong)


# --- an outer checker -----------------------------------------------------------------------------

STATEMENT = "theorem two : 1 + 1 = 2 := by sorry"
FORMAL = {"name": "two", "header": "import Arithmetic", "formal_statement": STATEMENT}
# Stands for a proof assistant: a file passes where its last line is the tactic that proves it.
CHECKER = ("perl", "-ne", "$last = $_; END { exit($last =~ /rfl/ ? 0 : 1) }", "{file}")


def lean(proof, statement="theorem two : 1 + 1 = 2"):
    return f"```lean\nimport Arithmetic\n\n{statement} := by {proof}\n```"


def test_a_proof_is_right_where_the_checker_ends_with_0(graded):
    given = (
        lean("rfl"),
        lean("ring"),
        lean("rfl", "theorem two : 1 = 1"),  # proves another statement
        lean("sorry -- rfl"),  # leaves it open
        "no block",
        "```lean\ntheorem two :\n  1 + 1 = 2 := by\n  rfl\n```",  # without the header, which is the benchmark's
    )
    found = graded(TASKS["formal"], FORMAL, *given, checker=CHECKER, seconds=5.0)
    assert [grade.score for grade in found] == [1, 0, 0, 0, 0, 1]
    (missing,) = graded(TASKS["formal"], FORMAL, lean("rfl"), checker=("no-such-checker",), seconds=5.0)
    assert missing.score is None and "checker" in missing.reason


def test_comments_that_never_close_cost_no_time():
    """A hundred thousand openings, in one pass."""
    for opening in ("/- ", "(* ", "-- ", 'r#" ', '" ', "import x\n", "\n"):
        assert not claims(opening * 100_000, STATEMENT)


def test_a_statement_is_claimed_up_to_its_proof():
    assert claims("theorem two :\n 1 + 1 = 2 := by /- easy -/ rfl", STATEMENT)
    assert claims("theorem two : 1 + 1 = 2 := rfl", "theorem two : 1 + 1 = 2 := by")
    assert not claims("theorem two : 1 + 1 = 3 := by rfl", STATEMENT)
    assert not claims("-- theorem two : 1 + 1 = 2 := by rfl", STATEMENT)


FALSE = "theorem two : 1 + 1 = 3"
CHEATS = {
    "a weaker statement": f"{FALSE} ∨ True := by simp",
    "a statement under a condition": f"{FALSE} → True := by simp",
    "in a string": f'def s := "{FALSE} := by simp"',
    "in a raw string": f'def s := r#"{FALSE} := by "simp""#',
    "in a comment in a comment": f"/- /- -/ {FALSE} := by simp -/",
    "behind the end": f"#exit\n{FALSE} := by simp",
    "a sign of another meaning": f'notation:50 a " = " b => True\n{FALSE} := by trivial',
    "a number of another value": f"local instance : OfNat Nat 3 := ⟨2⟩\n{FALSE} := by rfl",
    "a tactic of another meaning": f"macro_rules | `(tactic| simp) => `(tactic| trivial)\n{FALSE} := by simp",
    "from what is false": f"variable (h : False)\ninclude h\n{FALSE} := by exact h.elim",
    "unchecked": f"set_option debug.skipKernelTC true\n{FALSE} := by simp",
    "run while it is checked": f"#eval IO.Process.exit 0\n{FALSE} := by simp",
    "by the compiler's word": f"{FALSE} := by exact Lean.ofReduceBool _ _ rfl",
    "without the rest": f"{FALSE} := by stop simp",
    "the header in a comment": f"/- import Arithmetic -/\nprelude\n{FALSE} := by simp",
}


@pytest.fixture
def checked(monkeypatch):
    """Scores of files by a checker that passes everything, and what it was given."""

    def run(words, *, files, **settings):
        given.update(files)
        return [Ran(0, "", "")]

    def of(block, **row):
        problem = TASKS["formal"].read(FORMAL | {"formal_statement": f"{FALSE} := by sorry"} | row, 0)
        answer = Answered(problem, TASKS["formal"].style("deepseek"), "", f"```\n{block}\n```")
        with Graders(GraderConfig(checker=("any",))) as graders:
            return TASKS["formal"].grade([answer], graders)[0].score

    given: dict[str, str] = {}
    monkeypatch.setattr("deepseek_jax.evals.tasks.formal.run_outer", run)
    of.given = given
    return of


@pytest.mark.parametrize("kind", CHEATS)
def test_no_statement_is_proved(checked, kind):
    """By a file that a checker passes."""
    assert checked(CHEATS[kind]) == 0.0


def test_an_honest_file_is_checked_under_the_header_of_the_benchmark(checked):
    lemma = '/-- easy -/\nlemma one : 1 = 1 := by\n  rfl -- "quoted"\n'
    assert checked(f"import Mathlib\nimport Other\n{lemma}{FALSE} :=\n  by\n  simp") == 1.0
    assert checked.given == {"Problem.lean": f"import Arithmetic\n\n{lemma}{FALSE} :=\n  by\n  simp"}
    assert checked(f"import Arithmetic\n\n{FALSE} := one") == 1.0
    assert checked(f"def c := '\"'\n{FALSE} := one") == 1.0
    coq = {"formal_statement": "Theorem two : 1 + 1 = 2.\nProof. Admitted.", "file_name": "two.v", "header": ""}
    assert checked("(* (* *) *) Theorem two : 1 + 1 = 2.\nProof. reflexivity. Qed.", **coq) == 1.0
    assert checked("Theorem two : 1 + 1 = 2.\nAbort.", **coq) == 0.0
    assert "one ```coq block" in TASKS["formal"].style("deepseek").write(TASKS["formal"].read(FORMAL | coq, 0))


# --- porting --------------------------------------------------------------------------------------

SUM = {
    "id": "sum",
    "problem": "Add two numbers.",
    "tests": [{"input": f"{a} 2\n", "output": f"{a + 2}\n"} for a in (1, 40)],
}
PYTHON = "```python\na, b = map(int, input().split())\nprint(a + b)\n```\n"
PORTS = {
    "cpp": "#include <cstdio>\nint main() { int a, b; scanf(\"%d %d\", &a, &b); printf(\"%d\\n\", a + b); }",
    "c": "#include <stdio.h>\nint main() { int a, b; scanf(\"%d %d\", &a, &b); printf(\"%d\\n\", a + b); }",
    "javascript": "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number)\nconsole.log(a + b)",
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_both_programs_have_to_pass(graded, language):
    try:
        language_here(language)
    except ValueError as problem:
        pytest.skip(str(problem))
    port = f"```{language}\n{PORTS[language]}\n```"
    given = (PYTHON + port, PYTHON + port.replace("a + b", "a - b"), PYTHON.replace("a + b", "3") + port, PYTHON,
             PYTHON + port.replace("a + b", "a + "))  # fmt: skip
    found = graded(for_language(language), SUM, *given, language=language)
    assert [grade.score for grade in found] == [1, 0, 0, 0, 0]
    assert [grade.parts["port"] for grade in found] == [1, 0, 1, 0, 0]
    assert f"port it to {LANGUAGES[language].labels[0]}" in for_language(language).style("deepseek").write(
        TASKS["port"].read(SUM, 0)
    )


def test_what_is_missing_is_told_before_anything_is_drawn(graded, tmp_path):
    with pytest.raises(ValueError, match="repositories: got none for swebench"):
        graded(TASKS["swebench"], SWE)
    with pytest.raises(ValueError, match="checker: got none for formal"):
        graded(TASKS["formal"], FORMAL)
    with pytest.raises(ValueError, match="language: got 'cobol', wanted one of cpp, c, javascript"):
        graded(TASKS["port"], SUM, language="cobol")


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("swebench", SWE | {"FAIL_TO_PASS": "[]"}, "'FAIL_TO_PASS': got none"),
        ("swebench", SWE | {"PASS_TO_PASS": "x"}, "'PASS_TO_PASS': got 'x', wanted JSON"),
        ("swebench", SWE | {"test_patch": "no diff"}, "'test_patch': got no file with a change"),
        ("swebench", SWE | {"instance_id": "../x"}, "wanted plain names"),
        ("formal", {"name": "x"}, "no field 'formal_statement'"),
        ("formal", FORMAL | {"file_name": "../x.lean"}, "'file_name': got '../x.lean', wanted a plain name"),
        ("port", SUM | {"tests": ["assert 1"]}, "'tests': got .*, wanted a list of input and output"),
    ],
)
def test_a_broken_row_is_told_by_field(name, row, wanted):
    with pytest.raises(ValueError, match=wanted):
        TASKS[name].read(row, 0)
