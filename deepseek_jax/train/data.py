"""Questions and answers: JSONL files in, a Grain iterator out, its exact position kept in checkpoints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain

from deepseek_jax.rewards.accuracy import gsm8k_answer


class Question(NamedTuple):
    """A question, and its final answer as a grader wants it."""

    question: str
    answer: str


def read_questions(path: Path) -> list[Question]:
    """Questions from a JSONL file with `question` and `answer` in every row, as GSM8K has them.

    An answer with a `####` mark is cut down to what follows it.

    Raises:
        ValueError: no such file, no rows, or a row that is not such an object; the message names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; wanted JSONL rows with 'question' and 'answer'")
    questions = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                questions.append(_question(line, f"{path}:{number}"))
    if not questions:
        raise ValueError(f"{path}: the data set is empty; wanted at least one row with 'question' and 'answer'")
    return questions


def _question(line: bytes, where: str) -> Question:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{where}: not JSON: {problem}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got a JSON {type(row).__name__}, wanted an object")
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str | int | float):
            raise ValueError(f"{where}: {name!r}: got {row.get(name)!r}, wanted text or a number")
    answer = str(row["answer"]).strip()
    final = gsm8k_answer(answer) if "####" in answer else answer
    if not final:
        raise ValueError(f"{where}: 'answer': got {row['answer']!r}, wanted a final answer, after '####' if it has one")
    return Question(str(row["question"]), final)


def batches(rows: Sequence[Any], *, size: int, seed: int) -> grain.DatasetIterator:
    """Endless lists of `size` rows, every epoch in another order; `get_state` and `set_state` keep the position.

    Raises:
        ValueError: fewer rows than a batch takes.
    """
    if len(rows) < size:
        raise ValueError(f"data set: got {len(rows)} rows, wanted at least {size}, one batch; add rows or lower it")
    # An endless repeat has sys.maxsize rows, which a batch of one rounds up past what len() can say.
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(2**31).batch(size, batch_fn=list)
    # Threads would read ahead of the position that a checkpoint saves; rows in memory need none.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
