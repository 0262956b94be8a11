"""/v1/reasoning: steps, tokens, and what the confidence is."""

import math

import pytest

from deepseek_jax.serve.reasoning import TEMPLATES
from tests.serve.client import OPENING, TEMPLATE, Scripted, run, tokenizer

THOUGHT = "\nAdd them.\n\nCheck: 2.\n"


def ask(body, of, **settings):
    return run(lambda client: client.ask("/v1/reasoning", body), of, **settings)


def test_an_answer_has_its_steps_tokens_and_confidence():
    of = Scripted(tokenizer(OPENING), f"{THOUGHT}</think>\n\nIt is 2.")
    found = ask({"prompt": "1+1", "domain": "math", "seed": 1}, of).json
    assert found["response"] == "It is 2." and found["reasoning_steps"] == ["Add them.", "Check: 2."]
    assert found["thinking_tokens"] == len(THOUGHT) + 1
    assert found["total_tokens"] == len(THOUGHT) + 1 + len("\n\nIt is 2.") + 1
    assert found["confidence_score"] == pytest.approx(math.exp(-0.5)) and found["agreement"] is None
    shown = of.tokenizer.decode(of.added[0].tokens)
    assert TEMPLATES["math"].format("1+1") in shown and "\\boxed{}" in shown
    sampling = of.added[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (
        0.6,
        0.95,
        4096 - len(of.added[0].tokens),
    )
    assert (
        sampling.thinking_budget == sampling.max_new_tokens - sampling.max_new_tokens // 4
    )  # the rest is the answer's


def test_a_confidence_is_of_the_thought_too():
    """What follows from a thought is nearly certain, right or wrong."""
    of = Scripted(tokenizer(OPENING), "abc</think>d", logprob=lambda number: math.log(0.2 if number < 4 else 1.0))
    found = ask({"prompt": "1+1"}, of).json
    assert found["thinking_tokens"] == 4 and found["total_tokens"] == 6
    assert found["confidence_score"] == pytest.approx((4 * 0.2 + 2) / 6)


@pytest.mark.parametrize("domain", TEMPLATES)
def test_thinking_is_enforced_where_the_template_opens_none(domain):
    of = Scripted(tokenizer(TEMPLATE), f"{THOUGHT}</think>x")
    assert ask({"prompt": "{1+1}", "domain": domain}, of).json["reasoning_steps"] == ["Add them.", "Check: 2."]
    assert of.tokenizer.decode(of.added[0].tokens).endswith("<｜Assistant｜><think>\n")
    free = Scripted(tokenizer(TEMPLATE), "x")
    found = ask({"prompt": "1+1", "enforce_thinking": False, "domain": domain}, free).json
    assert found["reasoning_steps"] == [] and found["thinking_tokens"] == 0 and found["response"] == "x"


def test_of_several_samples_the_confidence_is_their_agreement():
    texts = {
        1: "a</think>\\boxed{2}",
        2: "b</think>\\boxed{3}",
        3: "c</think>so \\boxed{2}",
        4: "d</think>\\boxed{ 2 }",
    }
    found = ask({"prompt": "1+1", "domain": "math", "samples": 4, "seed": 1}, Scripted(tokenizer(OPENING), texts.get))
    assert found.json["confidence_score"] == found.json["agreement"] == 0.75
    assert found.json["response"] == "\\boxed{2}" and found.json["reasoning_steps"] == ["a"]


def test_a_cut_answer_loses_the_fragment_of_a_sentence():
    of = Scripted(tokenizer(OPENING), "a</think>It is 2. Because of the", context=4096)
    found = ask({"prompt": "1+1", "max_tokens": 16}, of).json
    assert (found["response"], found["finish_reason"]) == ("It is 2.", "length")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": ""},
        {"prompt": 1},
        {"prompt": "1", "domain": "magic"},
        {"prompt": "1", "max_tokens": 1},
        {"prompt": "1", "samples": 17},
        {"prompt": "1", "temperature": -1},
        {"prompt": "1", "model": "x"},
        {"prompt": "1", "stream": True},
        {"prompt": "1" * 5000},
    ],
)
def test_what_cannot_be_is_refused(body):
    of = Scripted(tokenizer(OPENING), "x")
    assert ask(body, of).status in (400, 404) and not of.added
