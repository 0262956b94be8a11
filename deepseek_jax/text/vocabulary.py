"""Whether two tokenizers have the same tokens by the same ids, which logits of two models have to be compared by."""

import json
from typing import Any

from deepseek_jax.text.tokenizer import Tokenizer


def vocabulary_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """The first id that is another token in the other tokenizer, in words; None where there is none.

    How a text is cut into tokens, and the chat template, may differ all the same.

    Raises:
        ValueError: a tokenizer.json whose vocabulary is not one that the tokenizers library writes.
    """
    if one.files["tokenizer.json"] == other.files["tokenizer.json"]:
        return None
    ours, theirs = _tokens(one), _tokens(other)
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            return f"id {token} is {ours.get(token)!r:.40} here and {theirs.get(token)!r:.40} there"
    return None


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    try:
        values = json.loads(tokenizer.files["tokenizer.json"])
        found = {token: text for text, token in _pairs(values["model"]["vocab"])}
        return found | {added["id"]: added["content"] for added in values.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ValueError(f"tokenizer.json: no vocabulary in it ({type(problem).__name__}: {problem})") from None


def _pairs(vocabulary: Any) -> Any:
    """Texts with their ids: of BPE by name, of Unigram in a list with scores."""
    if isinstance(vocabulary, dict):
        return vocabulary.items()
    return ((text, token) for token, (text, _) in enumerate(vocabulary))
