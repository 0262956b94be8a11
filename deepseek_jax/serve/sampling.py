"""What a request says of drawing, as the engine's settings."""

from typing import Any, NamedTuple

from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.serve.errors import ApiError, of_field
from deepseek_jax.serve.schemas import ChatBody, Sampling
from deepseek_jax.serve.settings import ServeConfig

NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "prompt": "messages",
    "thinking_budget": "thinking",
}
"""The API's names for the engine's."""
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 8192,
    "high": None,
    "xhigh": None,
    "max": None,
}
"""Tokens that a thought may have at each `reasoning_effort`; None is no limit."""
_SAME = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Thinks(NamedTuple):
    """Whether a model is to think, None as its template has it, and for how many tokens, None without limit."""

    wanted: bool | None
    budget: int | None


def thinks(body: ChatBody) -> Thinks:
    """What a request says of thinking: DeepSeek's `thinking`, and OpenAI's `reasoning_effort`."""
    effort, switch = body.reasoning_effort, body.thinking
    if switch is not None and switch.type == "disabled":
        return Thinks(False, 0)
    budget = None if effort is None else EFFORTS[effort]
    if switch is not None:
        return Thinks(True, budget if switch.budget_tokens is None else switch.budget_tokens)
    if effort is None:
        return Thinks(None, None)
    return Thinks(effort != "none", budget)


def sampling_of(
    body: Sampling, settings: ServeConfig, *, max_tokens: int, stop_ids: tuple[int, ...], **more: Any
) -> SamplingConfig:
    """The settings that the engine draws by.

    Args:
        body: the request.
        settings: the server's, for what the request leaves open.
        max_tokens: of the completion at most.
        stop_ids: that end one.
        more: fields of `SamplingConfig` that the routes know of.

    Raises:
        ApiError: settings that cannot be.
    """
    if (body.n or 1) > settings.max_n:
        raise ApiError(400, f"n: got {body.n}, wanted at most {settings.max_n}", param="n")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: got some without stream, wanted stream: true", param="stream_options")
    given = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    try:
        return SamplingConfig(
            max_new_tokens=max_tokens,
            min_new_tokens=body.min_tokens or 0,
            temperature=_or(body.temperature, settings.temperature),
            top_p=_or(body.top_p, settings.top_p),
            top_k=max(0, body.top_k or 0),
            stop=body.stop or (),
            stop_ids=() if body.ignore_eos else stop_ids,
            logit_bias=bias,
            **given,
            **more,
        )
    except ValueError as problem:
        raise of_field(problem, NAMES) from None


def _or(asked: float | None, default: float) -> float:
    return default if asked is None else asked
