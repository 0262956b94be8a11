"""Rejection sampling: draw samples of every question, keep what is right and well told, as data to fine-tune on."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import write_whole
from deepseek_jax.checkpoint.lock import locked
from deepseek_jax.commands import evaluate
from deepseek_jax.commands.evaluate_settings import BenchmarkOptions, DrawOptions, ServerOptions
from deepseek_jax.commands.generate_settings import EngineOptions
from deepseek_jax.commands.options import command
from deepseek_jax.data.sources import Source, open_source
from deepseek_jax.evals.graders import GraderConfig, Graders
from deepseek_jax.evals.samples import Samples, json_line
from deepseek_jax.evals.task import Task
from deepseek_jax.rewards.own import own_rewards
from deepseek_jax.rl.rejection import REASONS, Embed, FilterConfig, Sampled, language_of, verdicts
from deepseek_jax.text.think import with_opening
from deepseek_jax.train.runs import write_json

ACCEPTED, REJECTED, COUNTS = "accepted.jsonl", "rejected.jsonl", "rejection.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a call.

    Args:
        model: Hugging Face or converted folder with its tokenizer, or a name on the hub; with --server a name there.
        output: folder for samples.jsonl, accepted.jsonl, rejected.jsonl and rejection.json; the same command goes on
            with the samples that are there, and other filters begin from them.
        config: settings by the names of the options, as .toml or .yaml; what the command line says counts before them.
        asked: What is asked: the rows of --data, read and graded as those of --benchmark.
        drawing: How tokens are drawn.
        filters: What is kept.
        engine: How it is computed.
        serving: A server in the place of a model here.
        grading: What graders may use.
    """

    model: Annotated[Path | None, tyro.conf.Positional] = None
    output: Path = Path("runs/rejection")
    config: Path | None = None
    asked: Annotated[BenchmarkOptions, tyro.conf.arg(name="benchmarks")] = BenchmarkOptions(samples=16)
    drawing: DrawOptions = DrawOptions()
    filters: FilterConfig = field(default_factory=FilterConfig)
    engine: EngineOptions = EngineOptions()
    serving: Annotated[ServerOptions, tyro.conf.arg(name="server")] = ServerOptions()
    grading: GraderConfig = GraderConfig()

    def __post_init__(self) -> None:
        if "," in self.asked.benchmark:
            self.check()
        _ = self.sampling  # refuses what `evaluate` would
        if self.asked.thinking_budgets is not None:
            raise ValueError("thinking_budgets: got some, wanted none: samples are to be imitated as they are drawn")
        if self.filters.embedding is not None:
            own_rewards([self.filters.embedding])

    def check(self) -> None:
        """Refuse no benchmark, or several."""
        if not self.asked.benchmark or "," in self.asked.benchmark:
            raise ValueError(
                f"benchmark: got {self.asked.benchmark or 'none'!r}, wanted one name, such as --benchmark gsm8k, whose "
                "form the rows of --data have"
            )

    @property
    def sampling(self) -> evaluate.Config:
        """The same as an evaluation, which draws the samples and grades them."""
        shared = {of.name: getattr(self, of.name) for of in dataclasses.fields(evaluate.Config)}
        return evaluate.Config(**shared)


COMMON = (
    *(
        "model",
        "benchmark",
        "data",
        "samples",
        "limit",
        "temperature",
        "top_p",
        "max_tokens",
        "seed",
        "batch",
        "output",
    ),
    *("form", "min_agreement", "thought_language", "max_tokens_kept", "keep", "server"),
)
"""The options that the short help shows."""


class Found(NamedTuple):
    """Rows that are kept, and all others with their reasons."""

    accepted: list[dict[str, Any]]
    rejected: list[dict[str, Any]]


@command(Config, common=COMMON, deciding=(), defaults=lambda given: Config())
def main(config: Config) -> None:
    """Draw --samples of every question of --data with MODEL, and keep those that pass every filter."""
    config.check()
    (task,) = config.asked.tasks
    embed = _embedding(config.filters)
    evaluate.main(config.sampling)
    with locked(config.output, advice="wait for it or stop it, or choose another --output"):
        found = _sorted(config, task, embed)
        _write(config, found)


def _embedding(filters: FilterConfig) -> Embed | None:
    """One's own model of texts."""
    return None if filters.embedding is None else own_rewards([filters.embedding])[0].load()


def _sorted(config: Config, task: Task, embed: Embed | None) -> Found:
    """Every sample, with the reason for which it is left out if it is."""
    source = open_source(config.asked.source(task))
    records: dict[int, list[dict[str, Any]]] = {}
    for record in Samples(config.output).of(task.name):
        if record["sample"] < config.asked.samples:
            records.setdefault(record["number"], []).append(record)
    found, seen = Found([], []), set()
    with Graders(config.grading) as graders:
        for number in range(len(source) if config.asked.limit is None else min(len(source), config.asked.limit)):
            reasons = _reasons(config, task, source, records[number], graders, embed)
            for record, reason in zip(records[number], reasons, strict=True):
                row, text = _row(config, record), " ".join(f"{record['asked']} {record['completion']}".split())
                if reason is None and text in seen:
                    reason = "near duplicate"
                if reason is None:
                    seen.add(text)
                    found.accepted.append(row)
                else:
                    found.rejected.append(row | {"reason": reason, "answer": record["answer"]})
    return found


def _reasons(
    config: Config,
    task: Task,
    source: Source,
    records: Sequence[Mapping[str, Any]],
    graders: Graders,
    embed: Embed | None,
) -> list[str | None]:
    number = records[0]["number"]
    row = source[number]
    question = task.read(row, number).question
    try:
        language = language_of(config.filters, question, row)
    except ValueError as problem:
        raise ValueError(f"{source.where(number)}: {problem}; or choose another --thought-language") from None
    samples = [
        Sampled(
            "<think>" if of["opened"] else "",
            question,
            of["completion"],
            of["answer"],
            of["score"],
            of["tokens"],
            of["truncated"],
            language,
        )
        for of in records
    ]
    return verdicts(samples, config.filters, same=_same(config, task, records, graders), embed=embed)


def _same(
    config: Config, task: Task, records: Sequence[Mapping[str, Any]], graders: Graders
) -> Sequence[Sequence[bool]]:
    """Which answers of a prompt's samples are one. Where no agreement is asked for, nothing is compared."""
    answers = [of["answer"] for of in records]
    if not config.filters.min_agreement or task.same is None:
        return [[True] * len(answers) for _ in answers]
    texts = list(dict.fromkeys(answer for answer in answers if answer is not None))
    pairs = [(one, other) for one in texts for other in texts if one != other]
    equal = dict(zip(pairs, task.same(pairs, graders), strict=True)) if pairs else {}
    return [[a is not None and b is not None and (a == b or equal[a, b]) for b in answers] for a in answers]


def _row(config: Config, record: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as a conversation that `sft` reads, and where it is from."""
    text = with_opening("<think>" if record["opened"] else "", record["completion"])
    if config.asked.chat:
        said = [{"role": "user", "content": record["asked"]}, {"role": "assistant", "content": text}]
        if config.asked.system is not None:
            said = [{"role": "system", "content": config.asked.system}, *said]
        row: dict[str, Any] = {"messages": said}
    else:
        row = {"prompt": record["asked"], "completion": text}
    return row | {"number": record["number"], "sample": record["sample"], "tokens": record["tokens"]}


def _write(config: Config, found: Found) -> None:
    """The files, and what there is to say of them.

    Raises:
        ValueError: no sample is kept.
    """
    reasons = Counter(row["reason"] for row in found.rejected)
    counts = {name: reasons[name] for name in REASONS if reasons[name]}
    samples = len(found.accepted) + len(found.rejected)
    prompts = {row["number"] for row in (*found.accepted, *found.rejected)}
    summary = {
        "samples": samples,
        "kept": len(found.accepted),
        "prompts": len(prompts),
        "prompts_kept": len({row["number"] for row in found.accepted}),
        "rejected": counts,
        "filters": dataclasses.asdict(config.filters),
    }
    lines = lambda rows: b"".join(map(json_line, rows))
    write_whole(config.output / REJECTED, lines(found.rejected))
    write_json(config.output / COUNTS, summary)
    told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda of: -of[1]))
    if not found.accepted:
        (config.output / ACCEPTED).unlink(missing_ok=True)
        raise ValueError(
            f"{config.output}: none of {samples} samples is kept ({told}); the samples stay: loosen a filter, or draw "
            "more by --samples"
        )
    write_whole(config.output / ACCEPTED, lines(found.accepted))
    kept = f"kept {len(found.accepted)} of {samples} samples, of {summary['prompts_kept']} of {len(prompts)} questions"
    print(distributed.printable(f"{kept}; left out: {told or 'none'}"))
    print(distributed.printable(f"data: {config.output / ACCEPTED}   the others: {config.output / REJECTED}"))
