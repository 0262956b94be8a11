"""Rows of data sets as prompts with their answers, and the settings that say which rows and which columns."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from deepseek_jax.data.columns import Columns, find_columns, laid_flat
from deepseek_jax.data.curriculum import Curriculum
from deepseek_jax.data.sources import Row, Source
from deepseek_jax.text.answers import solution_answer

# The parameters of a reward function, to which columns are passed by name.
_TAKEN_COLUMNS = ("self", "prompts", "completions", "completion_ids")
_QUOTED_CHARS = 80
_MAX_BITS = 4_000  # Python turns no integer of over 4300 digits into text


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A data set, or one part of a mixture.

    Args:
        name: a .jsonl, .jsonl.gz, .json, .csv or .parquet file, a folder or pattern of such, or a hub data set as
            "owner/name", "owner/name:config" or "owner/name:config:split".
        weight: its share of the prompts, relative to the other sources'; above 0.
        question_columns: what is asked: a text column, several (joined by spaces, as SVAMP's Body and Question), or
            one of chat messages. None given: one by the names in use (`train.columns`), refused where several are.
        answer_column: with dots for what is inside a column, as verl's reward_model.ground_truth. None looks for it.
        tests_column: of hidden tests, which reward functions get as `tests`. None looks for it where no answer is
            needed.
        need_answer: refuse a source that has no answers. False lets them be None, to which accuracy does not apply.
        pass_rates: JSON Lines of {"index": row from 0, or "id": the row's id, "pass_rate": 0 to 1}, as measured.
        first_step: batches before it takes part (R1's second RL stage: general data at the end only).

    Raises:
        ValueError: a weight or first step out of its range.
    """

    name: str
    weight: float = 1.0
    question_columns: tuple[str, ...] = ()
    answer_column: str | None = None
    tests_column: str | None = None
    need_answer: bool = True
    pass_rates: Path | None = None
    first_step: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"{self.name}: weight: got {self.weight}, wanted a number above 0; or leave it out")
        if self.first_step < 0:
            raise ValueError(f"{self.name}: first_step: got {self.first_step}, wanted 0 or more batches")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prompts of a run: sources, what is filtered out, and the order.

    Filters run in the order of the fields here. Each keeps rows by what they are, the duplicates' also by what stands
    before them.

    Args:
        sources: mixed by their weights.
        difficulty_column: a number, or text such as "Level 3", in every row. Without it the difficulty is 1 less the
            measured pass rate, for sources that have one.
        min_difficulty, max_difficulty: kept, both included; None is no bound.
        pass_rate_above, pass_rate_below: measured rates kept, both excluded: by default, questions that the model
            neither always nor never solves. Rows without a measured rate are dropped where their source has rates.
        min_prompt_tokens, max_prompt_tokens: kept, both included; None is no bound.
        duplicates: "drop" keeps the first of rows that ask the same, over all sources.
        held_out: data to evaluate on; a training row that asks the same as one of its rows is contamination.
        contamination: "drop" such rows, or "refuse" the data.
        without_answer: "refuse" data with a row in which no final answer is found, or "drop" such rows.
        curriculum: None shuffles.

    Questions are the same when they are after NFKC, case folding, and every run of white space made one space.

    Raises:
        ValueError: no sources, none from the first step on, or a range that nothing falls into.
    """

    sources: tuple[SourceConfig, ...]
    difficulty_column: str | None = None
    min_difficulty: float | None = None
    max_difficulty: float | None = None
    pass_rate_above: float = 0.0
    pass_rate_below: float = 1.0
    min_prompt_tokens: int | None = None
    max_prompt_tokens: int | None = None
    duplicates: Literal["drop", "keep"] = "drop"
    held_out: tuple[SourceConfig, ...] = ()
    contamination: Literal["drop", "refuse"] = "drop"
    without_answer: Literal["refuse", "drop"] = "refuse"
    curriculum: Curriculum = None

    def __post_init__(self) -> None:
        if not self.sources or all(source.first_step for source in self.sources):
            raise ValueError(f"sources: got {len(self.sources)}, wanted at least one with first_step 0")
        if not self.pass_rate_above < self.pass_rate_below:
            raise ValueError(
                f"pass_rate_above {self.pass_rate_above}: wanted less than pass_rate_below, {self.pass_rate_below}"
            )
        for name in ("difficulty", "prompt_tokens"):
            low, high = (asdict(self)[f"{end}_{name}"] for end in ("min", "max"))
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{name}: got {low}, wanted at most max_{name}, {high}")


class Prompt(NamedTuple):
    """A question as text and tokens, and the columns that reward functions look at (`answer`, say)."""

    text: str
    tokens: list[int]
    columns: Mapping[str, object]


class Example(NamedTuple):
    """A row to ask.

    Attributes:
        question: the text; of messages, the content of the last one.
        answer: the final answer, or None where the source has none.
        messages: a chat as {"role", "content"} objects that ends with the user's, where the column holds one.
        columns: for reward functions: `answer`, and every column but the question's as it is, None where the row has
            none. All examples of a data set have the same columns.
        source: which of the configuration's sources it is from.
        row: its number there, from 0.
    """

    question: str
    answer: str | None
    messages: tuple[dict[str, str], ...] | None
    columns: dict[str, Any]
    source: int
    row: int


class NoAnswer(ValueError):
    """A row in which no final answer is found."""


def columns_of(config: SourceConfig, source: Source) -> Columns:
    """Which columns hold question, answer and tests."""
    return find_columns(
        source,
        question=config.question_columns,
        answer=config.answer_column,
        tests=config.tests_column,
        need_answer=config.need_answer,
    )


def example_of(source: Source, number: int, row: int, columns: Columns) -> Example:
    """A row as an example; ValueError names the place of one that is none."""
    stored = source[row]
    values = laid_flat(stored, columns)
    where = source.where(row)
    if taken := [name for name in _TAKEN_COLUMNS if name in values and name not in columns.question]:
        raise ValueError(f"{where}: column {taken[0]!r} has the name of a reward function's parameter; rename it")
    chat = values.get(columns.question[0]) if len(columns.question) == 1 else None
    messages = _messages(chat, f"{where}: {columns.question[0]!r}") if isinstance(chat, list) else None
    if messages is None:
        question, answer = question_and_answer(values, columns, where)
    else:
        question, answer = messages[-1]["content"], _answer(values, columns, where)
    if not question.strip():
        raise ValueError(f"{where}: {columns.question[-1]!r}: got {question!r:.80}, wanted a question")
    others = {name: value for name, value in stored.items() if name not in columns.question}
    if columns.options:
        question, answer = with_options(question, answer, values, columns.options, where)
    tests = {"tests": tests_of(values, columns.tests)} if columns.tests else {}
    return Example(question, answer, messages, others | tests | {"answer": answer}, number, row)


def question_and_answer(values: Row, columns: Columns, where: str) -> tuple[str, str | None]:
    """A row's question and final answer; ValueError names the place of a row without."""
    there = [name for name in columns.question if values.get(name) not in (None, "")] or columns.question[:1]
    question = " ".join(_text(values, name, where) for name in there)
    # of options, the right one's letter is the answer
    return question, None if len(columns.options) > 1 else _answer(values, columns, where)


def with_options(
    question: str, answer: str | None, values: Row, names: Sequence[str], where: str
) -> tuple[str, str | None]:
    """A question of multiple choice with its options by letters, and the answer, the right one's letter.

    A list of options stays in its order; those of several columns, the right one first, come in an order that the
    texts alone decide.
    """
    texts = values.get(names[0]) if len(names) == 1 else [values.get(name) for name in names]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not 2 <= len(texts) <= 26:
        raise ValueError(f"{where}: {names[0]!r}: got {texts!r:.80}, wanted 2 to 26 options as text")
    if len(names) > 1:
        right, key = texts[0], lambda text: hashlib.blake2b(f"{question}\n{text}".encode()).digest()
        texts = sorted(texts, key=key)
        answer = ascii_uppercase[texts.index(right)]
    lettered = (f"{letter}) {text.strip()}" for letter, text in zip(ascii_uppercase, texts, strict=False))
    return "\n".join([question, *lettered]), answer


def tests_of(values: Row, names: Sequence[str]) -> Any:
    """The hidden tests: a column's value, or several columns by their names."""
    return values.get(names[0]) if len(names) == 1 else {name.casefold(): values.get(name) for name in names}


def _answer(values: Row, columns: Columns, where: str) -> str | None:
    if columns.answer is None:
        return None
    value = values.get(columns.answer)
    found = _final_answer(value, bare="solution" not in columns.answer.casefold())
    if found is None and columns.need_answer:
        raise NoAnswer(
            f"{where}: {columns.answer!r}: got {_quoted(value)}, wanted a final answer: a number, a few words, "
            r"\boxed{...}, or '#### 42' as the last line; correct it, name another --answer-column, or leave such rows "
            "out with --without-answer drop"
        )
    return found


def _final_answer(value: Any, *, bare: bool) -> str | None:
    """The final answer that a column's value gives; None where it gives none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return None
    if isinstance(value, int) and abs(value).bit_length() > _MAX_BITS:
        return None
    if isinstance(value, str):
        return None if _half_pair(value) else solution_answer(value, bare=bare)
    return str(value)


def _half_pair(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def _quoted(value: Any) -> str:
    """The value in at most 80 characters of one line."""
    if isinstance(value, int) and abs(value).bit_length() > _MAX_BITS:
        return f"an integer of {abs(value).bit_length()} bits"
    if isinstance(value, str) and len(value) > _QUOTED_CHARS:
        return repr(f"{value[: _QUOTED_CHARS // 2]} ... {value[-_QUOTED_CHARS // 3 :]}")
    return repr(value)[:_QUOTED_CHARS]


def _text(values: Row, name: str, where: str) -> str:
    value = values.get(name)
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where}: {name!r}: got {value!r}, wanted text or a number")
    text = str(value)
    if _half_pair(text):
        raise ValueError(f"{where}: {name!r}: holds half a surrogate pair, which is no text; correct it")
    return text


def _messages(chat: list[Any], where: str) -> tuple[dict[str, str], ...]:
    for message in chat:
        if not isinstance(message, dict):
            raise ValueError(f"{where}: got {message!r} in a chat, wanted objects with 'role' and 'content'")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"{where}: {key!r} of a message: got {message.get(key)!r}, wanted text")
            _text(message, key, where)
    if not chat or chat[-1]["role"] != "user":
        raise ValueError(f"{where}: got a chat of {len(chat)} messages, wanted one that ends with the user's")
    return tuple({"role": message["role"], "content": message["content"]} for message in chat)
