"""The forms in which data sets write the tests of a program."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_jax.rewards.assertions import CANDIDATE, Assertions

_TEXTS = ("setup", "test", "entry_point", "prompt")
_HUMAN_EVAL = {"test", "entry_point", "setup", "prompt", "task_id", "canonical_solution"}
# How values that a function returned are compared: JSON has no tuples, and decimal fractions round.
_SAME_VALUE = """
def _same_value(got, wanted):
    if isinstance(wanted, list):
        return isinstance(got, (list, tuple)) and len(got) == len(wanted) and all(map(_same_value, got, wanted))
    if isinstance(wanted, dict) and isinstance(got, dict):
        got = {str(key): value for key, value in got.items()}
        return got.keys() == wanted.keys() and all(_same_value(got[key], wanted[key]) for key in wanted)
    if isinstance(wanted, float) and isinstance(got, (int, float)) and not isinstance(got, bool):
        return abs(got - wanted) <= 1e-6 * max(1.0, abs(wanted))
    return type(got) is type(wanted) and got == wanted
"""


@dataclass(frozen=True, kw_only=True)
class InputOutput:
    """A test by standard input and output.

    Args:
      input: what the program reads.
      output: what it must print, as `outputs_equal` compares it.
    """

    input: str
    output: str


def parse_tests(row: Any) -> list[InputOutput] | Assertions | None:
    """Reads a row of the `tests` column.

    Args:
      row: None; or one of these, or JSON text of one:
        a list of {"input": str, "output": str} by standard input, "testtype" or "type" may say so (LiveCodeBench);
        such a list with testtype "functional", whose inputs are the arguments as lines of JSON, and perhaps the
        method's "func_name" or "fn_name"; {"inputs": [...], "outputs": [...], "fn_name": str} (APPS, TACO);
        a list of assert statements (MBPP), or {"asserts": [...], "setup": str} for those that need imports;
        {"test": str, "entry_point": str, "prompt": str} where "test" defines check(candidate) (HumanEval; a "setup"
        instead of a prompt does too, but its helpers are the tests' alone), the entry point perhaps a method,
        "Solution().two_sum"; {"functional": "def check(candidate): ..."} for the method of `Solution` that answers
        (LeetCode); {"test_cases": [...]} (open-r1's verification_info) and {"tests": ...} around any of them.

    Returns:
      The tests; None where there are none.

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"code_reward: tests: got {row[:80]!r}, wanted JSON ({error}); correct the row") from None
    if row is None or (isinstance(row, list | tuple) and not row):
        return None
    if isinstance(row, list | tuple):
        return _list(row)
    if isinstance(row, Mapping):
        return _mapping(row)
    raise _malformed(row)


def _list(row: Sequence[Any]) -> list[InputOutput] | Assertions:
    if all(isinstance(test, str) for test in row):
        return Assertions(tests=tuple(row))
    if not all(isinstance(test, Mapping) for test in row):
        raise _malformed(row)
    kinds = {_kind(test) for test in row}
    if kinds == {"functional"}:
        return _functional(row)
    return [_input_output(test) for test in row]


def _mapping(row: Mapping[str, Any]) -> list[InputOutput] | Assertions | None:
    keys = set(row)
    if not all(isinstance(row.get(name, ""), str) for name in _TEXTS):
        raise ValueError(
            f"code_reward: tests: got {repr(row)[:120]}, wanted text in {', '.join(_TEXTS)}; correct the row"
        )
    if keys <= {"asserts", "setup", "prompt"} and _strings(row.get("asserts")):
        texts = {"setup": row.get("setup", ""), "prompt": row.get("prompt", "")}
        return Assertions(tests=tuple(row["asserts"]), **texts) if row["asserts"] else None
    if {"test", "entry_point"} <= keys <= _HUMAN_EVAL:
        return _check(row["test"], row["entry_point"], row.get("setup", ""), row.get("prompt", ""))
    if {"functional"} <= keys <= {"functional", "setup", "prompt"} and isinstance(row["functional"], str):
        return _check(row["functional"], "Solution().", row.get("setup", ""), row.get("prompt", ""))
    if {"inputs", "outputs"} <= keys <= {"inputs", "outputs", "fn_name"}:
        return _columns(row)
    if {"test_cases"} <= keys <= {"test_cases", "language"} or keys == {"tests"}:
        return parse_tests(row.get("test_cases", row.get("tests")))
    raise _malformed(row)


def _check(test: str, entry_point: str, setup: str, prompt: str) -> Assertions:
    """HumanEval's form; where `test` calls check itself, that call is the test."""
    return Assertions(tests=(f"check({CANDIDATE})",), setup=f"{setup}\n{test}", entry_point=entry_point, prompt=prompt)


def _columns(row: Mapping[str, Any]) -> list[InputOutput] | Assertions | None:
    inputs, outputs, name = row["inputs"], row["outputs"], row.get("fn_name")
    if not (isinstance(inputs, list | tuple) and isinstance(outputs, list | tuple) and len(inputs) == len(outputs)):
        raise _malformed(row)
    if name is None:
        return parse_tests([{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)])
    return (
        _calls([(given, wanted) for given, wanted in zip(inputs, outputs, strict=True)], str(name)) if inputs else None
    )


def _kind(test: Mapping[str, Any]) -> str:
    kind = test.get("testtype", test.get("type", "stdin"))
    return {"stdin_stdout": "stdin", "function_call": "functional"}.get(kind, kind) if isinstance(kind, str) else ""


def _functional(row: Sequence[Mapping[str, Any]]) -> Assertions:
    name = next((test[key] for test in row for key in ("func_name", "fn_name") if test.get(key)), "")
    calls = []
    for test in row:
        given, wanted = test.get("input"), test.get("output")
        try:
            arguments = [json.loads(line) for line in given.split("\n") if line.strip()]
            calls.append((arguments, json.loads(wanted)))
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"code_reward: tests: got {repr(dict(test))[:120]}, wanted arguments as lines of JSON and a result as"
                f" JSON ({str(error)[:80]}); correct the row"
            ) from None
    return _calls(calls, str(name))


def _calls(calls: Sequence[tuple[Any, Any]], name: str) -> Assertions:
    for given, _ in calls:
        if not isinstance(given, list | tuple):
            raise ValueError(f"code_reward: tests: got {given!r:.80}, wanted a list of arguments; correct the row")
    tests = [f"assert _same_value({CANDIDATE}(*{given!r}), {wanted!r})" for given, wanted in calls]
    setup = _SAME_VALUE + "nan, inf = float('nan'), float('inf')\n"
    return Assertions(tests=tests, setup=setup, entry_point=f"Solution().{name}")


def _input_output(test: Mapping[str, Any]) -> InputOutput:
    if _kind(test) != "stdin" or not all(isinstance(test.get(key), str) for key in ("input", "output")):
        raise ValueError(
            f"code_reward: tests: got {repr(dict(test))[:120]}, wanted input and output as strings, all tests of one"
            " testtype, stdin or functional; correct the row"
        )
    return InputOutput(input=test["input"], output=test["output"])


def _strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _malformed(row: Any) -> ValueError:
    return ValueError(
        f"code_reward: tests: got {repr(row)[:120]}, wanted None, a list of input and output, a list of assert"
        " statements, or a mapping of asserts or of test and entry_point; convert the column"
    )
