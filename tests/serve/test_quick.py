"""An engine that is done with a call before its route looks for the first token."""

import asyncio

import pytest

from deepseek_jax.serve.calls import Served
from tests.serve.client import OPENING, Scripted, run, tokenizer

CHAT = {"messages": [{"role": "user", "content": "1"}]}


@pytest.fixture
def done_first(monkeypatch):
    """A call begins for its route when all its completions are finished."""
    begin = Served.begin

    async def late(self, wanted, scope):
        call = await begin(self, wanted, scope)
        while call.box.left:
            await asyncio.sleep(0.001)
        return call

    monkeypatch.setattr(Served, "begin", late)


@pytest.mark.parametrize("count", [1, 3])
def test_a_quick_answer_has_its_thought(done_first, count):
    asked = {"prompt": "1", "samples": count}
    reply = run(lambda client: client.ask("/v1/reasoning", asked), Scripted(tokenizer(OPENING), "a</think>b"))
    assert reply.status == 200, reply.body
    assert (reply.json["response"], reply.json["reasoning_steps"]) == ("b", ["a"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "path, body, wanted",
    [("/v1/chat/completions", CHAT, "ab"), ("/v1/completions", {"prompt": "1"}, "a</think>b")],
)
def test_nothing_of_a_quick_answer_is_lost(done_first, path, body, wanted, count, stream):
    asked = body | {"n": count, "stream": stream}
    reply = run(lambda client: client.ask(path, asked), Scripted(tokenizer(OPENING), "a</think>b"))
    assert reply.status == 200, reply.body
    found = [choice for event in (reply.events[:-1] if stream else [reply.json]) for choice in event["choices"]]
    texts = [_text([choice for choice in found if choice["index"] == number]) for number in range(count)]
    assert texts == [wanted] * count


def _text(choices) -> str:
    """Thought and answer of one completion's choices."""
    found = ""
    for choice in choices:
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        found += (said.get("reasoning_content") or "") + (said.get("content") or "")
    return found
