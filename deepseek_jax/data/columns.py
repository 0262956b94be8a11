"""Which columns of a data set hold question, answer, options and hidden tests: by option, or by the names in use."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.data.sources import Row, Source

# Names that public data sets give them, in any case of letters. Of the groups the first that is there counts; two
# columns of one group are two candidates, between which a user has to choose. A group's inner tuple is read together.
QUESTION_COLUMNS = (
    *((("body", "question"),), ("question",), ("problem",), ("prompt",), ("messages",)),
    *((("question_content", "starter_code"),), ("question_content",)),  # LiveCodeBench
    (("description", "input_format", "output_format"),),  # Codeforces
    ("text",),  # MBPP
)
ANSWER_COLUMNS = (
    (("answer",), ("ground_truth",), ("expected_answer",), ("final_answer",), ("reward_model.ground_truth",)),
    (("correct answer",),),
    (("solution",),),
)
TESTS_COLUMNS = (
    (("tests",),),
    (("test_list",), ("verification_info.test_cases",), ("official_tests",)),
    (("test", "entry_point", "prompt"),),  # HumanEval
    (("public_test_cases",),),  # LiveCodeBench
)
# Of multiple choice: a list of texts (MMLU-Pro), or the right answer's column and those of the wrong ones (GPQA).
OPTIONS_COLUMNS = (
    (("options",),),
    (("correct answer", "incorrect answer 1", "incorrect answer 2", "incorrect answer 3"),),
)


class Columns(NamedTuple):
    """The columns of the question, and those of the answer, the tests and the options where there are such.

    Tests in several columns are one mapping of these. A name with a dot in it is one inside a column of objects, unless
    a column has just that name.
    """

    question: tuple[str, ...]
    answer: str | None
    need_answer: bool = True
    tests: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def find_columns(
    source: Source, *, question: Sequence[str], answer: str | None, tests: str | None, need_answer: bool
) -> Columns:
    """The columns that a user named, and those that go by the names in use where none is named.

    Args:
        source: with at least one row.
        question: names given for the question; none looks for one.
        answer: the name given for the answer; None looks for one.
        tests: the name given for the hidden tests; None looks for one where no answer is needed.
        need_answer: whether it is refused that there is no answer.

    Raises:
        ValueError: a name that is not there, none found where one is needed, or several.
    """
    for name in (*question, *(name for name in (answer, tests) if name is not None)):
        _check_there(source, name)
    asked = tuple(question) or _found(source, QUESTION_COLUMNS, "question", "--question-columns")
    if not asked:
        raise ValueError(_nothing(source, "question", "question, problem, prompt, text", "--question-columns"))
    told = (answer,) if answer else _found(source, ANSWER_COLUMNS, "answer", "--answer-column")
    if not told and need_answer:
        raise ValueError(_nothing(source, "answer", "answer, solution", "--answer-column"))
    hidden = (tests,) if tests else () if need_answer else _found(source, TESTS_COLUMNS, "tests", "--tests-column")
    options = () if question else _found(source, OPTIONS_COLUMNS, "options", "--question-columns")
    if len(options) == 1 and not isinstance(source[0].get(options[0]), list):
        options = ()  # a column of that name for something else
    return Columns(asked, told[0] if told else None, need_answer, hidden, options)


def laid_flat(row: Row, columns: Columns) -> Row:
    """The row with what the columns' dotted names stand for under these names."""
    names = (*columns.question, *columns.tests, *(() if columns.answer is None else (columns.answer,)))
    return row | {name: _value(row, name) for name in names if name not in row and "." in name}


def _value(row: Any, name: str) -> Any:
    """What is under a dotted name; None where there is nothing."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, Mapping) else None
    return row


def _check_there(source: Source, name: str) -> None:
    there = source.columns()
    first, dot, rest = name.partition(".")
    if name in there:
        return
    if not dot or first not in there:
        raise ValueError(f"{source.name}: no column {name!r}, wanted one of {', '.join(there)}")
    held = source[0].get(first)
    if isinstance(held, Mapping) and rest.partition(".")[0] not in held:
        inside = ", ".join(f"{first}.{key}" for key in held)
        raise ValueError(f"{source.name}: no column {name!r}, wanted one of {inside or 'none: it is empty'}")


def _found(source: Source, groups: Sequence[Sequence[Any]], what: str, option: str) -> tuple[str, ...]:
    """The columns of the first group that has some there."""
    row: Row | None = None
    there = source.columns()
    for group in groups:
        found: list[tuple[str, ...]] = []
        for names in (name if isinstance(name, tuple) else (name,) for name in group):
            if "." in names[0] and names[0] not in there:
                row = source[0] if row is None else row
                found += [names] if _value(row, names[0]) is not None else []
            elif all(spellings := [_spelling(source, name, what, option) for name in names]):
                found.append(tuple(spellings))
        if len(found) > 1:
            raise _several(source, [" and ".join(names) for names in found], what, option)
        if found:
            return found[0]
    return ()


def _spelling(source: Source, name: str, what: str, option: str) -> str | None:
    """How a source spells a name: in small letters where it has that, else in its own."""
    there = source.columns()
    spellings = [name] if name in there else [column for column in there if column.casefold() == name]
    if len(spellings) > 1:
        raise _several(source, spellings, what, option)
    return spellings[0] if spellings else None


def _several(source: Source, names: Sequence[str], what: str, option: str) -> ValueError:
    return ValueError(f"{source.name}: got {', '.join(names)}, any of which may be the {what}; choose by {option}")


def _nothing(source: Source, what: str, usual: str, option: str) -> str:
    return (
        f"{source.name}: no {what} column ({usual}) among {', '.join(source.columns())}; name it by {option}, with "
        "dots for what is inside a column"
    )
