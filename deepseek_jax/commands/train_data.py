"""What a training run asks: rows of data sets, or chains of arithmetic, as prompts of its model."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import grain

from deepseek_jax import distributed
from deepseek_jax.commands.train_settings import Config
from deepseek_jax.commands.train_tasks import task_rows
from deepseek_jax.data.examples import Prompt
from deepseek_jax.data.prompts import DataConfig, Example, PromptData, batches, open_prompts, prompt_batches
from deepseek_jax.evals.contamination import SHARE, overlaps
from deepseek_jax.evals.task import Problem
from deepseek_jax.rewards.recipe import check_columns
from deepseek_jax.text.tokenizer import Tokenizer

_LOOKED_AT = 100_000  # training questions that are held against the held-out ones at a start, some 15 s of them


class Asked(NamedTuple):
    """Endless batches of prompts, the longest one's tokens, held-out prompts, and examples for the cold start."""

    prompts: grain.DatasetIterator
    longest: int
    held_out: list[Prompt]
    examples: list[tuple[list[int], list[int]]]


def asked(config: Config, tokenizer: Tokenizer) -> Asked:
    """The questions of a run, split into training and held-out ones."""
    return read(config, tokenizer) if config.questions.data else generated(config, tokenizer)


def generated(config: Config, tokenizer: Tokenizer) -> Asked:
    """Chains of arithmetic."""
    count = config.questions.eval_questions
    chains = config.toy.chains(count, config.seed)
    as_example = lambda chain: Example(chain.question, chain.answer, None, {"answer": chain.answer}, 0, 0)
    prompts = [make_prompt(config, tokenizer, as_example(chain)) for chain in chains]
    _check(config, (prompt.columns for prompt in prompts))
    held_out, train = prompts[:count], prompts[count:]
    examples: list[tuple[list[int], list[int]]] = []
    if config.base.model is None:
        answer = lambda text: [*tokenizer.encode(text, add_bos=False), tokenizer.eos_ids[0]]
        shown = config.toy.worked(chains[count:], config.seed)
        examples = [(ask(config, tokenizer, chain.question), answer(text)) for chain, text in shown]
    drawn = batches(train, size=config.grpo.prompts_per_step, seed=config.seed)
    return Asked(drawn, max(len(p.tokens) for p in train), held_out, examples)


def read(config: Config, tokenizer: Tokenizer) -> Asked:
    """Questions of data sets."""
    of = config.questions.config(need_answer=config.rewards.accuracy not in ("code", "task"))
    as_prompt = partial(make_prompt, config, tokenizer)
    make = make_held_out = as_prompt
    if config.questions.tasks:
        asking, asking_held_out = task_rows(config)
        make = lambda example: as_prompt(asking(example))
        make_held_out = lambda example: as_prompt(asking_held_out(example))
    data = open_prompts(of, count_tokens=lambda example: len(make(example).tokens))
    held_out, data, said = held_out_of(config, of, data)
    if distributed.is_main():
        for line in (*data.report, said):
            print(distributed.printable(str(line)))
        if of.held_out and (leak := overlapping(data, held_out)) is not None:
            distributed.say(distributed.printable(leak), kind="warning")
    for examples in (held_out, data):
        _check(config, (example.columns for example in examples))
    longest = max(len(make(example).tokens) for example in data)
    drawn = prompt_batches(data, size=config.grpo.prompts_per_step, seed=config.seed, make=make)
    return Asked(drawn, longest, [make_held_out(example) for example in held_out], [])


def held_out_of(config: Config, of: DataConfig, data: PromptData) -> tuple[list[Example], PromptData, str]:
    """The rows to evaluate on, the data to train on, and a line that says which rows they are."""
    count = config.questions.eval_questions
    if of.held_out:
        alone = open_prompts(DataConfig(sources=of.held_out, without_answer=of.without_answer))
        return list(alone)[:count], data, f"held out: the first {min(count, len(alone))} questions of --held-out"
    held_out, rest = data.split(count, seed=config.seed)
    return held_out, rest, f"held out: {len(held_out)} of {len(data)} questions, drawn by the seed"


def overlapping(data: Iterable[Example], held_out: Sequence[Example]) -> str | None:
    """What is to be said of training questions that are held-out ones with a few other words; None where none are."""
    problems = [Problem(id=str(of.row), question=of.question) for of in held_out]
    found = overlaps((example.question for example in islice(data, _LOOKED_AT)), problems)
    held = [of for of in found if of.share >= SHARE]
    if not held:
        return None
    return (
        f"held_out: {len({of.row for of in held})} training questions share half the words of a held-out one or more, "
        f"such as {held[0].shared[:120]!r}; `deepseek-jax contamination` lists them, and writes the data without them"
    )


def _check(config: Config, rows: Iterable[Mapping[str, object]]) -> None:
    for columns in rows:
        check_columns(config.rewards, columns)


def ask(config: Config, tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt's tokens: the user's turn of a chat, or the text as it is."""
    if config.base.chat:
        return tokenizer.chat([{"role": "user", "content": text}])
    return tokenizer.encode(text, add_bos=True)


def make_prompt(config: Config, tokenizer: Tokenizer, example: Example) -> Prompt:
    """What the model is asked of a row, as tokens and as the text that rewards see."""
    # not str.format, to which the braces of \boxed{} would be fields
    text = example.question
    if config.base.prompt is not None or (config.base.model and not config.questions.tasks):  # tasks say how to answer
        text = config.prompt.replace("{question}", text)
    tokens = tokenizer.chat(list(example.messages)) if example.messages else ask(config, tokenizer, text)
    return Prompt(tokenizer.decode(tokens, skip_special=False), tokens, example.columns)
