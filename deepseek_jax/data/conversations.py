"""Rows of every public form as conversations to learn from; what is none is left out for a reason that can be counted.

Forms, by the names of their columns in any case of letters, the first that a row has and that is not empty:
messages (or conversation): [{"role", "content"}], with "reasoning_content", "thinking" or "reasoning" beside an answer,
and "weight": 0 (OpenAI) or "train": false on one that is not learnt; conversations (ShareGPT): [{"from", "value"}];
prompt and completion (TRL), texts or messages, of which the completion is learnt; problem (or prompt) and solution,
question (or problem) and answer, question and response, instruction and output (Alpaca) or response (Dolly) with an
optional input or context, input and output (Nemotron). Beside such a pair a column of thoughts has one of the three
names.
A text column `system` or `system_prompt` stands before a conversation that has none of its own.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.data.sources import Row
from deepseek_jax.text.think import CLOSE, OPEN

_MESSAGES = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "completion"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("prompt", "solution"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
)
_FURTHER = ("input", "context")  # beside an instruction
_SYSTEM = ("system", "system_prompt")
_ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = "unlearnt"
_SWITCHES = ("on", "off")  # of a column `reasoning` that says whether there are thoughts (Nemotron)


class Conversation(NamedTuple):
    """Messages with "role", "content" and, for an answer with thoughts, "reasoning_content".

    history: messages at the beginning that are not learnt: a prompt's. unlearnt: numbers of further ones, from 0, that
    the row marks so.
    """

    messages: tuple[dict[str, str], ...]
    history: int = 0
    unlearnt: tuple[int, ...] = ()

    @property
    def as_texts(self) -> tuple[str, str] | None:
        """Prompt and completion, for a model without a template; None where there are not just these."""
        if [message["role"] for message in self.messages] != ["user", "assistant"]:
            return None
        answer, thoughts = self.messages[1]["content"], self.messages[1].get("reasoning_content")
        return self.messages[0]["content"], answer if thoughts is None else f"{OPEN}\n{thoughts}\n{CLOSE}\n\n{answer}"


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
        found = _of_pair(row, names, values, named=bool(columns))
    system = next((row[names[name]] for name in _SYSTEM if name in names and row[names[name]]), None)
    if isinstance(system, str) and found.messages[0]["role"] != "system":
        more = {"role": "system", "content": _text(system)}
        found = found._replace(messages=(more, *found.messages), history=found.history and found.history + 1)
    return _checked(found)


def _checked(found: Conversation) -> Conversation:
    """The same, where something in it is learnt, with the marks of what is not beside the messages."""
    marked = tuple(i for i, message in enumerate(found.messages) if message.pop(_MARK, False))
    of_assistant = [i for i, message in enumerate(found.messages) if message["role"] == "assistant"]
    learnt = [found.messages[i] for i in of_assistant if i >= found.history and i not in marked]
    if not learnt:
        raise NoConversation("no assistant turn" + (" that is not marked as unlearnt" if marked else ""))
    if not all(message["content"].strip() or message.get("reasoning_content") for message in learnt):
        raise NoConversation("an assistant turn without text")
    return found._replace(unlearnt=marked)


def _columns(row: Row, names: Mapping[str, str]) -> tuple[str, ...]:
    """Of the forms the first whose columns all hold something, as tables that were joined do; else the first."""
    forms = [(name,) for name in _MESSAGES] + list(_PAIRS)
    there = [tuple(names[name] for name in form) for form in forms if all(name in names for name in form)]
    if not there:
        raise NoConversation(
            f"none of the columns messages, conversations, prompt and completion, problem and solution among "
            f"{', '.join(row)}"[:300]
        )
    full = (form for form in there if all(row[name] not in (None, []) for name in form))
    return next(full, there[0])


def _of_pair(row: Row, names: Mapping[str, str], values: Sequence[Any], *, named: bool) -> Conversation:
    """Prompt and completion, with what else the row has of them where the columns were not named."""
    prompt, completion = _as_messages(values[0], "user"), _as_messages(values[1], "assistant")
    if not named:
        more = (row[names[name]] for name in _FURTHER if "instruction" in names and name in names)
        if text := next(filter(None, more), None):
            prompt[-1]["content"] += f"\n\n{_text(text)}"
        thoughts = (row[names[name]] for name in _REASONING if name in names)
        text = next((of for of in thoughts if of and of not in _SWITCHES), None)
        if text is not None and not isinstance(values[1], list | tuple) and CLOSE not in completion[0]["content"]:
            completion[0] |= _thoughts(text)
    return Conversation((*prompt, *completion), history=len(prompt))


def _as_messages(value: Any, role: str) -> list[dict[str, str]]:
    if isinstance(value, list | tuple):
        return list(_messages(value))
    return [{"role": role, "content": _text(value)}]


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise NoConversation("messages that are text, and no JSON") from None
    if not isinstance(value, list | tuple) or not value:
        raise NoConversation("no messages in the column of messages")
    return tuple(_message(message) for message in value)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise NoConversation("a message that is no object with role and content")
    role = message.get("role") or message.get("from")
    role = role.strip().casefold() if isinstance(role, str) else role
    if not isinstance(role, str) or role not in _ROLES:
        raise NoConversation(f"role {role!r:.40}, wanted system, user or assistant")
    if message.get("tool_calls"):
        raise NoConversation("tool calls")
    text = message.get("content")
    found = {"role": _ROLES[role], "content": _content(message.get("value") if text is None else text)}
    if found["role"] != "assistant":
        return found
    thoughts = next((message[name] for name in _REASONING if message.get(name)), None)
    if message.get("weight", 1) == 0 or message.get("train") is False:
        found[_MARK] = True
    return found if thoughts is None else found | _thoughts(thoughts)


def _thoughts(value: Any) -> dict[str, str]:
    """By the names that templates read: the second is gpt-oss's."""
    return {"reasoning_content": _text(value), "thinking": _text(value)}


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
