"""Puzzles: what is worked out is right, what is right is told from what is not, and nothing held out is trained on."""

import operator
import re
from collections import Counter

import numpy as np
import pytest

from deepseek_jax.data.puzzle_text import demonstrations, facts, general, general_prompts, puzzle_tokenizer, unwritable
from deepseek_jax.data.puzzles import FAMILIES, LARGEST, check_row, completion, draw, guess, is_right, part_of, thought
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.rewarding import task_reward
from deepseek_jax.rewards.language import language_reward
from deepseek_jax.text.answers import extract_answer

LEVELS = (1, 2, 3, 4)
OPERATORS = {"+": operator.add, "-": operator.sub, "%": operator.mod}


@pytest.fixture(scope="module")
def drawn():
    held_out = draw(1_500, part="held_out", levels=LEVELS[1:], seed=0)  # of one step there are too few
    return {"train": draw(2_000, part="train", levels=LEVELS, seed=0), "held_out": held_out}


def test_every_answer_and_every_step_is_right(drawn):
    for puzzle in drawn["train"]:
        assert is_right(puzzle.row(), extract_answer(completion(puzzle))), puzzle
        check_row(puzzle.row())
        for step in puzzle.steps:
            left, sign, right = re.fullmatch(r"(.+?)([=>])(\d+)", step).groups()
            a, sign_of, b = re.fullmatch(r"(\d+)(?:([-+%])(\d+))?", left).groups()
            left = int(a) if sign_of is None else OPERATORS[sign_of](int(a), int(b))
            assert (left == int(right)) if sign == "=" else (left > int(right)), puzzle
            assert 0 <= int(a) <= LARGEST


def test_the_question_alone_gives_the_answer(drawn):
    """Worked out anew from the text, so that question and answer cannot drift apart."""
    for puzzle in drawn["held_out"]:
        numbers = [int(number) for number in re.findall(r"\d+", puzzle.question)]
        if puzzle.family == "countdown":
            target = numbers.pop(0) if puzzle.language == "en" else numbers.pop()
            assert (target, numbers) == (puzzle.target, list(puzzle.numbers))
            continue
        if puzzle.family == "story":
            gains = {"buys", "finds", "买来", "找到"}
            words = re.findall(r"buys|finds|sells|loses|买来|找到|卖掉|丢了", puzzle.question)
            found = numbers[0] + sum(n if w in gains else -n for w, n in zip(words, numbers[1:], strict=True))
        else:
            texts = re.findall(r"\d+(?:[-+]\d+)*", puzzle.question)
            values = [sum(map(int, re.findall(r"[-+]?\d+", text))) for text in texts]
            found = values[0] % numbers[-1] if puzzle.family == "modular" else max(values)
        assert puzzle.answer == str(found), puzzle


def test_families_languages_and_levels_are_evenly_there_and_no_question_twice(drawn):
    counts = Counter((p.family, p.level, p.language) for p in drawn["train"])
    assert set(counts) == {(f, level, la) for f in FAMILIES for level in LEVELS for la in ("en", "zh")}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({p.question for p in drawn["train"]}) == 2_000


def test_no_held_out_question_is_trained_on_in_any_language_order_or_seed(drawn):
    """A question counts by its numbers: the same ones in the other language, or swapped, are the same question."""
    of = lambda p: (*sorted(p.numbers), p.target) if p.target is not None else tuple(sorted(p.steps))
    key = lambda p: (p.family, of(p))
    train = {key(p) for seed in range(2) for p in draw(1_500, part="train", levels=LEVELS, seed=seed)}
    held_out = {key(p) for p in drawn["held_out"]}
    assert not train & held_out and len(held_out) > 800
    assert {part_of(p) for p in drawn["held_out"]} == {"held_out"}


def test_the_same_seed_draws_the_same(drawn):
    again = draw(50, part="train", levels=(2,), seed=3)
    assert again == draw(50, part="train", levels=(2,), seed=3) != draw(50, part="train", levels=(2,), seed=4)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("9+5-3", True), ("5-3+9", True), ("9+5", False), ("9+5-3-3", False), ("14-3", False), ("11", False),
        ("9+5+3-6", False), ("9+5-3=11", False), ("", False), ("9 + 5 - 3", False), ("__import__('os')", False),
        ("9" * 101, False), ("9**9**9", False), ("+".join("9" * 99), False),
    ],
)  # fmt: skip
def test_a_countdown_takes_each_number_once_and_comes_to_its_target(answer, right):
    assert is_right({"answer": "9+5-3", "numbers": [9, 5, 3], "target": 11}, answer) is right


@pytest.mark.parametrize(("answer", "right"), [("7", True), (" 7 ", True), ("07", True), ("7.0", False), ("8", False)])
def test_other_answers_are_equal_as_whole_numbers(answer, right):
    assert is_right({"answer": "7", "numbers": [], "target": None}, answer) is right


@pytest.mark.parametrize(
    "row", [{"answer": "x"}, {"answer": 7}, {"answer": "1+2", "target": 3}, {"answer": "3", "target": 3, "numbers": []}]
)
def test_a_row_that_cannot_be_judged_by_is_refused(row):
    with pytest.raises(ValueError, match="wanted"):
        check_row(row)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"families": ("sudoku",)}, "families: got 'sudoku'"),
        ({"levels": (7,)}, "levels: got"),
        ({"levels": (1,), "families": ("chain",)}, "ask for fewer"),
    ],
)
def test_what_cannot_be_drawn_is_told(given, says):
    with pytest.raises(ValueError, match=says):
        draw(5_000, **{"part": "train", "levels": (1,), "seed": 0, **given})


def test_thoughts_are_in_the_language_they_are_asked_for(drawn):
    reward = {name: language_reward(language=name) for name in ("en", "zh")}
    for puzzle in drawn["train"][:200]:
        for of in ("en", "zh"):
            text = f"<think>{thought(puzzle, of)}</think>"
            assert reward[of]([""], [text], [[]]) == [1.0]
            assert reward["zh" if of == "en" else "en"]([""], [text], [[]]) == [0.0]


def test_the_small_tokenizer_writes_everything_and_reads_it_back(drawn):
    tokenizer = puzzle_tokenizer()
    texts = [
        text
        for part in drawn.values()
        for p in part
        for text in (p.question, completion(p), completion(p, worked=False))
    ]
    texts += [of for part in drawn.values() for p in part for of in (thought(p, "zh"), guess(p, "en"), guess(p, "zh"))]
    texts += [text for row in facts(200, 0) for text in row.values()]
    texts += [message["content"] for row in general(0) for message in row["messages"]]
    texts += [row["question"] for row in general_prompts()]
    assert not "".join(map(unwritable, (re.sub(r"</?(think|answer)>", "", text) for text in texts)))
    for text in texts[:: len(texts) // 300]:
        tokens = tokenizer.encode(text, add_bos=False)
        assert tokenizer.decode(tokens) == text
    lengths = [len(tokenizer.encode(completion(p), add_bos=False)) for p in drawn["train"]]
    assert tokenizer.vocab_size <= 160 and max(lengths) < 64


def test_rewards_are_of_the_rows_own_rule_and_language(drawn):
    rows = [p.row() for p in drawn["train"][:40]] + general_prompts()[:2]
    texts = [completion(p) for p in drawn["train"][:40]] + ["<think>x</think><answer>Hello.</answer>"] * 2
    columns = {name: [row[name] for row in rows] for name in ("answer", "numbers", "target", "language")}
    columns |= {"task": ["puzzles"] * 40 + [None] * 2, "row": rows}
    with Graders() as graders:
        reward = task_reward(graders)
        assert reward([""] * 42, texts, [[]] * 42, **columns) == [1.0] * 40 + [None] * 2
        assert reward([""] * 42, ["<answer>-1</answer>"] * 42, [[]] * 42, **columns) == [0.0] * 40 + [None] * 2
    assert language_reward(language=None)([""] * 42, texts, [[]] * 42, **columns)[:40] == [1.0] * 40
    with pytest.raises(ValueError, match="no column 'language'"):
        language_reward(language=None)([""], ["x"], [[]])
    with pytest.raises(ValueError, match="got 'xx'"):
        language_reward(language=None)([""], ["x"], [[]], language=["xx"])


def test_strays_of_language_are_as_many_as_asked_for(drawn):
    rows = demonstrations(drawn["train"], mixed=0.25, guessed=0.0, seed=0)
    strays = [thought(p) not in row["messages"][1]["content"] for p, row in zip(drawn["train"], rows, strict=True)]
    assert np.mean(strays) == pytest.approx(0.25, abs=0.03)
    assert not any(
        thought(p) not in row["messages"][1]["content"]
        for p, row in zip(drawn["train"], demonstrations(drawn["train"], mixed=0.0, guessed=0.0, seed=0), strict=True)
    )


def test_a_base_reads_right_equations_and_no_chain_that_is_held_out():
    rows = facts(2_000, 0)
    chains = [row for row in rows if ";" in row["completion"] and ";" not in row["prompt"]]
    held_out = {re.sub("[^0-9+-]", "", p.question) for p in draw(500, part="held_out", levels=(2, 3, 4), seed=0)}
    assert len(chains) == 1_000 and not held_out & {row["prompt"] for row in chains}
    for row in chains:
        steps, total = row["completion"].split(";"), None
        for step, asked in zip(steps, re.findall(r"[+-]\d", row["prompt"]), strict=True):
            a, sign, b, result = re.fullmatch(r"(\d+)([+-])(\d)=(\d+)", step).groups()
            assert sign + b == asked and OPERATORS[sign](int(a), int(b)) == int(result)
            assert total is None or int(a) == total
            total = int(result)
    for row in rows:
        for fact in row["completion"].split(";"):
            a, sign, b, result = re.fullmatch(r"(\d+)(?:([-+%])(\d+)=|>)(\d+)", fact).groups()
            assert int(a) > int(result) if sign is None else OPERATORS[sign](int(a), int(b)) == int(result)


def test_as_many_demonstrations_guess_as_asked_for_and_all_are_right(drawn):
    puzzles = drawn["train"]
    rows = demonstrations(puzzles, mixed=0.0, guessed=0.6, seed=0)
    texts = [row["messages"][1]["content"] for row in rows]
    assert np.mean([thought(p) not in text for p, text in zip(puzzles, texts, strict=True)]) == pytest.approx(
        0.6, abs=0.03
    )
    for puzzle, text in zip(puzzles, texts, strict=True):
        assert is_right(puzzle.row(), extract_answer(text))
        assert language_reward(language=puzzle.language)([""], [text], [[]]) == [1.0]
