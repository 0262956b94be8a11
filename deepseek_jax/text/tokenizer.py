"""Text to token ids and back, from a checkpoint's own files."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.text import confined, encoding, files, template

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<｜User｜>", "<｜Assistant｜>")
"""Tokens of our own small models that are not special: decoding keeps them."""
_MAX_ID = 2**31 - 1
_LOAD_SECONDS = 10.0  # of processor time; R1's 128,000 tokens take 0.4


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    The files are strangers' programs: regular expressions, rewriting rules, Jinja. They run in a process of their own
    within limits of time and memory (`text.confined`), so that a text that they take too long for is a ValueError.

    Args:
      bos: text of the begin-of-sequence token, None when the checkpoint names none.
      eos: text of the end-of-sequence token, None when the checkpoint names none.
      bos_id: its id, None when there is none.
      eos_ids: every id that ends a text, ascending; empty when no file names one, and sampling then ends at its limit
        of tokens alone.
      pad_id: padding's id, None when there is none.
      vocab_size: one more than the highest id; a model's embedding may have more rows.
      adds_bos: whether `encode(add_bos=True)` puts the BOS first. Qwen2 has no BOS, and SmolLM2's is the
        opener of its template's turns, so that neither wants one.
      chat_template: Jinja source, None when the checkpoint has none.
      tool_template: the template named "tool_use", for conversations with tools; None when there is none.
      chat_encoding: "deepseek_v32" for a checkpoint whose conversations `encoding.encode_v32` renders, because it
        comes without a template.
      special: tokens that the checkpoint's files beside tokenizer.json call special.
      files: the files that `save` writes, by name.
    """

    bos: str | None
    eos: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    vocab_size: int
    adds_bos: bool
    chat_template: str | None = field(repr=False)
    tool_template: str | None = field(repr=False)
    chat_encoding: Literal["deepseek_v32"] | None
    special: tuple[str, ...] = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def from_folder(cls, folder: Path | str) -> Self:
        """Reads a checkpoint's tokenizer.

        Args:
          folder: a model's, or its name on the hub. It holds tokenizer.json and, as a rule, tokenizer_config.json.
            special_tokens_map.json, chat_template.jinja (which overrules the config's), generation_config.json and
            config.json are read when there. End-of-sequence ids are the tokenizer's own with generation_config.json's
            or, where that has none, config.json's; only config.json may name ids outside the vocabulary (class
            defaults), and those are left out.

        Returns:
          The tokenizer.

        Raises:
          ValueError: a file is missing, is not valid JSON, names a BOS or EOS that is not in the vocabulary, or takes
            more time or memory than a tokenizer may.

        Source: huggingface/transformers, `tokenization_utils_base.py` (fields and which file overrules which),
          `generation_config.json`.
        Differs: a special token that the config leaves out is read from special_tokens_map.json even if the config has
          `added_tokens_decoder`; a pad token outside the vocabulary is none (tests/text/test_tokenizer_oracle.py).
        """
        folder = model_folder(folder)
        found = files.read(folder)
        return cls._from_files(folder, found, files.model_config(folder))

    @classmethod
    def characters(cls, alphabet: str, *, chat_template: str, words: Sequence[str] = ()) -> Self:
        """Builds a character-level tokenizer for small models of our own.

        Ids: 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, then the six tags (one token each), then the alphabet and the words in
        order.

        Args:
          alphabet: every character that can be encoded, each once.
          chat_template: Jinja source; it may use the tags.
          words: runs of several characters, not only of the alphabet, that are a token each; the longest that fits
            is taken.

        Returns:
          A tokenizer whose `decode(encode(text, add_bos=False), skip_special=False)` is the text, for any text
          over the alphabet and the words.

        Raises:
          ValueError: the alphabet is empty or repeats a character, or a word is short or there twice.
        """
        repeated = sorted({c for c in alphabet if alphabet.count(c) > 1})
        if not alphabet or repeated:
            raise ValueError(
                f"alphabet: got {'nothing' if not alphabet else f'{repeated} more than once'}, wanted each"
                " character once; pass the distinct characters of the task"
            )
        if len(set(words)) < len(words) or any(len(word) < 2 for word in words):
            raise ValueError(f"words: got {list(words)}, wanted different ones of several characters")
        vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, *TAGS, *alphabet, *words])}
        # No unknown token: what is outside the alphabet is an error, never a silent substitute.
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        pieces = [*map(re.escape, sorted(words, key=len, reverse=True)), r"[\s\S]"]
        inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("|".join(pieces)), "isolated")
        inner.decoder = decoders.Fuse()
        inner.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in (PAD, BOS, EOS)])
        inner.add_tokens([tokenizers.AddedToken(t, normalized=False, special=False) for t in TAGS])
        config = {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": chat_template,
        }
        files = {
            "tokenizer.json": inner.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
        }
        return cls._from_files(Path("a character tokenizer"), files, {})

    @classmethod
    def _from_files(cls, folder: Path, found: Mapping[str, bytes], model_config: Mapping[str, Any]) -> Self:
        config = files.parse(folder, found, "tokenizer_config.json")
        generation = files.parse(folder, found, "generation_config.json")
        tokens = files.special_tokens(folder, config, files.parse(folder, found, "special_tokens_map.json"))
        facts = _load(folder, found, (*tokens.named.values(), *tokens.others))
        ids = files.special_ids(folder, tokens, facts["ids"])
        bos, eos, bos_id, eos_id = (
            tokens.named["bos_token"],
            tokens.named["eos_token"],
            ids["bos_token"],
            ids["eos_token"],
        )
        ends = files.eos_ids(folder, generation, model_config, facts["size"])
        templates = files.chat_templates(folder, found, config)
        return cls(
            bos=bos,
            eos=eos,
            bos_id=bos_id,
            eos_ids=tuple(sorted({*ends, *([] if eos_id is None else [eos_id])})),
            pad_id=ids["pad_token"],
            vocab_size=facts["size"],
            adds_bos=files.adds_bos(config, bos_id, facts["empty"]),
            chat_template=templates.get("default"),
            tool_template=templates.get("tool_use"),
            chat_encoding=_encoding(templates, model_config, facts["ids"]),
            special=tuple(t for t in (*tokens.named.values(), *tokens.others) if t is not None),
            files=dict(found),
        )

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Turns text into token ids.

        Special tokens written out in the text become those tokens; text from strangers can hold them too.

        Args:
          text: any text; "" gives no ids but the BOS.
          add_bos: begin with exactly one BOS, whether or not the text has it already, for a model that wants
            one (`adds_bos`). When False, or for other models, the ids are the text's alone.

        Returns:
          Token ids. An EOS is never added, whatever `add_eos_token` says: a text that is to be continued has none.

        Raises:
          ValueError: a character that a vocabulary without an unknown token lacks; it is named. Or the text takes
            this tokenizer more time or memory than `confined` allows.
        """
        ids = self._encoded("encode", text)
        return [self.bos_id, *ids[self._leading_bos(ids) :]] if add_bos and self.adds_bos else ids

    def encode_with_offsets(self, text: str, *, add_bos: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and where each token stands in the text.

        Returns:
          Token ids, and for each its first character and the one after its last; (0, 0) for a BOS that is not in the
          text. Tokens that share a character, whose bytes they divide, all have it.
        """
        ids, starts, ends = self._encoded("offsets", text)
        places = list(zip(starts, ends, strict=True))
        if not (add_bos and self.adds_bos):
            return ids, places
        first = self._leading_bos(ids)
        bos = places[first - 1] if first else (0, 0)
        return [self.bos_id, *ids[first:]], [bos, *places[first:]]

    def _leading_bos(self, ids: Sequence[int]) -> int:
        return next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))

    def _encoded(self, operation: str, text: str) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"encode: got {text[error.start]!r} at character {error.start}, half of a pair of surrogates, wanted"
                " Unicode text; clean it"
            ) from None
        try:
            return self._ask(operation, text)
        except confined.Reply as reply:
            if reply.kind != "unwritable":
                raise ValueError(f"encode: {reply.value}; shorten the text or use another tokenizer") from None
            piece, reason = reply.value
            raise ValueError(
                f"encode: got {piece!r}, wanted text that the vocabulary of {self.vocab_size} tokens can write"
                f" ({reason}); clean the text or widen the vocabulary"
            ) from None

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Turns token ids into text.

        Args:
          ids: token ids; those without a token (an embedding's padding rows) add nothing.
          skip_special: leave out special tokens. `<think>` and its like are not special.

        Returns:
          The text; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
          ValueError: an id is negative, or the ids take this tokenizer more time or memory than `confined` allows.
        """
        ids = [int(index) for index in ids]
        if ids and not 0 <= min(ids) <= max(ids) <= _MAX_ID:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"ids: got {wrong}, wanted ids from 0 to {_MAX_ID}; cut the padding off before decoding")
        try:
            return self._ask("decode", ids, skip_special)
        except confined.Reply as reply:
            raise ValueError(f"decode: {reply.value}; use another tokenizer") from None

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Renders a conversation with the checkpoint's template and encodes it with one BOS.

        Args:
          messages: one mapping a message, with "role" and "content".
          add_generation_prompt: end with the opening of the assistant's turn.
          **variables: further variables of the template, such as tools or `thinking`.

        Returns:
          Token ids.

        Raises:
          ValueError: there is no template, the messages are malformed, or the template refuses them.

        Source: huggingface/transformers, `PreTrainedTokenizerBase.apply_chat_template`.
        Differs: a model that wants a BOS gets it even if its template leaves it out
          (tests/text/test_tokenizer.py, test_chat_begins_with_exactly_one_bos); DeepSeek-V3.2, which has no template,
          is rendered by `encoding.encode_v32`.
        """
        text = self.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_bos=True)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **variables: Any) -> str:
        """The text that `chat` encodes; arguments and errors are its own."""
        common = {
            "bos_token": self.bos or "",
            "eos_token": self.eos or "",
            "add_generation_prompt": add_generation_prompt,
            **{"tools": None, "documents": None, **variables},
        }
        source = self.tool_template if common["tools"] and self.tool_template else self.chat_template
        if source is not None:
            return template.render(source, messages, **common)
        if self.chat_encoding is not None:
            template.check_messages(messages)
            return encoding.encode_v32(messages, **common)
        raise ValueError(
            "chat: got a tokenizer without a chat_template, wanted one in chat_template.jinja or"
            " tokenizer_config.json; give plain text (--no-chat), or add the template of the instruct model"
        )

    def save(self, folder: Path | str) -> None:
        """Writes the tokenizer's files, byte for byte as they were read, to make an exported model complete.

        Args:
          folder: made if missing; files of the same names are replaced. generation_config.json is among them,
            since it holds end-of-sequence ids; config.json is the model's to write.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    @cached_property
    def _key(self) -> str:
        return _key(self.files, self.special)

    def _ask(self, operation: str, *arguments: Any) -> Any:
        """An operation on this tokenizer, which the process may have to load first, or again."""
        try:
            return confined.ask(operation, self._key, *arguments)
        except confined.Reply as reply:
            if reply.kind != "absent":
                raise
        _load(Path("the tokenizer"), self.files, self.special)
        return confined.ask(operation, self._key, *arguments)


def _key(found: Mapping[str, bytes], special: Sequence[str]) -> str:
    return hashlib.sha256(found["tokenizer.json"] + json.dumps(special).encode()).hexdigest()


def _load(folder: Path, found: Mapping[str, bytes], special: Sequence[str | None]) -> dict[str, Any]:
    special = tuple(token for token in special if token is not None)
    file = folder / "tokenizer.json"
    try:
        source = found["tokenizer.json"].decode()
        names = [*special, *encoding.TOKENS]
        facts = confined.ask("load", _key(found, special), source, special, names, seconds=_LOAD_SECONDS)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: got invalid UTF-8 ({error}), wanted JSON; fetch the file again") from None
    except confined.Reply as reply:
        if reply.kind == "invalid":
            raise ValueError(f"{file}: got invalid JSON ({reply.value}), wanted JSON; fetch the file again") from None
        raise ValueError(
            f"{file}: got a file that the tokenizers library does not read ({reply.value}), wanted its format; take"
            " it from the checkpoint's publisher, save it again, or update the library"
        ) from None
    if not 0 < facts["size"] <= _MAX_ID:
        raise ValueError(
            f"{file}: got a vocabulary of ids below {facts['size']}, wanted 1 to {_MAX_ID}; take the file from the"
            " checkpoint's publisher"
        )
    return facts


def _encoding(
    templates: Mapping[str, str], model_config: Mapping[str, Any], ids: Mapping[str, int | None]
) -> Literal["deepseek_v32"] | None:
    known = model_config.get("model_type") == "deepseek_v32" and all(ids[t] is not None for t in encoding.TOKENS)
    return "deepseek_v32" if known and not templates else None
