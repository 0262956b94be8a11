"""What an evaluation counts: the answers that could be graded."""

import math

import numpy as np
import pytest

from deepseek_jax.data.examples import Prompt
from deepseek_jax.evals.accuracy import greedy_accuracy
from deepseek_jax.generation.completion import Completion
from deepseek_jax.rewards.combine import RewardError, combine


@pytest.fixture
def evaluate():
    """Grades these answers as if a model had given them."""

    def run(answers, gold, **settings):
        left = iter(answers)
        made = lambda part: [
            Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), True, text=next(left)) for _ in part
        ]
        generator = lambda weights, part, sampling, seeds, tokenizer: made(part)
        prompts = [Prompt("?", [1], {"answer": right}) for right in gold]
        return greedy_accuracy(generator, None, None, prompts, max_new_tokens=4, stop_ids=(0,), batch=2, **settings)

    return run


def picky(on_error, names=("accuracy",)):
    def score(prompts, completions, completion_ids, *, answer, **columns):
        if "bad" in completions:
            raise OSError("disk")
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    return combine(dict.fromkeys(names, score), dict.fromkeys(names, 1.0), on_error=on_error)


def test_what_has_no_right_answer_is_left_out(evaluate):
    found = evaluate([r"\boxed{4}", r"\boxed{5}", "?", r"\boxed{4}", r"\boxed{4}"], ["4", "4", None, "4", "4"])
    assert found.scores == [1.0, 0.0, None, 1.0, 1.0] and found.graded == 4
    assert found.mean == 0.75 and found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4), rel=1e-12)
    assert len(found.completions) == 5


def test_what_raises_is_left_out_or_ends_the_run_as_told(evaluate):
    found = evaluate(["4", "bad", "5"], ["4"] * 3, grade=picky("none"))
    assert (found.mean, found.graded, found.scores) == (0.5, 2, [1.0, None, 0.0])
    with pytest.raises(RewardError, match="'accuracy': row 1: raised OSError: disk"):
        evaluate(["4", "bad", "5"], ["4"] * 3, grade=picky("raise"))


def test_nothing_to_grade_is_refused(evaluate):
    with pytest.raises(ValueError, match="got None for all 2 answers, wanted a score for one at least"):
        evaluate(["bad", "bad"], ["4"] * 2, grade=picky("none"))
    with pytest.raises(ValueError, match="prompts: got none"):
        evaluate([], [])
    with pytest.raises(ValueError, match="grade: got a, b, wanted 'accuracy'"):
        evaluate(["4"], ["4"], grade=picky("none", ("a", "b")))
