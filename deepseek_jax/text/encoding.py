"""DeepSeek-V3.2's conversations, which its checkpoints describe in a Python file instead of a chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.text.think import CLOSE, OPEN

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TOKENS = (USER, ASSISTANT, OPEN, CLOSE)
"""What a vocabulary must hold for this encoding."""
_ROLES = ("system", "user", "assistant")
_UNKNOWN_KEYS = ("tools", "tool_calls", "response_format")


def encode_v32(
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool,
    thinking: bool | None = None,
    **others: Any,
) -> str:
    """Renders a conversation as DeepSeek-V3.2 was trained on it.

    After the BOS, a system's text stands bare; a user's is followed by the opening of the answer, which is `<think>`
    for the last one if `thinking`, and `</think>` otherwise; an answer ends in EOS. Reasoning of answers before the
    last user's message is dropped, later reasoning kept if `thinking`.

    Args:
      messages: one mapping a message: "role" (system, user or assistant), "content" (a string) and, for answers,
        "reasoning_content" or "reasoning". What `template.check_messages` refuses is refused before.
      bos_token: text of the begin-of-sequence token.
      eos_token: text of the end-of-sequence token.
      add_generation_prompt: the last message is a user's, to be answered.
      thinking: the model is to reason first; None is True, as in the README's example.
      **others: further variables of chat templates; they must be None.

    Returns:
      The prompt's text.

    Raises:
      ValueError: tools, response formats, other roles, content in parts, an answer after the last user's message that
        lacks its reasoning although `thinking`, or a last message that does not go with `add_generation_prompt`.

    Source: deepseek-ai/DeepSeek-V3.2, encoding/encoding_dsv32.py and README.md.
    Differs: tools, developer messages and response formats are refused (tests/text/test_encoding.py).
    """
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"chat: got {name}, wanted none; {_REFUSED}")
    thinking = thinking is not False
    last = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if add_generation_prompt != (last == len(messages) - 1):
        raise ValueError(
            f"messages: got a last message of role {messages[-1]['role']!r} with add_generation_prompt="
            f"{add_generation_prompt}, wanted a user's to be answered, or an assistant's without it;"
            " DeepSeek-V3.2's encoding has no other end"
        )
    turns = [_turn(index, message, eos_token, thinking, last) for index, message in enumerate(messages)]
    return bos_token + "".join(turns)


_REFUSED = (
    "DeepSeek-V3.2's encoding is known here for plain conversations: write the prompt's text yourself (--no-chat)"
)


def _turn(index: int, message: Mapping[str, Any], eos_token: str, thinking: bool, last: int) -> str:
    role, content = message["role"], message.get("content")
    unknown = [key for key in _UNKNOWN_KEYS if message.get(key)]
    if role not in _ROLES or unknown:
        got = f"{unknown[0]!r}" if unknown else f"role {role!r}"
        raise ValueError(f"messages[{index}]: got {got}, wanted roles {', '.join(_ROLES)} without tools; {_REFUSED}")
    if not isinstance(content, str):
        raise ValueError(f"messages[{index}]['content']: got {type(content).__name__}, wanted a string; {_REFUSED}")
    if role == "system":
        return content
    if role == "user":
        return f"{USER}{content}{ASSISTANT}{OPEN if thinking and index == last else CLOSE}"
    if not thinking or index < last:
        return content + eos_token
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(reasoning, str):
        raise ValueError(
            f"messages[{index}]: got an answer without 'reasoning_content', wanted one beside thinking=True;"
            " give its reasoning, or thinking=False"
        )
    return f"{reasoning}{CLOSE}{content}{eos_token}"
