"""Conversations with strangers: what they write never becomes a control token, whatever it spells.

A break, a character that is none, is put inside each control token that a text spells. Templates carry it along, and
the rendering is encoded piece by piece between breaks, so that the token's text becomes the tokens of its pieces.
A text that spells no control token is encoded as ever.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.text.think import CLOSE, OPEN
from deepseek_jax.text.tokenizer import Tokenizer

BREAK = "\ufdd2"
_TEXTS = ("content", "reasoning_content", "reasoning", "name", "tool_call_id")


class Untrusted:
    """Encodes conversations whose every text is a stranger's.

    Args:
        tokenizer: the model's. Its control tokens are all added tokens that are not blank, special or not.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        added = json.loads(tokenizer.files["tokenizer.json"]).get("added_tokens") or []
        texts = dict.fromkeys(tokenizer.special) | {str(token["content"]): token["id"] for token in added}
        texts = {text: id for text, id in texts.items() if len(text) > 1 and not text.isspace()}
        self._ids = {id for id in texts.values() if id is not None}
        self._control = _any_of(texts)
        self._beside_thoughts = _any_of(texts.keys() - {OPEN, CLOSE})

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """As `Tokenizer.chat`. An answer's own think tags stay tags.

        Raises:
            ValueError: what `Tokenizer.chat` refuses, or a text with the character of breaks.
        """
        safe = [self._safe(index, message) for index, message in enumerate(messages)]
        text = self.tokenizer.render(safe, add_generation_prompt=True, **variables)
        first, *pieces = text.split(BREAK)
        tokens = self.tokenizer.encode(first, add_bos=True)
        for piece in pieces:
            tokens += self.tokenizer.encode(piece, add_bos=False)
        spelt = sum(len(self._control.findall(piece)) for piece in (first, *pieces))
        # the BOS may be one more; a tokenizer that rewrites texts could make others of them
        if sum(token in self._ids for token in tokens) > spelt + 1:
            raise ValueError("messages: got a text that the tokenizer makes control tokens of, wanted it without them")
        return tokens

    def _safe(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        control = self._beside_thoughts if message.get("role") == "assistant" else self._control
        found = dict(message)
        for name in _TEXTS:
            if isinstance(found.get(name), str):
                if BREAK in found[name]:
                    raise ValueError(f"messages[{index}].{name}: got U+FDD2, which is no character; leave it out")
                found[name] = _broken(found[name], control)
        return found


def _any_of(texts: Mapping[str, Any] | set[str]) -> re.Pattern[str]:
    """The longest of them first, as the tokenizers library looks for them."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _broken(text: str, control: re.Pattern[str]) -> str:
    """With a break behind the first character of every control token, until no piece spells one."""
    pieces, done = [text], []
    while pieces:
        piece = pieces.pop()
        found = control.search(piece)
        if found is None:
            done.append(piece)
        else:
            at = found.start() + 1
            done.append(piece[:at])
            pieces.append(piece[at:])
    return BREAK.join(done)
