"""Mathematics with a final answer: GSM8K, MATH-500, AIME, AMC, SVAMP, CMATH."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from deepseek_jax.data.sources import Row
from deepseek_jax.evals.fields import joined, name_of, text
from deepseek_jax.evals.forms import after_hashes, answer_line
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.task import Answered, Grade, Problem, Published, Style, Task
from deepseek_jax.text.answers import extract_answer, extract_lenient, solution_answer

_BOXED = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_BOXED_CHINESE = "{}\n请一步步推理，并把最终答案写在\\boxed{{}}里。"
_SIMPLE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $ANSWER (without quotes) where $ANSWER is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:", and you do not need to use a \\boxed command.'
)
_LIGHTEVAL = (
    "Solve the following problem. The final line of your response MUST be of the following format:\n"
    '"ANSWER: $ANSWER" (without quotes) where $ANSWER is the final answer. Think step by step before answering.\n\n{}'
)
_STOPS = ("Question:", "</s>", "<|im_end|>")
_ANSWER_NAMES = ("answer", "expected_answer", "golden", "final_answer")


def _read(row: Row, number: int, *, question: Sequence[str]) -> Problem:
    found = text(row, *_ANSWER_NAMES)
    answer = solution_answer(found)
    if answer is None:
        raise ValueError(f"'answer': got {found!r:.80}, wanted a final answer, or a solution that ends in '#### 42'")
    id = name_of(row, number, "unique_id", "id", "task_id")
    asked = joined(row, question) if len(question) > 1 else text(row, question[0], "question", "problem")
    return Problem(id=id, question=asked.strip(), answer=answer)


def grade_answers(rows: Sequence[Answered], graders: Graders) -> list[Grade]:
    """Strict and lenient answers beside the right ones; an answer that the grader failed on has no score."""
    strict = [row.style.strict(row.text) for row in rows]
    lenient = [
        found if found is not None else extract_lenient(row.text) for found, row in zip(strict, rows, strict=True)
    ]
    pairs = {(found, row.problem.answer) for row, *both in zip(rows, strict, lenient, strict=True) for found in both
             if found is not None and row.problem.answer is not None}  # fmt: skip
    asked = sorted(pairs)
    verdicts = dict(zip(asked, graders.math.grade(asked), strict=True))
    grades = []
    for row, *both in zip(rows, strict, lenient, strict=True):
        right = row.problem.answer
        if right is None:
            grades.append(Grade(None, reason="the row has no right answer"))
            continue
        found = [None if each is None else verdicts[each, right] for each in both]
        scores = [None if of is not None and of.failed else float(of is not None and of.right) for of in found]
        reason = f"{found[0].how}: {found[0].reason}" if scores[0] is None else ""
        grades.append(Grade(*scores, both[0], reason))
    return grades


def same_answers(pairs: Sequence[tuple[str, str]], graders: Graders) -> list[bool]:
    """Whether two answers are one by the grader."""
    return [verdict.right for verdict in graders.math.grade(list(pairs))]


def _styles(
    boxed: str = _BOXED, raw: str = "Question: {}\nAnswer:", strict: Callable = after_hashes
) -> Mapping[str, Style]:
    written = lambda template: lambda problem: template.format(problem.question)
    return {
        "deepseek": Style(written(boxed)),
        "simple-evals": Style(written(_SIMPLE), strict=answer_line),
        "lighteval": Style(written(_LIGHTEVAL), strict=answer_line),
        "lm-eval": Style(written(raw), stop=_STOPS, strict=strict),
    }


def _task(name: str, hub: str, *, question: Sequence[str] = ("problem",), samples: int = 1, **styles: object) -> Task:
    return Task(
        name=name,
        read=partial(_read, question=question),
        styles=_styles(**styles),
        grade=grade_answers,
        hub=hub,
        source="deepseek-ai/DeepSeek-R1, README (the deepseek style); openai/simple-evals; huggingface/lighteval; "
        "EleutherAI/lm-evaluation-harness 0.4.13, zero-shot",
        needs=f"{' and '.join(question)} and answer",
        published=Published(samples=samples),
        same=same_answers,
        batch=256,
    )


MATHEMATICS = (
    _task("gsm8k", "openai/gsm8k:main:test", question=("question",)),
    _task(
        "math500", "HuggingFaceH4/MATH-500::test", samples=16, raw="Problem:\n{}\n\nSolution:", strict=extract_answer
    ),
    _task("aime24", "HuggingFaceH4/aime_2024::train", samples=64, strict=extract_answer),
    _task("aime25", "math-ai/aime25::test", samples=64, strict=extract_answer),
    _task("amc23", "math-ai/amc23::test", samples=64, strict=extract_answer),
    _task("svamp", "ChilleD/SVAMP::test", question=("body", "question")),
    _task("cmath", "weitianwen/cmath::test", question=("question",), boxed=_BOXED_CHINESE),
)
