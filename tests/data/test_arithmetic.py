"""The arithmetic task: right results, right steps, no question twice."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE, draw_chains, make_chain, trace
from deepseek_jax.rewards.accuracy import accuracy_reward
from deepseek_jax.rewards.format import format_reward
from deepseek_jax.text.tokenizer import Tokenizer

SUMS = {"terms": 3, "largest": 30, "operators": "+", "modulus": None}


@given(
    numbers=st.lists(st.integers(0, 1_000), min_size=2, max_size=6).map(tuple),
    modulus=st.none() | st.integers(2, 50),
    data=st.data(),
)
def test_every_step_of_a_trace_is_right(numbers, modulus, data):
    signs = "".join(data.draw(st.lists(st.sampled_from("+*"), min_size=len(numbers) - 1, max_size=len(numbers) - 1)))
    chain = make_chain(numbers, signs, modulus)
    total, steps = numbers[0], chain.steps.split(";")
    assert len(steps) == len(numbers) - 1
    for step, sign, number in zip(steps, signs, numbers[1:], strict=True):
        left, right = step.split("=")
        assert left == f"{total}{sign}{number}"
        wanted = {"+": total + number, "*": total * number}[sign]
        assert int(right) == (wanted if modulus is None else wanted % modulus)
        total = int(right)
    assert chain.answer == str(total)
    assert re.findall(r"\d+", chain.question) == [str(n) for n in numbers]


@pytest.mark.parametrize(("terms", "largest"), [(2, 20), (4, 99)])
def test_draws_are_distinct_and_within_their_limits(terms, largest):
    chains = draw_chains(200, terms=terms, largest=largest, operators="+", modulus=None, seed=0)
    numbers = [tuple(map(int, c.question[:-2].split("+"))) for c in chains]
    assert len(set(numbers)) == len(chains) == 200
    assert all(len(n) == terms and 0 <= min(n) and max(n) <= largest for n in numbers)
    assert {min(min(n) for n in numbers), max(max(n) for n in numbers)} == {0, largest}


def test_draws_repeat_with_their_seed_and_change_with_it():
    first = draw_chains(150, **SUMS, seed=1)
    assert first == draw_chains(150, **SUMS, seed=1) != draw_chains(150, **SUMS, seed=2)
    assert not {c.question for c in first[:50]} & {c.question for c in first[50:]}


@pytest.mark.parametrize("worked", [True, False])
def test_a_trace_earns_full_rewards_and_can_be_encoded(worked):
    tokenizer = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
    for chain in draw_chains(20, terms=3, largest=9, operators="+*", modulus=10, seed=0):
        prompt = tokenizer.chat([{"role": "user", "content": chain.question}])
        text = trace(chain, worked=worked)
        ids = tokenizer.encode(text, add_bos=False)
        assert tokenizer.decode(ids) == text
        columns = ([tokenizer.decode(prompt, skip_special=False)], [text], [ids])
        assert accuracy_reward(*columns, answer=[chain.answer]) == [1.0]
        assert accuracy_reward(*columns, answer=[str(int(chain.answer) + 1)]) == [0.0]
        assert format_reward(*columns) == [1.0]


@pytest.mark.parametrize(
    ("count", "change", "message"),
    [
        (10, {"terms": 1}, "terms: got 1"),
        (51, {"terms": 2, "largest": 9}, "questions: got 51, wanted at most half of the 100"),
        (1, {"largest": -1}, "questions: got 1"),
        (1, {"operators": "-"}, "operators: got '-'"),
        (1, {"operators": ""}, "operators: got ''"),
        # counted as two operators it would promise twice the questions there are, and look for them forever
        (1, {"operators": "++"}, r"operators: got '\+\+'"),
        (1, {"modulus": 1}, "modulus: got 1"),
    ],
)
def test_impossible_draws_are_refused(count, change, message):
    with pytest.raises(ValueError, match=message):
        draw_chains(count, **{**SUMS, **change}, seed=0)
