"""Published results to hold a run against, each with where it stands, and what is told of how models can be had."""

from typing import NamedTuple

README = "deepseek-ai/DeepSeek-R1, README.md, section 4, table 1 (32,768 tokens, T 0.6, top-p 0.95, 64 samples)"
DISTILLED = "deepseek-ai/DeepSeek-R1, README.md, section 4, table of distilled models (same settings)"
PAPER = "DeepSeek-R1, arXiv 2501.12948 v2"
R1_0528 = "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B, model card (64K tokens, T 0.6, top-p 0.95, 16 samples)"
GUIDE = "this project's design documents; in none of DeepSeek's tables"


class Figure(NamedTuple):
    """A result: of a model on a benchmark (by `evaluate`'s name), in percent but for ratings.

    metric: pass@1, cons@64 or elo, as a run's summary names them.
    """

    model: str
    benchmark: str
    value: float
    source: str
    metric: str = "pass@1"


def _table(source: str, models: tuple[str, ...], rows: dict[str, tuple[float | None, ...]]) -> list[Figure]:
    """A published table's figures; a row is named by benchmark, with a metric behind a space where it is no pass@1."""
    found = []
    for name, values in rows.items():
        benchmark, _, metric = name.partition(" ")
        for model, value in zip(models, values, strict=True):
            if value is not None:
                found.append(Figure(model, benchmark, value, source, metric or "pass@1"))
    return found


FIGURES: tuple[Figure, ...] = (
    *_table(
        README,
        ("DeepSeek-R1", "OpenAI o1-1217", "OpenAI o1-mini", "GPT-4o-0513", "Claude-3.5-Sonnet-1022", "DeepSeek-V3"),
        {
            "aime24": (79.8, 79.2, 63.6, 9.3, 16.0, 39.2),
            "math500": (97.3, 96.4, 90.0, 74.6, 78.3, 90.2),
            "gpqa": (71.5, 75.7, 60.0, 49.9, 65.0, 59.1),
            "mmlu": (90.8, 91.8, 85.2, 87.2, 88.3, 88.5),
            "mmlu_pro": (84.0, None, 80.3, 72.6, 78.0, 75.9),
            "livecodebench": (65.9, 63.4, 53.8, 34.2, 33.8, None),
            "codeforces elo": (2029, 2061, 1820, 759, 717, 1134),
            "swebench": (49.2, 48.9, 41.6, 38.8, 50.8, 42.0),
        },
    ),
    *_table(
        DISTILLED,
        tuple(f"DeepSeek-R1-Distill-{of}" for of in
              ("Qwen-1.5B", "Qwen-7B", "Qwen-14B", "Qwen-32B", "Llama-8B", "Llama-70B")),
        {
            "aime24": (28.9, 55.5, 69.7, 72.6, 50.4, 70.0),
            "aime24 cons@64": (52.7, 83.3, 80.0, 83.3, 80.0, 86.7),
            "math500": (83.9, 92.8, 93.9, 94.3, 89.1, 94.5),
            "gpqa": (33.8, 49.1, 59.1, 62.1, 49.0, 65.2),
            "livecodebench": (16.9, 37.6, 53.1, 57.2, 39.6, 57.5),
            "codeforces elo": (954, 1189, 1481, 1691, 1205, 1633),
        },
    ),
    *_table(PAPER, ("DeepSeek-R1-Zero",), {"aime24": (71.0,), "math500": (95.9,)}),
    *_table(
        R1_0528,
        ("DeepSeek-R1-0528", "DeepSeek-R1"),
        {"aime25": (87.5, 70.0), "mmlu_pro": (85.0, None), "gpqa": (81.0, None), "swebench": (57.6, None)},
    ),
    Figure("DeepSeek-R1-0528", "livecodebench", 73.3, f"{R1_0528}; problems of 2408 to 2505"),
    Figure("DeepSeek-R1", "gsm8k", 94.7, GUIDE),
    Figure("DeepSeek-R1", "humaneval", 89.2, GUIDE),
    Figure("OpenAI o1", "aime24", 83.3, f"{GUIDE} (o1-1217 has 79.2 in {README})"),
    Figure("OpenAI o1", "math500", 94.8, f"{GUIDE} (o1-1217 has 96.4 in {README})"),
)  # fmt: skip

THINKING = ((12_000, 70.0, "DeepSeek-R1"), (23_000, 87.5, "DeepSeek-R1-0528"))
"""AIME 2025: mean thinking tokens a question and accuracy, from the model card in `R1_0528`."""


class Access(NamedTuple):
    """How a model can be had and deployed, as its source tells; "" where it tells nothing."""

    model: str
    parameters: str
    weights: str
    deployment: str
    source: str


_R1 = "deepseek-ai/DeepSeek-R1, README.md, sections 3, 5 and 6"
_CLOSED = f"{README}: it gives neither architecture nor parameters"
ACCESS: tuple[Access, ...] = (
    Access("DeepSeek-R1", "671B, 37B active", "published, MIT", "chat.deepseek.com, OpenAI-compatible API, or at home "
           "as DeepSeek-V3 (128K context)", _R1),
    Access("DeepSeek-R1-Zero", "671B, 37B active", "published, MIT", "at home as DeepSeek-V3 (128K context)", _R1),
    Access("DeepSeek-R1-Distill", "1.5B to 70B, dense", "published", "as Qwen or Llama models; for 32B vllm serve "
           "--tensor-parallel-size 2 --max-model-len 32768, or SGLang --tp 2", _R1),
    Access("OpenAI o1, GPT-4o, Claude-3.5-Sonnet", "", "", "", _CLOSED),
)  # fmt: skip


def of_benchmark(benchmark: str, metric: str) -> list[Figure]:
    """What is published of a benchmark, the best first."""
    found = [figure for figure in FIGURES if (figure.benchmark, figure.metric) == (benchmark, metric)]
    return sorted(found, key=lambda figure: -figure.value)
