"""Text to token ids and back, from a checkpoint's own files."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from deepseek_jax.text import template

_SAVED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<｜User｜>", "<｜Assistant｜>")
"""Tokens of our own small models that are not special: decoding keeps them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Args:
      inner: the `tokenizers` object; its own truncation, padding and special tokens are not used.
      bos: text of the begin-of-sequence token, None when the checkpoint names none.
      eos: text of the end-of-sequence token, None when the checkpoint names none.
      bos_id: its id, None when there is none.
      eos_ids: every id that ends a text, ascending.
      pad_id: padding's id, None when there is none.
      vocab_size: one more than the highest id; a model's embedding may have more rows.
      adds_bos: whether `encode(add_bos=True)` puts the BOS first. Qwen2 has no BOS, and SmolLM2's is the
        opener of its template's turns, so that neither wants one.
      chat_template: Jinja source, None when the checkpoint has none.
      files: the files that `save` writes, by name.
    """

    inner: tokenizers.Tokenizer = field(repr=False)
    bos: str | None
    eos: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    vocab_size: int
    adds_bos: bool
    chat_template: str | None = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def from_folder(cls, folder: Path | str) -> Self:
        """Reads a checkpoint's tokenizer.

        Args:
          folder: holds tokenizer.json and tokenizer_config.json; chat_template.jinja (which overrules the
            config's), generation_config.json and config.json are read when there. End-of-sequence ids are the
            tokenizer's own with generation_config.json's or, where that has none, config.json's; only
            config.json may name ids outside the vocabulary (class defaults), and those are left out.

        Returns:
          The tokenizer.

        Raises:
          ValueError: a file is missing, is not valid JSON, or names a token that is not in the vocabulary.

        Source: huggingface/transformers, `tokenization_utils_base.py` (fields), `generation_config.json`.
        """
        folder = Path(folder)
        files = {name: (folder / name).read_bytes() for name in _SAVED if (folder / name).is_file()}
        if "tokenizer.json" not in files:
            raise ValueError(
                f"{folder}: got no tokenizer.json, wanted a checkpoint folder with one; save the tokenizer"
                " there with transformers' save_pretrained, which writes it"
            )
        if (folder / "config.json").is_file():
            model_config = _json(folder / "config.json", (folder / "config.json").read_bytes())
        else:
            model_config = {}
        return cls._from_files(folder, files, model_config)

    @classmethod
    def characters(cls, alphabet: str, *, chat_template: str) -> Self:
        """Builds a character-level tokenizer for small models of our own.

        Ids: 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, then the six tags (one token each), then the alphabet in
        order.

        Args:
          alphabet: every character that can be encoded, each once.
          chat_template: Jinja source; it may use the tags.

        Returns:
          A tokenizer whose `decode(encode(text, add_bos=False), skip_special=False)` is the text, for any text
          over the alphabet.

        Raises:
          ValueError: the alphabet is empty or repeats a character.
        """
        repeated = sorted({c for c in alphabet if alphabet.count(c) > 1})
        if not alphabet or repeated:
            raise ValueError(
                f"alphabet: got {'nothing' if not alphabet else f'{repeated} more than once'}, wanted each"
                " character once; pass the distinct characters of the task"
            )
        vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, *TAGS, *alphabet])}
        # No unknown token: what is outside the alphabet is an error, never a silent substitute.
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
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
    def _from_files(cls, folder: Path, files: Mapping[str, bytes], model_config: Mapping[str, Any]) -> Self:
        _json(folder / "tokenizer.json", files["tokenizer.json"])
        try:
            inner = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(
                f"{folder / 'tokenizer.json'}: got a file that the tokenizers library does not read"
                f" ({error}), wanted"
                " its format; save the tokenizer again or update the library"
            ) from error
        inner.no_truncation()
        inner.no_padding()
        config = _named_json(folder, files, "tokenizer_config.json")
        tokens = {key: _special(folder, inner, config, key) for key in ("bos_token", "eos_token", "pad_token")}
        bos_id, eos_id, pad_id = (None if t is None else inner.token_to_id(t) for t in tokens.values())
        vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values())
        generation = _named_json(folder, files, "generation_config.json")
        eos_ids = {
            *_eos_ids(folder, generation, model_config, vocab_size),
            *([] if eos_id is None else [eos_id]),
        }
        return cls(
            inner=inner,
            bos=tokens["bos_token"],
            eos=tokens["eos_token"],
            bos_id=bos_id,
            eos_ids=tuple(sorted(eos_ids)),
            pad_id=pad_id,
            vocab_size=vocab_size,
            adds_bos=_adds_bos(inner, config, bos_id),
            chat_template=_chat_template(folder, files, config),
            files=dict(files),
        )

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Turns text into token ids.

        Special tokens written out in the text become those tokens; text from strangers can hold them too.

        Args:
          text: any text; "" gives no ids but the BOS.
          add_bos: begin with exactly one BOS, whether or not the text has it already, for a model that wants
            one (`adds_bos`). When False, or for other models, the ids are the text's alone.

        Returns:
          Token ids.

        Raises:
          ValueError: a character that a vocabulary without an unknown token lacks; it is named.
        """
        try:
            ids = self.inner.encode(text, add_special_tokens=False).ids
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(
                f"encode: got {self._unknown_piece(text)[:40]!r}, wanted text that the vocabulary of"
                f" {self.vocab_size} tokens can write ({error}); clean the text or widen the vocabulary"
            ) from error
        if not (add_bos and self.adds_bos):
            return ids
        first = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
        return [self.bos_id, *ids[first:]]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turns token ids into text.

        Args:
          ids: token ids; those without a token (an embedding's padding rows) add nothing.
          skip_special: leave out special tokens. `<think>` and its like are not special.

        Returns:
          The text; bytes that are not valid UTF-8 become U+FFFD.

        Raises:
          ValueError: an id is negative.
        """
        ids = [int(index) for index in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"ids: got {min(ids)}, wanted ids from 0 up; cut the padding off before decoding")
        return self.inner.decode(ids, skip_special_tokens=skip_special)

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
          (tests/text/test_tokenizer.py, test_chat_begins_with_exactly_one_bos).
        """
        if self.chat_template is None:
            raise ValueError(
                "chat: got a tokenizer without a chat_template, wanted one in tokenizer_config.json or"
                " chat_template.jinja; use encode() on plain text, or add the template of the instruct model"
            )
        text = template.render(
            self.chat_template,
            messages,
            bos_token=self.bos or "",
            eos_token=self.eos or "",
            add_generation_prompt=add_generation_prompt,
            **{"tools": None, "documents": None, **variables},
        )
        return self.encode(text, add_bos=True)

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

    def _unknown_piece(self, text: str) -> str:
        """The first piece of the text (a character, in `characters`) that the vocabulary lacks."""
        known = self.inner.get_vocab(with_added_tokens=True)
        added = sorted((t.content for t in self.inner.get_added_tokens_decoder().values()), key=len, reverse=True)
        parts = re.split("|".join(map(re.escape, added)), text) if added else [text]
        if self.inner.pre_tokenizer is not None:
            parts = [piece for part in parts for piece, _ in self.inner.pre_tokenizer.pre_tokenize_str(part)]
        return next((part for part in parts if part not in known), text)


def _json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got invalid JSON ({error}), wanted a JSON object; fetch the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, wanted an object; fetch the file again")
    return value


def _named_json(folder: Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return _json(folder / name, files[name]) if name in files else {}


def _special(folder: Path, inner: tokenizers.Tokenizer, config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is None:
        return None
    if not isinstance(value, str) or inner.token_to_id(value) is None:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: {key}: got {value!r}, wanted a token that tokenizer.json"
            " holds; take both files from the same checkpoint"
        )
    return value


def _eos_ids(
    folder: Path, generation: Mapping[str, Any], model_config: Mapping[str, Any], vocab_size: int
) -> list[int]:
    strict = generation.get("eos_token_id") is not None
    name, source = ("generation_config.json", generation) if strict else ("config.json", model_config)
    value = source.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(f"{folder / name}: eos_token_id: got {value!r}, wanted an int or a list of ints; correct it")
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside and strict:
        raise ValueError(
            f"{folder / name}: eos_token_id: got {outside}, wanted ids below the vocabulary's {vocab_size};"
            " take tokenizer.json and this file from the same checkpoint"
        )
    return [i for i in ids if i not in outside]


def _adds_bos(inner: tokenizers.Tokenizer, config: Mapping[str, Any], bos_id: int | None) -> bool:
    if bos_id is None:
        return False
    if config.get("add_bos_token") is not None:
        return bool(config["add_bos_token"])
    return inner.encode("", add_special_tokens=True).ids[:1] == [bos_id]


def _chat_template(folder: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry["name"]: entry["template"] for entry in value}
        if "default" not in named:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: chat_template: got templates named {sorted(named)},"
                " wanted one named 'default'; rename the one to use"
            )
        value = named["default"]
    if not isinstance(value, str | None):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template: got {type(value).__name__}, wanted a"
            " string or a list of named templates; correct it"
        )
    return value
