"""Answers that keep to a JSON schema: llguidance says what token may come next."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import llguidance
import numpy as np

from deepseek_jax.generation.constraint import ConstraintError
from deepseek_jax.text.tokenizer import Tokenizer

MAX_SCHEMA = 1 << 16  # bytes
_ANY_OBJECT = {"type": "object"}
_OPTIONS = {"whitespace_flexible": False}  # a model that may write blanks for ever sometimes does


class Grammars:
    """Makes grammars for one model.

    Args:
        tokenizer: the model's.
        vocab_size: the model's, which may be larger.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def of_schema(self, schema: Mapping[str, Any] | None) -> "Grammar":
        """The JSON texts of a schema; None is any object.

        Raises:
            ValueError: there is no such grammar.
        """
        schema = _ANY_OBJECT if schema is None else schema
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA:
            raise ValueError(f"response_format: got a schema of {len(text)} bytes, wanted at most {MAX_SCHEMA}")
        if not self._tokenizer.eos_ids:
            raise ValueError("response_format: got it for a model without an end-of-sequence token, wanted text")
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
            matcher = llguidance.LLMatcher(self._of_library, grammar, log_level=0)
        except ValueError as problem:
            raise ValueError(f"response_format: {problem}") from None
        if matcher.is_error():
            raise ValueError(f"response_format: {matcher.get_error().splitlines()[0]:.200}")
        return Grammar(schema, matcher, self._tokenizer.eos_ids, self._vocab_size)

    @cached_property
    def _of_library(self) -> llguidance.LLTokenizer:
        vocabulary = _Vocabulary(self._tokenizer, self._vocab_size)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), n_vocab=self._vocab_size)


class Grammar:
    """A grammar, and where a completion stands in it: a `generation.constraint.Constraint`.

    Attributes:
        schema: that it is of.
    """

    def __init__(self, schema: Mapping[str, Any], matcher: llguidance.LLMatcher, ends: Sequence[int], vocab_size: int):
        self.schema, self._matcher = schema, matcher
        self._ends, self._vocab_size = ends, vocab_size

    def mask(self) -> np.ndarray:
        """Bits of the tokens that may come next."""
        found = np.zeros(-(-self._vocab_size // 32), np.uint32)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: found.nbytes]
        self._check()
        found.view(np.uint8)[: bits.size] = bits
        if self._matcher.is_accepting():
            for token in self._ends:
                found[token // 32] |= np.uint32(1 << token % 32)
        if not found.any():
            raise ConstraintError("the schema has no token with which the answer could go on")
        return found

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that were drawn; one that ends the completion is the last."""
        for token in tokens:
            if token in self._ends:
                return
            self._matcher.consume_token(token)
        self._check()

    def copy(self) -> "Grammar":
        """The same place, to go on from apart."""
        return Grammar(self.schema, self._matcher.deep_copy(), self._ends, self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"the schema's grammar failed: {self._matcher.get_error():.200}")


class _Vocabulary:
    """The bytes of every token, as the library asks for them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        described = json.loads(tokenizer.files["tokenizer.json"])
        spell = _speller(json.dumps(described.get("decoder")))
        vocabulary = described["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # a unigram model's pairs of word and score
            vocabulary = {word: id for id, (word, _) in enumerate(vocabulary)}
        added = {token["id"]: token["content"] for token in described.get("added_tokens") or ()}
        self.tokens = [b""] * max(vocab_size, tokenizer.vocab_size)
        for word, id in vocabulary.items():
            self.tokens[id] = spell(word)
        for id, word in added.items():
            self.tokens[id] = word.encode()
        self.special_token_ids = sorted(added)
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_ids[0]
        self._ids = {text: id for id, text in enumerate(self.tokens) if text and id not in added}

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens of a text, one a byte where there is one: the library asks for forced text, which is not used."""
        data = text.encode() if isinstance(text, str) else text
        return [self._ids[data[at : at + 1]] for at in range(len(data)) if data[at : at + 1] in self._ids]


def _speller(decoder: str) -> Callable[[str], bytes]:
    """How a vocabulary's words are spelled, by the decoders that tokenizer.json names."""
    if '"ByteLevel"' in decoder:
        table = _bytes_of_characters()
        return lambda word: bytes(table[c] for c in word) if all(c in table for c in word) else word.encode()
    if '"ByteFallback"' in decoder:
        byte = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}
        return lambda word: byte.get(word) or word.replace("\u2581", " ").encode()
    return str.encode


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in kept]
    return {chr(value): value for value in kept} | {chr(256 + at): value for at, value in enumerate(others)}
