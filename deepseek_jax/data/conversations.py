"""Rows of every public form as conversations to learn from; what is none is left out for a reason that can be counted.

Forms, by the names of their columns in any case of letters, the first that a row has:
messages (or conversation): [{"role", "content"}], with "reasoning_content", "thinking" or "reasoning" beside an answer;
conversations (ShareGPT): [{"from", "value"}]; prompt and completion (TRL), texts or messages, of which the completion
is learnt; problem and solution, question and answer (or response), instruction and output with an optional input
(Alpaca).
A text column `system` stands before a conversation that has none of its own.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.data.sources import Row

_MESSAGES = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"),
    ("problem", "solution"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("instruction", "output"),
)
_ROLES = {
    **{"system": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
}
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Conversation(NamedTuple):
    """Messages with "role", "content" and, for an answer with thoughts, "reasoning_content".

    history: messages at the beginning that are not learnt: a prompt's.
    """

    messages: tuple[dict[str, str], ...]
    history: int = 0

    @property
    def as_texts(self) -> tuple[str, str] | None:
        """Prompt and completion, for a model without a template; None where there are not just these."""
        if [message["role"] for message in self.messages] != ["user", "assistant"]:
            return None
        return self.messages[0]["content"], self.messages[1]["content"]


class NoConversation(ValueError):
    """A row that is none; the message is the same for all rows that lack the same."""


def conversation_of(row: Row, columns: Sequence[str] = ()) -> Conversation:
    """A row's conversation.

    Args:
        row: of any of the forms.
        columns: of messages; or of prompt and completion; none takes those with the usual names.

    Raises:
        NoConversation: none of the forms, a role that is unknown, no text, or nothing of the assistant's.
    """
    names = {name.casefold(): name for name in reversed(row)}
    chosen = tuple(columns) or _columns(row, names)
    values = [row.get(name) for name in chosen]
    if any(value is None for value in values):
        raise NoConversation(f"nothing in column {chosen[values.index(None)]!r}")
    if len(values) == 1:
        found = Conversation(_messages(values[0]))
    else:
        prompt, completion = values
        prompt = _as_messages(prompt, "user")
        if more := row.get(names.get("input", "")) if "instruction" in names and not columns else None:
            prompt[-1]["content"] += f"\n\n{_text(more)}"
        found = Conversation((*prompt, *_as_messages(completion, "assistant")), history=len(prompt))
    system = row.get(names.get("system", ""))
    if isinstance(system, str) and system and found.messages[0]["role"] != "system":
        more = {"role": "system", "content": _text(system)}
        found = Conversation((more, *found.messages), found.history and found.history + 1)
    if not any(message["role"] == "assistant" for message in found.messages[found.history :]):
        raise NoConversation("no assistant turn")
    return found


def _columns(row: Row, names: Mapping[str, str]) -> tuple[str, ...]:
    for name in _MESSAGES:
        if name in names and row[names[name]] is not None:
            return (names[name],)
    for pair in _PAIRS:
        if all(name in names for name in pair):
            return tuple(names[name] for name in pair)
    raise NoConversation(
        f"none of the columns messages, conversations, prompt and completion, problem and solution among "
        f"{', '.join(row)}"[:300]
    )


def _as_messages(value: Any, role: str) -> list[dict[str, str]]:
    if isinstance(value, list | tuple):
        return list(_messages(value))
    return [{"role": role, "content": _text(value)}]


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except ValueError:
            raise NoConversation("messages that are text, and no JSON") from None
    if not isinstance(value, list | tuple) or not value:
        raise NoConversation("no messages in the column of messages")
    return tuple(_message(message) for message in value)


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise NoConversation("a message that is no object with role and content")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise NoConversation(f"role {role!r:.40}, wanted system, user or assistant")
    if message.get("tool_calls"):
        raise NoConversation("tool calls")
    found = {"role": _ROLES[role], "content": _content(message.get("content", message.get("value")))}
    thoughts = next((message[name] for name in _REASONING if message.get(name)), None)
    if thoughts is not None and found["role"] == "assistant":
        # the names that templates read: the second is gpt-oss's
        found |= {"reasoning_content": _text(thoughts), "thinking": _text(thoughts)}
    return found


def _content(value: Any) -> str:
    """A message's text, also of parts as OpenAI's API has them."""
    if not isinstance(value, list | tuple):
        return _text(value)
    parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in value]
    if None in parts:
        raise NoConversation("a message with a part that is no text")
    return "".join(_text(part) for part in parts)


def _text(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise NoConversation(f"a {type(value).__name__} where a message's text should be")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise NoConversation("half of a pair of surrogates, which is no text")
    return value
