"""/v1/completions: texts or tokens to go on with, and to be scored."""

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from deepseek_jax.generation.live import Live
from deepseek_jax.serve.answers import text_logprobs
from deepseek_jax.serve.calls import Call, Served, first_seed, new_id
from deepseek_jax.serve.documents import replies
from deepseek_jax.serve.engine_thread import Wanted
from deepseek_jax.serve.errors import ApiError
from deepseek_jax.serve.replies import EventStream, JsonReply, events_with
from deepseek_jax.serve.sampling import sampling_of
from deepseek_jax.serve.schemas import CompletionBody, StreamOptions
from deepseek_jax.serve.streams import Part

router = APIRouter()
_NEW_TOKENS = 16  # where nothing is said, as OpenAI has it


class _Text:
    """One completion, so far.

    Attributes:
        offset: characters that were given, those of an echo too.
    """

    def __init__(self, served: Served, body: CompletionBody, prompt: list[int], echoed: str):
        self._prompts, self._body, self._prompt, self._echoed = served.prompts, body, prompt, echoed
        self._echoes = bool(body.echo)
        self._silent = body.max_tokens == 0  # one token is drawn, and not told
        self.tokens: list[int] = []
        self.live: Live | None = None
        self.offset = 0

    async def feed(self, part: Part) -> tuple[str, dict[str, list] | None]:
        """What is new: text and log-probs."""
        self.live = part.live
        start = len(self.tokens)
        self.tokens += [] if self._silent else part.tokens
        echo, self._echoes = len(self._prompt) if self._echoes else 0, False
        text = (self._echoed if echo else "") + ("" if self._silent else part.text)
        logprobs = None
        if self._body.logprobs is not None and (len(self.tokens) > start or echo):
            given = self._prompts, self.live, self.tokens, start, self.offset
            logprobs = await text_logprobs(*given, echo=echo)
        self.offset += len(text)
        return text, logprobs

    @property
    def ending(self) -> dict[str, Any]:
        stop = None if self.live.stream is None else self.live.stream.stopped
        silent = self._silent or not self.live.stopped
        return {"finish_reason": "length" if silent else "stop", "stop_reason": stop}


@router.post("/v1/completions", responses=replies("A text completion, or a stream of its chunks."))
async def completions(body: CompletionBody, request: Request) -> Response:
    """Go on with texts."""
    served: Served = request.app.state.served
    model = served.name(body.model)
    prompts = await _prompts(served, body)
    sampling = sampling_of(
        body,
        served.settings,
        max_tokens=max(1, _NEW_TOKENS if body.max_tokens is None else body.max_tokens),
        stop_ids=served.eos_ids,
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    samples, seed = body.n or 1, first_seed(body.seed)
    if samples * len(prompts) > served.settings.max_n * 16:
        raise ApiError(400, f"prompt: got {len(prompts)} x {samples} completions, wanted fewer", param="prompt")
    each = [prompt for prompt in prompts for _ in range(samples)]
    wanted = [Wanted(tokens, sampling, seed + number) for number, tokens in enumerate(each)]
    call = await served.begin(wanted, request.scope)
    echoed = await served.prompts.run(_echoed, served, body, prompts)
    texts = [_Text(served, body, tokens, echoed[number // samples]) for number, tokens in enumerate(each)]
    common = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": model}
    if body.stream:
        return EventStream(_events(call, body, texts, common, served.settings.keep_alive_seconds), call.end)
    try:
        return JsonReply(await _whole(call, texts, common))
    finally:
        call.end()


async def _prompts(served: Served, body: CompletionBody) -> list[list[int]]:
    """The tokens of each prompt."""
    given = body.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    found = []
    for prompt in given if several else [given]:
        try:
            found.append((await served.prompts.run(served.prompts.text, prompt)).tokens)
        except ValueError as problem:
            raise ApiError(400, str(problem), param="prompt") from None
        if not found[-1]:
            raise ApiError(400, "prompt: got no token, wanted at least one", param="prompt")
    return found


def _echoed(served: Served, body: CompletionBody, prompts: list[list[int]]) -> list[str]:
    """Prompts as text, where they are wanted."""
    if not body.echo:
        return [""] * len(prompts)
    if isinstance(body.prompt, str):
        return [body.prompt]
    given = body.prompt if isinstance(body.prompt[0], str) else [None] * len(prompts)
    pairs = zip(given, prompts, strict=True)
    return ["".join(served.prompts.spelled(tokens)) if text is None else text for text, tokens in pairs]


async def _whole(call: Call, texts: list[_Text], common: dict[str, Any]) -> dict[str, Any]:
    """The answer in one piece."""
    found = [{"index": number, "text": "", "logprobs": None} for number in range(len(texts))]
    async for parts in call.parts():
        for part in parts:
            text, logprobs = await texts[part.number].feed(part)
            choice = found[part.number]
            choice["text"] += text
            if logprobs is not None and choice["logprobs"] is not None:
                for name, values in logprobs.items():
                    choice["logprobs"][name] += values
            else:
                choice["logprobs"] = logprobs or choice["logprobs"]
    choices = [choice | text.ending for choice, text in zip(found, texts, strict=True)]
    return common | {"choices": choices, "usage": call.usage(texts)}


async def _events(
    call: Call, body: CompletionBody, texts: list[_Text], common: dict[str, Any], idle: float
) -> AsyncGenerator[list[str], None]:
    """The chunks of a stream, those of a time together; none where nothing came for a while."""
    wanted, event = body.stream_options or StreamOptions(), events_with(common)
    usage = lambda: (
        {"usage": call.usage(texts) if wanted.continuous_usage_stats else None} if wanted.include_usage else {}
    )
    async for parts in call.parts(idle):
        chunks = []
        for part in parts:
            text, logprobs = await texts[part.number].feed(part)
            ending = texts[part.number].ending if part.finished else {"finish_reason": None}
            if text or logprobs or part.finished:
                choice = {"index": part.number, "text": text, "logprobs": logprobs, **ending}
                chunks.append(event({**usage(), "choices": [choice]}))
        if chunks or not parts:
            yield chunks
    if wanted.include_usage:
        yield [event({"choices": [], "usage": call.usage(texts)})]
