"""What a confidence is worth: several definitions over answers to questions whose right answers are known."""

if __name__ == "__main__":
    from deepseek_jax.interrupt import end_at_once

    end_at_once()

import asyncio
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from deepseek_jax.cli import run
from deepseek_jax.commands.serve import engine_of
from deepseek_jax.commands.serve_settings import Config, ServingOptions
from deepseek_jax.commands.toy import ToyOptions
from deepseek_jax.compilation_cache import keep_compiled
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.task import Answered, Problem
from deepseek_jax.evals.tasks import task_named
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.serve.answers import Choice
from deepseek_jax.serve.prompts import Prompt, Prompts
from deepseek_jax.serve.reasoning import TEMPLATES, final_answer
from deepseek_jax.serve.streams import Part
from deepseek_jax.text.think import OPEN, after_thoughts

BINS = 10
_SEED_OF_SUMS = 1


class Sample(NamedTuple):
    """A completion: log-probs of its tokens, those of the thought first, what its answer is compared by, and whether
    that is right."""

    thought: list[float]
    answer: list[float]
    final: str
    right: bool


_OF_LOGS: dict[str, Callable[[list[float]], float]] = {
    "mean probability of a token": lambda logs: float(np.mean(np.exp(logs))),
    "least probability of a token": lambda logs: math.exp(min(logs)),
    "probability of the whole": lambda logs: math.exp(sum(logs)),
}
SINGLE: dict[str, Callable[[Sample], float]] = {
    f"{name}, {part}": lambda of, score=score, thinks=thinks: score((of.thought if thinks else []) + of.answer)
    for name, score in _OF_LOGS.items()
    for part, thinks in (("answer", False), ("thought and answer", True))
}
"""Definitions for one sample."""


def main(
    model: Path,
    /,
    *,
    data: Path | None = None,
    task: str = "svamp",
    domain: str = "math",
    terms: int = 4,
    questions: int = 400,
    samples: int = 8,
    max_tokens: int = 256,
    slots: int = 64,
    enforce_thinking: bool = True,
    plot: Path | None = None,
) -> None:
    """Ask a model as /v1/reasoning does, and hold each definition of a confidence to how often answers are right.

    The expected calibration error is over ten bins of equal width; the Brier score is the mean square of what is
    missing to right or wrong; AUROC is the chance that a right answer has more confidence than a wrong one. Agreement
    is of the answer that most samples have, and right where that is.

    Args:
        model: Hugging Face folder.
        data: rows of the task as JSON Lines; None asks the train command's sums that it has not trained on, in the
            domain general.
        task: name of the benchmark.
        domain: of /v1/reasoning.
        terms: of a sum; the train command shows 4.
        questions: how many.
        samples: answers to each.
        max_tokens: of thought and answer.
        slots: answers that are drawn at a time.
        enforce_thinking: as of /v1/reasoning.
        plot: a PNG of the reliability of mean probabilities and of agreement.
    """
    if data is None:
        problems, domain = list(itertools.islice(_sums(terms), questions)), "general"
    else:
        lines = data.read_text().splitlines()[:questions]
        problems = [task_named(task).read(json.loads(line), number) for number, line in enumerate(lines)]
    keep_compiled()
    engine = engine_of(Config(model=model, engine=ServingOptions(max_num_seqs=slots, max_model_len=None)), model)
    prompts = Prompts(engine.tokenizer, engine.config.vocab_size)
    turn = lambda of: [{"role": "user", "content": TEMPLATES[domain].format(of.question)}]
    asked = [prompts.chat(turn(of), True if enforce_thinking else None) for of in problems]
    drawn = asyncio.run(_drawn(engine, prompts, asked, samples, max_tokens))
    prompts.close()
    right = _graded(problems, drawn, task if data is not None else None)
    found = [
        [Sample(*logs, _final(text, domain), ok) for (logs, text), ok in zip(rows, oks, strict=True)]
        for rows, oks in zip(drawn, right, strict=True)
    ]
    _print(found, plot)


def _sums(terms: int) -> Iterator[Problem]:
    """Sums that the train command has not trained on."""
    options = ToyOptions()
    others = ToyOptions(terms=terms)
    trained = {of.question for held in (64, 512) for of in options.chains(held, seed=0)}  # with --quick, and without
    for number, of in enumerate(others.chains(900, seed=_SEED_OF_SUMS)):
        if of.question not in trained:
            yield Problem(id=str(number), question=of.question, answer=of.answer)


async def _drawn(
    engine: Engine, prompts: Prompts, asked: Sequence[Prompt], samples: int, max_tokens: int
) -> list[list[tuple[tuple[list[float], list[float]], str]]]:
    """Of each question the completions: log-probs of the thought and of the answer, and the text of both."""
    budget = max_tokens - max(1, max_tokens // 4)
    of = {"temperature": 0.6, "top_p": 0.95, "stop_ids": engine.tokenizer.eos_ids, "thinking_budget": budget}
    choices: dict[int, Choice] = {}
    texts: dict[int, str] = {}
    for number, prompt in enumerate(asked):
        for sample in range(samples):
            sampling = SamplingConfig(max_new_tokens=max_tokens, **of)
            id = engine.add(prompt.tokens, sampling, seed=number * samples + sample)
            choices[id], texts[id] = Choice(prompts, opened=prompt.opened), OPEN if prompt.opened else ""
    progress = track(range(len(choices)), "answers", transient=True, console=Console(stderr=True))
    for update in engine.run():
        part = Part(number=0, tokens=update.tokens, text=update.text, finished=update.finished, live=update.live)
        await choices[update.id].feed(part)
        texts[update.id] += update.text
        if update.finished:
            next(iter(progress), None)
    halves = lambda of: (of.live.logprobs[: of.thought_tokens], of.live.logprobs[of.thought_tokens : len(of.tokens)])
    every = [(halves(choices[id]), texts[id]) for id in sorted(choices)]
    return [every[at : at + samples] for at in range(0, len(every), samples)]


def _graded(
    problems: Sequence[Problem], drawn: Sequence[Sequence[tuple[object, str]]], task: str | None
) -> list[list[bool]]:
    """Whether each answer is right; one that could not be graded ends the run."""
    if task is None:
        pairs = zip(problems, drawn, strict=True)
        return [[_final(text, "general") == of.answer for _, text in rows] for of, rows in pairs]
    style = task_named(task).styles["deepseek"]
    rows = [Answered(of, style, "", text) for of, each in zip(problems, drawn, strict=True) for _, text in each]
    with Graders() as graders:
        grades = task_named(task).grade(rows, graders)
    ungraded = [of.reason for of in grades if of.lenient is None]
    if ungraded:
        raise ValueError(f"grading: got no verdict on {len(ungraded)} answers, wanted all: {ungraded[0]}")
    oks = [bool(of.lenient) for of in grades]
    count = len(drawn[0])
    return [oks[at : at + count] for at in range(0, len(oks), count)]


def _final(text: str, domain: str) -> str:
    """What answers are compared by."""
    return final_answer(after_thoughts(text), domain)


def ece(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Expected calibration error: over bins of equal width, how far confidence is from the share of right answers.

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 2.

    >>> ece([0.75, 0.75, 0.75, 0.75], [True, True, True, False])
    0.0
    """
    scores, right = np.asarray(scores, float), np.asarray(right, float)
    places = np.minimum((scores * BINS).astype(int), BINS - 1)
    of = [places == place for place in range(BINS)]
    return float(sum(abs(scores[at].mean() - right[at].mean()) * at.mean() for at in of if at.any()))


def auroc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """The chance that a right answer has more confidence than a wrong one; ties count half.

    >>> auroc([0.9, 0.5, 0.5, 0.1], [True, True, False, False])
    0.875
    """
    scores, right = np.asarray(scores, float), np.asarray(right, bool)
    good, bad = scores[right][:, None], scores[~right][None]
    return float(np.mean((good > bad) + 0.5 * (good == bad))) if good.size and bad.size else math.nan


def _print(found: Sequence[Sequence[Sample]], plot: Path | None) -> None:
    every = [of for rows in found for of in rows if of.answer]
    cut = sum(len(rows) for rows in found) - len(every)
    right = [of.right for of in every]
    print(
        f"{len(found)} questions, {len(found[0])} answers each, {np.mean(right):.1%} right; {cut} without an answer\n"
    )
    print("| confidence | of | right | mean | ECE | Brier | AUROC |\n|---|---|---|---|---|---|---|")
    curves = {}
    for name, score in SINGLE.items():
        curves[name] = [score(of) for of in every], right
        _row(name, "1 sample", *curves[name])
    for count in sorted({2, 4, len(found[0])}):
        curves[f"agreement of {count}"] = _agreements(found, count)
        _row("agreement", f"{count} samples", *curves[f"agreement of {count}"])
    if plot is not None:
        shown = [*list(SINGLE)[:2], f"agreement of {len(found[0])}"]
        _draw({name: curves[name] for name in shown}, plot)


def _row(name: str, of: str, scores: Sequence[float], right: Sequence[bool]) -> None:
    brier = np.mean((np.asarray(scores) - np.asarray(right, float)) ** 2)
    told = f"{np.mean(right):.3f} | {np.mean(scores):.3f} | {ece(scores, right):.3f} | {brier:.3f}"
    print(f"| {name} | {of} | {told} | {auroc(scores, right):.3f} |")


def _agreements(found: Sequence[Sequence[Sample]], count: int) -> tuple[list[float], list[bool]]:
    """Of groups of so many samples: the share of the most common answer, and whether it is right."""
    scores, right = [], []
    for rows in found:
        for at in range(0, len(rows) - count + 1, count):
            group = rows[at : at + count]
            (final, votes), *_ = Counter(of.final for of in group).most_common(1)
            scores.append(votes / count)
            right.append(next(of.right for of in group if of.final == final))
    return scores, right


def _draw(curves: dict[str, tuple[Sequence[float], Sequence[bool]]], path: Path) -> None:
    """Share of right answers by confidence."""
    figure = Figure(figsize=(5, 4), dpi=80, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (scores, right) in curves.items():
        scores, right = np.asarray(scores, float), np.asarray(right, float)
        places = np.minimum((scores * BINS).astype(int), BINS - 1)
        bins = [places == place for place in range(BINS) if np.any(places == place)]
        x, y = ([values[at].mean() for at in bins] for values in (scores, right))
        axes.plot(x, y, "o-", label=f"{name}, ECE {ece(scores, right):.2f}", markersize=4)
    axes.set(xlabel="confidence", ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1))
    figure.legend(fontsize=8, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    run(main)
