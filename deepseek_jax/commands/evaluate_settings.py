"""The settings of `evaluate`: options by groups, and what of them contradicts each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from deepseek_jax.commands.generate_settings import EngineOptions, by_option
from deepseek_jax.evals.graders import GraderConfig
from deepseek_jax.evals.task import StyleName, Task
from deepseek_jax.evals.tasks import files_of, task_named
from deepseek_jax.generation.sampling_config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What is asked.

    Args:
        benchmark: a name or several with commas: gsm8k, math500, aime24, aime25, amc23, svamp, cmath, humaneval,
            humaneval_plus, mbpp, mbpp_plus, livecodebench, gpqa, mmlu, mmlu_pro, codeforces, swebench, formal, port,
            puzzles.
        data: a file of rows (.jsonl, .json, .csv, .parquet), a folder of such, or a name on the hub; for several
            benchmarks NAME=FILE each. Without it the data set's own name on the hub.
        samples: of each problem.
        limit: problems, the first ones; None takes all.
        prompt_style: whose prompt; deepseek is R1's own.
        system: text that the conversations begin with; R1 is asked without.
        chat: put prompts into the checkpoint's chat template; base models, which have none, want --no-chat.
        thinking_budgets: tokens with commas, such as 512,2048: how right are answers after thoughts cut there.
    """

    benchmark: str = ""
    data: tuple[str, ...] = ()
    samples: int = 1
    limit: int | None = None
    prompt_style: StyleName = "deepseek"
    system: str | None = None
    chat: bool = True
    thinking_budgets: str | None = None

    @property
    def tasks(self) -> list[Task]:
        """The benchmarks, each once, in order."""
        return [task_named(name) for name in dict.fromkeys(self.benchmark.replace(" ", "").split(","))]

    @property
    def budgets(self) -> list[int]:
        """Of thinking, the smallest first."""
        if self.thinking_budgets is None:
            return []
        words = self.thinking_budgets.replace(" ", "").split(",")
        if not all(word.isdecimal() and len(word) < 10 for word in words):
            raise ValueError(f"thinking_budgets: got {self.thinking_budgets!r}, wanted tokens such as 512,2048")
        return sorted({int(word) for word in words})

    def source(self, task: Task) -> str:
        """Where a benchmark's rows are."""
        return self.files.get(task.name, task.hub)

    @property
    def files(self) -> dict[str, str]:
        """The data that is named, by benchmark."""
        return files_of([task.name for task in self.tasks], self.data, "data")


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How tokens are drawn; the defaults are those of R1's figures.

    Args:
        temperature: 0 takes the best token each time, and is for one sample a problem.
        top_p: sample among the smallest set of tokens that reaches this probability.
        max_tokens: limit of new tokens, thinking included; no more than the context has room for.
        seed: the same seed draws the same samples.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32_768
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """A server in the place of a model here.

    Args:
        server: address of one that speaks OpenAI's /v1/chat/completions; MODEL is then its name there.
        server_key: name of the environment variable that holds the server's key.
    """

    server: str | None = None
    server_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an evaluation.

    Args:
        model: Hugging Face or converted folder with its tokenizer, or a name on the hub; with --server a name there.
        output: folder for summary.json and samples.jsonl; the same command goes on with what is there.
        config: settings by the names of the options, as .toml or .yaml; what the command line says counts before them.
        asked: What is asked.
        drawing: How tokens are drawn; the defaults are those of R1's figures.
        engine: How it is computed.
        serving: A server in the place of a model here.
        grading: What graders may use.
    """

    model: Annotated[Path | None, tyro.conf.Positional] = None
    output: Path = Path("runs/evaluate")
    config: Path | None = None
    asked: Annotated[BenchmarkOptions, tyro.conf.arg(name="benchmarks")] = BenchmarkOptions()
    drawing: DrawOptions = DrawOptions()
    engine: EngineOptions = EngineOptions()
    serving: Annotated[ServerOptions, tyro.conf.arg(name="server")] = ServerOptions()
    grading: GraderConfig = GraderConfig()

    def __post_init__(self) -> None:
        asked, drawing = self.asked, self.drawing
        for name, count in {"samples": asked.samples, "limit": asked.limit, "batch": self.engine.batch}.items():
            if count is not None and count < 1:
                raise ValueError(f"{name}: got {count}, wanted at least 1")
        if drawing.seed < 0:
            raise ValueError(f"seed: got {drawing.seed}, wanted 0 or more")
        if drawing.temperature == 0 and asked.samples > 1:
            raise ValueError(f"samples: got {asked.samples} at --temperature 0, wanted 1: they are all the same")
        if asked.benchmark:
            for task in asked.tasks:
                task.style(asked.prompt_style)
            _ = asked.files
        _ = asked.budgets
        self.sampling(())

    def sampling(self, stop_ids: tuple[int, ...]) -> SamplingConfig:
        """The settings that an engine draws by; ValueError names the option that is wrong."""
        try:
            return SamplingConfig(
                max_new_tokens=self.drawing.max_tokens,
                temperature=self.drawing.temperature,
                top_p=self.drawing.top_p,
                stop_ids=stop_ids,
            )
        except ValueError as problem:
            raise ValueError(by_option(str(problem))) from None


COMMON = (
    *("model", "benchmark", "data", "samples", "limit", "prompt_style", "chat", "thinking_budgets", "temperature"),
    *("top_p", "max_tokens", "seed", "batch", "dtype", "server", "output"),
)
"""The options that the short help shows."""
