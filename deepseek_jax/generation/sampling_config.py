"""How tokens of one request are drawn, validated where it is made."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_STOP_IDS = 64  # some tokenizers have dozens of tokens that end a sequence
MAX_STOPS = 16
MAX_LOGIT_BIAS = 300  # OpenAI's limit
MAX_TOP_LOGPROBS = 20  # likewise


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn.

    Args:
        max_new_tokens: limit a completion, thinking included.
        temperature: 0 takes the best token.
        top_p: keep the smallest set of tokens that reaches this probability; 1 keeps all.
        top_k: keep the k best; 0 keeps all.
        min_p: keep tokens at least so probable, as a share of the most probable one's probability; 0 keeps all. It is
            applied last, as in transformers.
        repetition_penalty: for tokens of prompt and completion seen before; 1 is none.
        stop_ids: tokens that end a completion; they belong to it.
        presence_penalty: taken from the logits of tokens that the completion has already; 0 is none.
        frequency_penalty: taken from them once for each time that they came; 0 is none.
        logit_bias: added to the logits of these tokens, before everything else.
        min_new_tokens: no stop id is drawn, and no stop text counts, before so many tokens.
        stop: a text, or up to 16, that end a completion; they do not belong to its text.
        top_logprobs: give the log-probs of so many best tokens beside each one drawn.
        prompt_logprobs: give the log-probs of the prompt's tokens.
        thinking_budget: limit a thought to so many tokens; the engine then closes it. None is no limit.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_new_tokens: int = 0
    stop: str | Sequence[str] = ()
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, (good, wanted) in (_of_numbers(self) | _of_collections(self)).items():
            if not good:
                raise ValueError(f"{name}: got {_brief(getattr(self, name))}, wanted {wanted}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: got {self.min_new_tokens}, wanted at most max_new_tokens, {self.max_new_tokens}; "
                "lower it, or raise the other"
            )
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def penalised(self) -> bool:
        """Whether what is drawn depends on the tokens before, by how often they came."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def limit(self, prompt_tokens: int, context: int) -> int:
        """New tokens that a completion of a prompt may have in a model's context.

        Raises:
            ValueError: the context has no room for a token, or for `min_new_tokens`.
        """
        room = context - prompt_tokens
        least = max(1, self.min_new_tokens)
        if room < least:
            raise ValueError(
                f"prompt: got {prompt_tokens} tokens, wanted at most {context - least}, so that {least} new ones have "
                f"room in the model's context of {context}; shorten it"
            )
        return min(self.max_new_tokens, room)


def refuse_unreplayable(sampling: SamplingConfig) -> None:
    """Refuse settings with which a trainer cannot make the distribution anew that a recorded support is of.

    Raises:
        ValueError: the best tokens are taken, or a bias or penalty of counts is laid on the logits.
    """
    if sampling.temperature == 0:
        raise ValueError("record: got support beside temperature 0, wanted more than 0; the best token is no draw")
    for name in ("logit_bias", "presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            raise ValueError(f"record: got support beside {name}, wanted none; a trainer does not know it")


def _of_numbers(config: SamplingConfig) -> dict[str, tuple[bool, str]]:
    """Of each number whether it is good, and what is wanted."""
    penalty = lambda value: _number(value) and -2 <= value <= 2
    temperature, budget = config.temperature, config.thinking_budget
    return {
        "max_new_tokens": (_count(config.max_new_tokens) and config.max_new_tokens >= 1, "at least 1"),
        "temperature": (
            _number(temperature) and (temperature == 0 or temperature >= 1e-5),  # below, float32 overflows
            "0 (the best token), or 1e-5 or more",
        ),
        "top_p": (_number(config.top_p) and 0 < config.top_p <= 1, "more than 0, at most 1"),
        "top_k": (_count(config.top_k), "0 (all) or more"),
        "min_p": (_number(config.min_p) and 0 <= config.min_p <= 1, "0 (all) to 1"),
        "repetition_penalty": (_number(config.repetition_penalty) and config.repetition_penalty > 0, "more than 0"),
        "presence_penalty": (penalty(config.presence_penalty), "-2 to 2"),
        "frequency_penalty": (penalty(config.frequency_penalty), "-2 to 2"),
        "min_new_tokens": (_count(config.min_new_tokens), "0 or more"),
        "top_logprobs": (_count(config.top_logprobs, MAX_TOP_LOGPROBS), f"0 to {MAX_TOP_LOGPROBS}"),
        "prompt_logprobs": (isinstance(config.prompt_logprobs, bool), "True or False"),
        "thinking_budget": (budget is None or _count(budget), "None (no limit), or 0 tokens or more"),
    }


def _of_collections(config: SamplingConfig) -> dict[str, tuple[bool, str]]:
    ids, stop, bias = config.stop_ids, config.stop, config.logit_bias
    return {
        "stop_ids": (
            _listed(ids) and len(ids) <= MAX_STOP_IDS and all(map(_count, ids)),
            f"at most {MAX_STOP_IDS} token ids, each 0 or more",
        ),
        "stop": (
            _listed(stop) and len(stop) <= MAX_STOPS and all(isinstance(text, str) and text for text in stop),
            f"a text or a list of at most {MAX_STOPS} texts, none of them empty",
        ),
        "logit_bias": (
            isinstance(bias, Mapping)
            and len(bias) <= MAX_LOGIT_BIAS
            and all(_count(token) and _number(value) for token, value in bias.items()),
            f"at most {MAX_LOGIT_BIAS} token ids, each 0 or more, with a finite number each",
        ),
    }


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any, most: int = 2**31 - 1) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= value <= most


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _brief(value: Any) -> str:
    """A value in an error's one line."""
    text = repr(value)
    if len(text) <= 60:
        return text
    return f"{len(value)} entries" if isinstance(value, Mapping | Sequence) else text[:60] + "..."
