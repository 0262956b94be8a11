"""Chat templates: Jinja programs that arrive with a checkpoint, and so are run as hostile input.

They run in Jinja's immutable sandbox, in a process that can open nothing and that the kernel ends at its limits of
processor time and memory (`text.worker`; docs/decisions/0009-templates.md). What a template may compute is therefore
not a list of ours: published ones render as in transformers, and a hostile one costs some seconds of one core.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.text import confined

MAX_TEMPLATE_CHARS = 131_072
"""Longest template accepted; the longest published ones are about a tenth of it."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool,
    **extra: Any,
) -> str:
    """Renders a conversation with a checkpoint's chat template.

    Args:
      template: Jinja source, as in `tokenizer_config.json` or `chat_template.jinja`.
      messages: one mapping a message, of JSON values only: "role" and, for all but tool calls, "content".
      bos_token: text of the begin-of-sequence token, "" when there is none.
      eos_token: text of the end-of-sequence token, "" when there is none.
      add_generation_prompt: ends the text with the opening of the assistant's turn.
      **extra: further variables of JSON values (tools, documents, switches such as `thinking`).

    Returns:
      The prompt's text.

    Raises:
      ValueError: the messages are malformed, the template is too long or not valid Jinja, it refuses the
        conversation (`raise_exception`), it does what Jinja's sandbox forbids, or it needs more than
        `confined.SECONDS` or `worker.MEMORY_BYTES`, or gives a text far longer than the conversation.

    Source: huggingface/transformers, `utils/chat_template_utils.py` (environment and its globals).
    Differs: `lipsum` and `random` are missing, and what is not text or plain data is not printed. Published templates
      render the same (tests/text/test_tokenizer_oracle.py).
    """
    check_messages(messages)
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ValueError(
            f"chat template: got {len(template)} characters, wanted at most {MAX_TEMPLATE_CHARS};"
            " check that the checkpoint's chat_template is a template"
        )
    variables = {
        "messages": list(messages),
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
        **extra,
    }
    try:
        return confined.ask("render", template, variables)
    except confined.Reply as reply:
        raise ValueError(_explain(reply)) from None


def _explain(reply: confined.Reply) -> str:
    where, what, reason = "", "refused to render", reply.value
    if reply.kind == "syntax":
        line, reason = reply.value
        where, what = f" (line {line})" if line else "", "does not compile"
    return f"chat template{where}: {what}: {reason}; correct the conversation or the checkpoint's chat template"


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuses what is not a conversation.

    Args:
      messages: one mapping a message.

    Raises:
      ValueError: not a list of mappings with a string "role", a "content" of the wrong type, or no messages.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages: got {type(messages).__name__}, wanted a list of {{'role': ..., 'content': ...}};"
            " wrap a single message in a list"
        )
    if not messages:
        raise ValueError("messages: got an empty list, wanted at least one message; add the user's turn")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"messages[{index}]: got {type(message).__name__}, wanted a dict with 'role' and 'content'; build one"
            )
        if "role" not in message or not isinstance(message["role"], str):
            raise ValueError(
                f"messages[{index}]['role']: got {message.get('role')!r}, wanted a string such as 'user';"
                " give every message its role"
            )
        content = message.get("content")
        if content is None and "tool_calls" not in message:
            raise ValueError(
                f"messages[{index}]['content']: got nothing, wanted text; only a message with 'tool_calls' goes without"
            )
        if not isinstance(content, str | list | None):
            raise ValueError(
                f"messages[{index}]['content']: got {type(content).__name__}, wanted a string or a list of"
                " parts; convert it"
            )
