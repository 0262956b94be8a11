"""/v1/chat/completions."""

import time
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import Response

from deepseek_jax.serve.answers import Choice, whole_texts
from deepseek_jax.serve.calls import Call, Served, first_seed, new_id
from deepseek_jax.serve.documents import replies
from deepseek_jax.serve.engine_thread import Wanted
from deepseek_jax.serve.errors import ApiError
from deepseek_jax.serve.prompts import Prompt
from deepseek_jax.serve.replies import EventStream, JsonReply, events_with
from deepseek_jax.serve.sampling import sampling_of, thinks
from deepseek_jax.serve.schemas import ChatBody, Message, ResponseFormat, StreamOptions
from deepseek_jax.serve.streams import Part
from deepseek_jax.serve.structured import Grammar

router = APIRouter()


class _Asked(NamedTuple):
    """A call, and what its answers are made with."""

    body: ChatBody
    call: Call
    choices: list[Choice]
    common: dict[str, Any]


@router.post("/v1/chat/completions", responses=replies("A chat completion, or a stream of its chunks."))
async def chat(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    served: Served = request.app.state.served
    model = served.name(body.model)
    prompt, wanted = await _wanted(served, body)
    call = await served.begin(wanted, request.scope)
    choices = [Choice(served.prompts, opened=prompt.opened) for _ in wanted]
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    common = {"id": new_id("chatcmpl"), "object": kind, "created": int(time.time()), "model": model}
    asked = _Asked(body, call, choices, common)
    if body.stream:
        return EventStream(_events(asked, served.settings.keep_alive_seconds), call.end)
    try:
        return JsonReply(await _whole(asked))
    finally:
        call.end()


async def _wanted(served: Served, body: ChatBody) -> tuple[Prompt, list[Wanted]]:
    """The prompt, and the completions that are asked for."""
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens: got another number than max_completion_tokens, wanted one of them")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: got some without logprobs, wanted logprobs: true", param="top_logprobs")
    wish = thinks(body)
    sampling = sampling_of(
        body,
        served.settings,
        max_tokens=body.max_completion_tokens or body.max_tokens or served.context,
        stop_ids=served.eos_ids,
        top_logprobs=body.top_logprobs or 0,
        thinking_budget=wish.budget,
    )
    messages = [_as_turn(index, message) for index, message in enumerate(body.messages)]
    try:
        prompt = await served.prompts.run(served.prompts.chat, messages, wish.wanted)
    except ValueError as problem:
        raise ApiError(400, str(problem), param="messages") from None
    seed, grammar = first_seed(body.seed), await _grammar(served, body.response_format)
    again = lambda: None if grammar is None else grammar.copy()
    return prompt, [Wanted(prompt.tokens, sampling, seed + at, grammar=again()) for at in range(body.n or 1)]


async def _grammar(served: Served, wanted: ResponseFormat | None) -> Grammar | None:
    """What an answer has to keep to."""
    if wanted is None or wanted.type == "text":
        return None
    schema = None
    if wanted.type == "json_schema":
        schema = wanted.json_schema and wanted.json_schema.json_schema
        if schema is None:
            raise ApiError(400, "response_format.json_schema.schema: got none, wanted one", param="response_format")
    try:
        return await served.prompts.run(served.prompts.grammars.of_schema, schema)
    except ValueError as problem:
        raise ApiError(400, str(problem), param="response_format") from None


def _as_turn(index: int, message: Message) -> dict[str, Any]:
    """A message as templates know it."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is None and message.role != "assistant":
        raise ApiError(400, f"messages[{index}].content: got nothing, wanted text", param="messages")
    found = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    thought = message.reasoning_content or message.reasoning
    more = {"reasoning_content": thought, "name": message.name, "tool_call_id": message.tool_call_id}
    return found | {name: value for name, value in more.items() if value is not None}


def _usage(asked: _Asked) -> dict[str, Any]:
    return asked.call.usage(asked.choices, reasoning_tokens=sum(choice.thought_tokens for choice in asked.choices))


async def _whole(asked: _Asked) -> dict[str, Any]:
    """The answer in one piece."""
    texts = await whole_texts(asked.call, asked.choices)
    found = []
    for number, (choice, (thought, answer)) in enumerate(zip(asked.choices, texts, strict=True)):
        thought = thought or None
        message = {"role": "assistant", "content": answer}
        message |= {"reasoning_content": thought, "reasoning": thought}
        logprobs = await choice.logprobs(0) if asked.body.logprobs else None
        found.append({"index": number, "message": message, "logprobs": logprobs, **_ending(choice)})
    return asked.common | {"choices": found, "usage": _usage(asked)}


def _ending(choice: Choice) -> dict[str, Any]:
    return {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_text}


async def _events(asked: _Asked, idle: float) -> AsyncGenerator[list[str], None]:
    """The chunks of a stream, those of a time together; none where nothing came for a while."""
    wanted, event = asked.body.stream_options or StreamOptions(), events_with(asked.common)
    first = {"role": "assistant", "content": ""}
    yield [event(_chunk(asked, number, first)) for number in range(len(asked.choices))]
    async for parts in asked.call.parts(idle):
        chunks = [event(chunk) for part in parts for chunk in await _chunks(asked, part)]
        if chunks or not parts:
            yield chunks
    if wanted.include_usage:
        yield [event({"choices": [], "usage": _usage(asked)})]


async def _chunks(asked: _Asked, part: Part) -> list[dict[str, Any]]:
    """What a part of a completion has to tell."""
    choice = asked.choices[part.number]
    start = len(choice.tokens)
    pieces = await choice.feed(part)
    more = {"logprobs": await choice.logprobs(start)} if asked.body.logprobs and part.tokens else {}
    deltas = [_delta(*piece) for piece in pieces] or ([{}] if more else [])
    found = [_chunk(asked, part.number, delta, **(more if at == 0 else {})) for at, delta in enumerate(deltas)]
    if part.finished:
        found.append(_chunk(asked, part.number, {}, **_ending(choice)))
    return found


def _chunk(asked: _Asked, number: int, delta: dict[str, str], **more: Any) -> dict[str, Any]:
    wanted = asked.body.stream_options
    usage = {}
    if wanted is not None and wanted.include_usage:
        usage = {"usage": _usage(asked) if wanted.continuous_usage_stats else None}
    choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    return {**usage, "choices": [choice]}


def _delta(kind: str, text: str) -> dict[str, str]:
    return {"content": text} if kind == "answer" else {"reasoning_content": text, "reasoning": text}
