"""What an evaluation found, by benchmark, from its samples."""

import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.measures import by_group, clustered, elo, interval, mean_of, pass_at, several, vote
from deepseek_jax.evals.run import Benchmark
from deepseek_jax.evals.samples import Samples
from deepseek_jax.rewards.language import written_in

_MIXED = 0.9  # share of words in one script below which a sample mixes languages
_REASONS = 5
# Telling languages takes long: of so many samples, so many characters of beginning, middle and end are read.
_READ, _PIECE = 512, 400

Record = Mapping[str, Any]


def summary(
    benchmark: Benchmark, held: Samples, graders: Graders, settings: Mapping[str, Any], budget: int = -1
) -> dict[str, Any]:
    """The figures of one benchmark, as summary.json has them.

    Args:
        benchmark: what was asked.
        held: its samples; all are there.
        graders: open, for the vote among samples.
        settings: how samples were drawn (`temperature`, `top_p`, `max_tokens`, `samples`), to tell which are not the
            published ones.
        budget: of thinking; a sample that did not need it is the one without a budget.
    """
    rows = records(benchmark, held, budget)
    scores = [[record["score"] for record in of] for of in rows]
    every = [record for of in rows for record in of]
    found = clustered(scores)
    lenient = clustered([[record["lenient"] for record in of] for of in rows])
    ungraded = Counter(record["reason"] for record in every if record["score"] is None)
    values: dict[str, Any] = {
        "pass@1": None if found is None else found.mean,
        "stderr": None if found is None else found.stderr,
        "interval": interval(scores),
        "n": 0 if found is None else found.n,
        "problems": len(rows),
        "samples": benchmark.samples,
        "ungraded": sum(ungraded.values()),
        "ungraded_reasons": dict(list(by_group(ungraded).items())[:_REASONS]),
        "lenient": None if lenient is None else lenient.mean,
        "lenient_stderr": None if lenient is None else lenient.stderr,
    }
    values |= _more_samples(benchmark, rows, graders)
    values |= {f"parts/{name}": of for name, of in _parts(every).items()}
    if benchmark.task.rated:
        rating = elo(scores, [problem.more.get("rating") for problem in benchmark.problems])
        values["elo"] = None if rating is None else rating.rating
        values["elo_interval"] = None if rating is None or rating.low is None else [rating.low, rating.high]
    return values | _texts(every) | _costs(every) | _told(benchmark, settings)


def records(benchmark: Benchmark, held: Samples, budget: int = -1) -> list[list[Record]]:
    """The samples of every problem; with a budget those that it cut, and the others as they were without one."""
    rows: list[list[Record]] = [[] for _ in benchmark.problems]
    for key in benchmark.keys():
        record = held.get(key._replace(budget=budget)) if budget >= 0 else None
        record = held.get(key) if record is None else record
        assert record is not None, key
        rows[key.number].append(record)
    return rows


def _more_samples(benchmark: Benchmark, rows: Sequence[Sequence[Record]], graders: Graders) -> dict[str, Any]:
    """pass@k and the vote, where there are several samples."""
    scores = [[record["score"] for record in of] for of in rows]
    values: dict[str, Any] = {}
    for k in several(benchmark.samples):
        found = pass_at(scores, k)
        values[f"pass@{k}"] = None if found is None else found.mean
        values[f"pass@{k}_stderr"] = None if found is None else found.stderr
    task = benchmark.task
    if task.same is not None and benchmark.samples > 1:
        same = lambda pairs: task.same(pairs, graders)
        votes = [[vote([r["answer"] for r in of], [r["score"] for r in of], same)] for of in rows]
        found = clustered(votes)
        values[f"cons@{benchmark.samples}"] = None if found is None else found.mean
        values[f"cons@{benchmark.samples}_stderr"] = None if found is None else found.stderr
    return values


def _parts(every: Sequence[Record]) -> dict[str, float | None]:
    names = dict.fromkeys(name for record in every for name in record["parts"])
    return {name: mean_of([record["parts"].get(name) for record in every]) for name in names}


def _texts(every: Sequence[Record]) -> dict[str, Any]:
    """Lengths, what was cut off, and languages."""
    thinking = [record["thinking_tokens"] for record in every]
    answers = [None if of is None else record["tokens"] - of for of, record in zip(thinking, every, strict=True)]
    read = every[:: -(-len(every) // _READ)]
    written = [found for record in read if (found := written_in(_pieces(record["completion"]))) is not None]
    languages = Counter(language for language, _ in written)
    mixed = [float(share < _MIXED) for _, share in written]
    return {
        "tokens": sum(record["tokens"] for record in every),
        "mean_prompt_tokens": mean_of([record.get("prompt_tokens") for record in every]),
        "mean_tokens": mean_of([record["tokens"] for record in every]),
        "mean_thinking_tokens": mean_of(thinking),
        "mean_answer_tokens": mean_of(answers),
        "truncated": mean_of([float(record["truncated"]) for record in every]),
        "unclosed": mean_of([float(record["unclosed"]) for record in every]),
        "unanswered": mean_of([float(record["answer"] is None) for record in every if record["right"] is not None]),
        "languages": {name: count / len(written) for name, count in by_group(languages).items()},
        "mixed_language": mean_of(mixed),
    }


def _pieces(text: str) -> str:
    middle = (len(text) - _PIECE) // 2
    short = len(text) <= 3 * _PIECE
    return text if short else f"{text[:_PIECE]} {text[middle : middle + _PIECE]} {text[-_PIECE:]}"


def _costs(every: Sequence[Record]) -> dict[str, Any]:
    """Times are sums over samples of the time since the one before, so that a resumed run counts what it drew."""
    seconds = sum(record["seconds"] for record in every)
    tokens = sum(record["tokens"] for record in every)
    return {
        "tokens_per_second": tokens / seconds if seconds else None,
        "wall_seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
    }


def _told(benchmark: Benchmark, settings: Mapping[str, Any]) -> dict[str, Any]:
    published = benchmark.task.published._asdict()
    now = {name: settings.get(name) for name in published} | {"samples": benchmark.samples}
    return {
        "prompt_style": benchmark.style,
        "data": benchmark.task.hub,
        "source": benchmark.task.source,
        "settings": now,
        "unlike_published": {name: [now[name], value] for name, value in published.items() if now[name] != value},
    }


def peak_memory() -> int:
    """Bytes: of the first device where it says so, else of this process."""
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        return int(memory["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
