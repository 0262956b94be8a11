"""The settings of `generate`: options by groups, and what of them contradicts each other."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from deepseek_jax.generation.engine_config import CacheDType
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.packing import Quantization
from deepseek_jax.model.precision import Precision

MAX_TOKENS = 256
"""New tokens of a completion where nothing else is said; an answer in a conversation has what the context has."""
_DRAFT_TOKENS = {"lookup": 4, "mtp": 1}  # a module is trained for one
_OPTIONS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "top_logprobs": "logprobs"}
_BIAS = re.compile(r"([0-9]{1,9})=([-+]?[0-9]{1,9}(?:\.[0-9]{1,9})?)")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What is completed; without --prompt and --prompts, on a terminal, a conversation.

    Args:
        prompt: the text, or the user's turn of a chat; - reads it from standard input.
        prompts: a file of them: .txt, one a line, or rows (.jsonl, .json, .csv, .parquet) with "prompt", a text, or
            "messages", a conversation.
        system: text that the conversations begin with.
        chat: put prompts into the checkpoint's chat template; base models, which have none, want --no-chat.
        thinking: the template's switch of that name (DeepSeek-V3.1, V3.2); by default the template decides.
        samples: completions of each prompt.
    """

    prompt: str | None = None
    prompts: Path | None = None
    system: str | None = None
    chat: bool = True
    thinking: bool | None = None
    samples: int = 1


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn; the defaults are DeepSeek-R1's.

    Args:
        max_tokens: limit of new tokens, thinking included; None takes 256, and in a conversation what the context has
            room for.
        temperature: 0 takes the best token each time.
        top_p: sample among the smallest set of tokens that reaches this probability.
        top_k: sample among the k best; 0 is no limit.
        min_p: sample among tokens at least so probable, as a share of the best one's probability; 0 is no limit.
        repetition_penalty: divides the odds of tokens seen before, in the prompt too; 1 is none.
        presence_penalty: taken from the logits of tokens that the completion has already, -2 to 2.
        frequency_penalty: taken from them once for each time that they came, -2 to 2.
        logit_bias: added to the logits of tokens, each as ID=BIAS, such as 42=-5.
        stop: texts that end a completion, which they do not belong to.
        min_tokens: neither an end nor a stop text counts before so many.
        thinking_budget: limit a thought to so many tokens; it is then closed, and the answer follows.
        seed: the same seed draws the same tokens.
    """

    max_tokens: int | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    thinking_budget: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How it is computed.

    Args:
        batch: completions drawn at a time; as one ends, the next begins.
        speculate: guess tokens and verify several in a step, which changes none: "mtp" by the model's own modules,
            "lookup" from what the text had before.
        draft_tokens: how many are guessed; None is 1 with mtp and 4 with lookup.
        dtype: of weights, activations and cache; auto is bfloat16 on accelerators and float32 on the CPU.
        quantization: projections as they are kept and computed from: fp8 (of an FP8 folder its own), int8, or int4
            (experts, or all in a model without; the others fp8). none unpacks an FP8 folder.
        kv_cache_dtype: what the cache keeps instead: fp8 and int8 are codes with a scale a token and head.
        serve_expert: divide the model over all devices: groups that whole experts are divided between, with
            serve_tensor. Where one of the two is given, the other is chosen to suit the model; what is left of the
            devices are replicas. Without both the model is on one device.
        serve_tensor: parts of heads, inner widths and vocabulary.
    """

    batch: int = 16
    speculate: Literal["none", "lookup", "mtp"] = "none"
    draft_tokens: int | None = None
    dtype: Precision = "auto"
    quantization: Quantization = "none"
    kv_cache_dtype: CacheDType = "auto"
    serve_expert: int | None = None
    serve_tensor: int | None = None

    @property
    def of_engine(self) -> dict[str, Any]:
        """The fields of an `EngineConfig` that say what the cache keeps, who guesses, and how many."""
        kept = {"cache_dtype": self.kv_cache_dtype}
        if self.speculate == "none":
            return kept
        return kept | {"drafts": self.speculate, "draft_tokens": self.draft_tokens or _DRAFT_TOKENS[self.speculate]}


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is printed.

    Args:
        json: one JSON object a completion, in the order of the prompts: prompt and sample (numbers from 0), text,
            thinking and answer apart, tokens (how many), finish_reason (stop or length) and seconds (from the beginning
            to its end).
        logprobs: with --json, "logprobs": of each token id, text, logprob in nats at the temperature, and top, so many
            best ones of them, 0 to 20.
    """

    json: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a call.

    Args:
        model: Hugging Face or converted folder with its tokenizer, or a name on the hub.
        config: settings by the names of the options, as .toml or .yaml; what the command line says counts before them.
        asked: What is completed; without --prompt and --prompts, on a terminal, a conversation.
        sampling: How tokens are drawn; the defaults are DeepSeek-R1's.
        engine: How it is computed.
        output: What is printed.
    """

    model: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    config: Path | None = None
    asked: Annotated[PromptOptions, tyro.conf.arg(name="prompts")] = PromptOptions()
    sampling: SamplingOptions = SamplingOptions()
    engine: EngineOptions = EngineOptions()
    output: OutputOptions = OutputOptions()

    def __post_init__(self) -> None:
        _at_least(1, samples=self.asked.samples, batch=self.engine.batch, draft_tokens=self.engine.draft_tokens)
        if self.asked.prompt is not None and self.asked.prompts is not None:
            raise ValueError("wanted either --prompt TEXT or --prompts FILE; leave one out")
        if self.engine.draft_tokens is not None and self.engine.speculate == "none":
            raise ValueError("draft_tokens: got it without drafts, wanted --speculate lookup or --speculate mtp too")
        if self.output.logprobs is not None and not self.output.json:
            raise ValueError("logprobs: got it for plain text, which has no place for them; wanted --json too")
        self.drawing((), max_tokens=max(MAX_TOKENS, self.sampling.min_tokens))

    def drawing(self, stop_ids: tuple[int, ...], *, max_tokens: int = MAX_TOKENS) -> SamplingConfig:
        """The settings that an engine draws by.

        Args:
            stop_ids: tokens that end a completion.
            max_tokens: where nothing else is said.

        Raises:
            ValueError: a setting that cannot be, by the name of its option.
        """
        given = vars(self.sampling)
        same = {f.name for f in dataclasses.fields(SamplingConfig)} & given.keys() - {"logit_bias"}
        theirs = {
            "max_new_tokens": max_tokens if given["max_tokens"] is None else given["max_tokens"],
            "min_new_tokens": given["min_tokens"],
            "top_logprobs": self.output.logprobs or 0,
        }
        try:
            return SamplingConfig(
                **{name: given[name] for name in same} | theirs,
                stop_ids=stop_ids,
                logit_bias=dict(map(_bias, self.sampling.logit_bias)),
            )
        except ValueError as problem:
            raise ValueError(by_option(str(problem))) from None


COMMON = (
    *("model", "prompt", "prompts", "system", "chat", "samples", "max_tokens", "temperature", "top_p", "stop"),
    *("thinking_budget", "seed", "batch", "speculate", "dtype", "quantization", "json"),
)
"""The options that the short help shows."""


def by_option(message: str) -> str:
    """What the library says, with the options' names for its fields."""
    for name, option in _OPTIONS.items():
        message = message.replace(name, option)
    return message


def _bias(text: str) -> tuple[int, float]:
    """Token and bias of ID=BIAS."""
    found = _BIAS.fullmatch(text)
    if found is None:
        raise ValueError(f"logit_bias: got {text!r}, wanted ID=BIAS, a token's id and a number, such as 42=-5")
    return int(found[1]), float(found[2])


def _at_least(least: int, **counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name}: got {count}, wanted at least {least}")
