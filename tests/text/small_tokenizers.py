"""Tokenizers of a few tokens, as checkpoints have them."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from deepseek_jax.text.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# bytes that are printable stand for themselves, and the others in order for U+0100 and the characters after it
SHOWN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTES = {byte: ALPHABET.index(chr(byte if byte in SHOWN else 256 + HIDDEN.index(byte))) for byte in range(256)}
"""The token of each byte in `byte_level`."""


@cache
def byte_level(*merged: tuple[str, str]) -> Tokenizer:
    """A token a byte, so that every character beyond ASCII comes in several tokens; and one for each merged pair."""
    vocabulary = [*ALPHABET, *map("".join, merged)]
    inner = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merged)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _saved(inner)


@cache
def word_pieces() -> Tokenizer:
    """Spaces are marks at the beginning of words, and the first one of a text is left out."""
    words = ["▁a", "▁b", "c", "▁", "<0xE6>", "<0xBC>", "<0xA2>"]
    inner = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _saved(inner)


def _saved(inner: tokenizers.Tokenizer) -> Tokenizer:
    inner.add_special_tokens(["<eos>"])
    with TemporaryDirectory() as folder:
        inner.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
        return Tokenizer.from_folder(folder)
