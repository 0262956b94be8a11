"""Which samples of a prompt are worth imitating: by rules, then by sense, language, length, readability and novelty.

Every sample has one reason: the first filter that it falls to, in the order of `REASONS`, or none, and is kept.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from deepseek_jax.rewards.format import boxed_format_reward, format_reward
from deepseek_jax.rewards.language import LANGUAGES, language_share, written_in
from deepseek_jax.rl.semantics import agreement, clashing_claims, comes_to, false_equations, loops
from deepseek_jax.text.think import split_thinking

REASONS = (
    *("not graded", "cut off", "wrong answer", "other form", "few samples agree", "false step", "answers that clash"),
    *("answer is not the thought's", "goes round", "far from the question", "other language", "too short", "too long"),
    *("long paragraph", "block of code", "near duplicate", "enough of its prompt"),
)
"""Why samples are left out, in the order in which it is looked at."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
_RUN = 3  # words of a shingle
_SURE_FROM = 20  # words: of the 74 English thoughts in tests/rl/thoughts.jsonl, 4 shorter ones pass for other languages

Embed = Callable[[list[str]], Sequence[Sequence[float]]]


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What is kept.

    Args:
        form: of a completion: "tags" and "boxed" as `train --format` has them, "any" takes every form.
        min_agreement: share of its prompt's samples that give its answer; below it a right answer may be luck.
        sense: leave out thoughts with a false equation, two answers that clash, an answer that they do not come to, or
            that go round.
        embedding: FILE.py:function of a list of texts, which gives a vector each: one's own model.
        min_relevance: with `embedding`: cosine between question and completion.
        thought_language: what thoughts are to be in: two letters, "question" for the question's own, "row" for the
            column `language`, or "any".
        min_language: share of a thought's words in it.
        min_tokens: of a completion.
        max_tokens_kept: of a completion; None is no limit.
        max_paragraph: characters of a paragraph of the thought (R1 leaves out long ones).
        code: keep thoughts with blocks of code (R1 does not).
        max_similarity: share of runs of three words that two kept samples of a prompt may have in common; 1 leaves out
            none but the same text.
        keep: samples of a prompt at most, the first ones; None is all.

    Raises:
        ValueError: a number out of its range, or an unknown language.
    """

    form: Literal["any", "tags", "boxed"] = "any"
    min_agreement: float = 0.0
    sense: bool = True
    embedding: str | None = None
    min_relevance: float = 0.2
    thought_language: str = "question"
    min_language: float = 0.9
    min_tokens: int = 1
    max_tokens_kept: int | None = None
    max_paragraph: int = 2_000
    code: bool = False
    max_similarity: float = 0.9
    keep: int | None = 4

    def __post_init__(self) -> None:
        for name in ("min_agreement", "min_language", "max_similarity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted a share from 0 to 1")
        if not -1 <= self.min_relevance <= 1:
            raise ValueError(f"min_relevance: got {self.min_relevance}, wanted a cosine from -1 to 1")
        for name in ("min_tokens", "max_tokens_kept", "max_paragraph", "keep"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: got {value}, wanted at least 1")
        if self.thought_language not in ("any", "question", "row", *LANGUAGES):
            raise ValueError(
                f"thought_language: got {self.thought_language!r}, wanted any, question, row, or two letters such as en"
            )


class Sampled(NamedTuple):
    """A sample of a prompt.

    prompt: as text; it may end in `<think>`. score: 1 right, 0 wrong, None not graded. language: what its thought is to
    be in; None for any.
    """

    prompt: str
    question: str
    completion: str
    answer: str | None
    score: float | None
    tokens: int
    truncated: bool
    language: str | None

    @property
    def thought(self) -> str:
        return split_thinking(self.completion, opened=self.prompt.rstrip().endswith("<think>"))[0]


def language_of(config: FilterConfig, question: str, row: Mapping[str, Any]) -> str | None:
    """What the thoughts about a question are to be in; None for any, as where a question has no words.

    Raises:
        ValueError: a row without the language that it is to have.
    """
    if config.thought_language == "row":
        if row.get("language") not in LANGUAGES:
            raise ValueError(f"language: got {row.get('language')!r}, wanted two letters such as en in every row")
        return row["language"]
    if config.thought_language == "question":
        found = written_in(question)
        return None if found is None else found[0]
    return None if config.thought_language == "any" else config.thought_language


def verdicts(
    samples: Sequence[Sampled], config: FilterConfig, *, same: Sequence[Sequence[bool]], embed: Embed | None = None
) -> list[str | None]:
    """Why each sample of a prompt is left out; None for those that are kept.

    Args:
        samples: all of one prompt.
        config: what is kept.
        same: [sample][sample] whether two answers are one.
        embed: texts to vectors.
    """
    shares = agreement([of.answer for of in samples], same)
    found = [_alone(of, share, config, embed) for of, share in zip(samples, shares, strict=True)]
    kept: list[set[tuple[str, ...]]] = []
    for place, sample in enumerate(samples):
        if found[place] is not None:
            continue
        runs = _runs(sample.completion)
        if any(_similar(runs, other) >= config.max_similarity for other in kept):
            found[place] = "near duplicate"
        elif config.keep is not None and len(kept) == config.keep:
            found[place] = "enough of its prompt"
        else:
            kept.append(runs)
    return found


def _alone(of: Sampled, share: float, config: FilterConfig, embed: Embed | None) -> str | None:
    """What a sample falls to by itself."""
    if of.score is None:
        return "not graded"
    if of.truncated:
        return "cut off"
    if of.score < 1:
        return "wrong answer"
    if config.form != "any":
        reward = format_reward if config.form == "tags" else boxed_format_reward
        if reward([of.prompt], [of.completion], [[]]) != [1.0]:
            return "other form"
    if share < config.min_agreement:
        return "few samples agree"
    return _of_sense(of, config, embed) or _of_looks(of, config)


def _of_sense(of: Sampled, config: FilterConfig, embed: Embed | None) -> str | None:
    if config.sense:
        if false_equations(of.completion):
            return "false step"
        if clashing_claims(of.completion) is not None:
            return "answers that clash"
        if of.answer is not None and not comes_to(of.thought, of.answer):
            return "answer is not the thought's"
        if loops(of.thought):
            return "goes round"
    if embed is not None and _cosine(embed([of.question, of.completion])) < config.min_relevance:
        return "far from the question"
    return None


def _of_looks(of: Sampled, config: FilterConfig) -> str | None:
    """Language, length and readability."""
    share = None if of.language is None else language_share(of.thought, of.language, sure_from=_SURE_FROM)
    if share is not None and share < config.min_language:
        return "other language"
    if of.tokens < config.min_tokens:
        return "too short"
    if config.max_tokens_kept is not None and of.tokens > config.max_tokens_kept:
        return "too long"
    if any(len(part) > config.max_paragraph for part in re.split(r"\n\s*\n", of.thought)):
        return "long paragraph"
    return "block of code" if "```" in of.thought and not config.code else None


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return {tuple(words[at : at + _RUN]) for at in range(max(1, len(words) - _RUN + 1))}


def _similar(one: set, other: set) -> float:
    return len(one & other) / len(one | other)


def _cosine(vectors: Sequence[Sequence[float]]) -> float:
    one, other = ([float(value) for value in vector] for vector in vectors)
    norms = math.hypot(*one) * math.hypot(*other)
    if len(one) != len(other) or not math.isfinite(norms):
        raise ValueError("embedding: got vectors of two lengths, or with numbers that are not finite")
    return sum(a * b for a, b in zip(one, other, strict=True)) / norms if norms else 0.0
