"""A tokenizer's files in a checkpoint folder: what each may say, and which overrules which."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SAVED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "generation_config.json",
)
_MAX_BYTES = {"tokenizer.json": 2**26}
_MAX_OTHER_BYTES = 2**24
_NAMED = ("bos_token", "eos_token", "pad_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_NO_TOKENIZER = {
    "tiktoken.model": "it has tiktoken.model, which is not read; convert it with transformers, whose"
    " integrations.tiktoken.convert_tiktoken_to_fast writes tokenizer.json",
    "tokenizer.model": "it has tokenizer.model, which is not read; load the folder with transformers' AutoTokenizer"
    " and save it there with save_pretrained, which writes tokenizer.json",
    "vocab.json": "it has vocab.json, which is not read; load the folder with transformers' AutoTokenizer and save it"
    " there with save_pretrained, which writes tokenizer.json",
}


class SpecialTokens(NamedTuple):
    """Texts of special tokens.

    Attributes:
      named: by "bos_token", "eos_token" and "pad_token"; None where there is none.
      source: the file that names each.
      others: those without a role of ours.
    """

    named: dict[str, str | None]
    source: dict[str, Path]
    others: tuple[str, ...]


def read(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer that a folder has, by name.

    Raises:
      ValueError: no tokenizer.json, or a file that is too large for what it is.
    """
    found = {name: _content(folder / name) for name in SAVED if os.path.lexists(folder / name)}
    if "tokenizer.json" not in found:
        advice = "save the tokenizer there with transformers' save_pretrained, which writes it"
        advice = next((text for name, text in _NO_TOKENIZER.items() if (folder / name).is_file()), advice)
        raise ValueError(f"{folder}: got no tokenizer.json, wanted a checkpoint folder with one; {advice}")
    return found


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path}: got something that is no regular file, wanted one; take it from the publisher")
    most = _MAX_BYTES.get(path.name, _MAX_OTHER_BYTES)
    if path.stat().st_size > most:
        raise ValueError(f"{path}: got {path.stat().st_size} bytes, wanted at most {most}; take it from the publisher")
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: got a git-lfs pointer, wanted the file itself; fetch it with `git lfs pull`")
    return content


def parse(folder: Path, found: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A JSON object from one of the files, {} when it is not there; ValueError names the file."""
    if name not in found:
        return {}
    try:
        value = json.loads(found[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / name}: got invalid JSON ({str(error)[:200]}), wanted a JSON object; fetch the file again"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name}: got a JSON {type(value).__name__}, wanted an object; fetch the file again")
    return value


def model_config(folder: Path) -> dict[str, Any]:
    """config.json, {} when there is none."""
    name = "config.json"
    return parse(folder, {name: _content(folder / name)} if os.path.lexists(folder / name) else {}, name)


def special_tokens(folder: Path, config: Mapping[str, Any], listed: Mapping[str, Any]) -> SpecialTokens:
    """Special tokens, as tokenizer_config.json and special_tokens_map.json have them.

    The map overrules a config of the older form, without `added_tokens_decoder`; beside one of the newer form it only
    adds what the config leaves out.

    Raises:
      ValueError: a token is neither a string nor an object with its text.
    """
    merged = {**listed, **config} if "added_tokens_decoder" in config else {**config, **listed}
    file = {key: folder / ("tokenizer_config.json" if key in config else "special_tokens_map.json") for key in merged}
    if "added_tokens_decoder" not in config:
        file |= {key: folder / "special_tokens_map.json" for key in listed}
    named = {key: _text(file.get(key, folder), key, merged.get(key)) for key in _NAMED}
    others = []
    for key in _LISTS:
        value = merged.get(key) or []
        value = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(value, list):
            raise ValueError(f"{file[key]}: {key}: got {type(value).__name__}, wanted a list of tokens; correct it")
        others += [_text(file[key], key, entry) for entry in value]
    others.append(_text(file.get("unk_token", folder), "unk_token", merged.get("unk_token")))
    return SpecialTokens(named, file, tuple(token for token in others if token))


def _text(file: Path, key: str, value: Any) -> str | None:
    got = value.get("content") if isinstance(value, dict) else value
    if got is None and not isinstance(value, dict):
        return None
    if not isinstance(got, str):
        shown = repr(value)[:100]
        raise ValueError(
            f"{file}: {key}: got {shown}, wanted a token's text or an object with its 'content'; correct it"
        )
    return got


def special_ids(folder: Path, tokens: SpecialTokens, ids: Mapping[str, int | None]) -> dict[str, int | None]:
    """Ids of the named special tokens.

    Raises:
      ValueError: BOS or EOS is not in the vocabulary. Padding is never fed to a model, and may be missing.
    """
    found = {key: None if text is None else ids[text] for key, text in tokens.named.items()}
    for key in ("bos_token", "eos_token"):
        if tokens.named[key] is not None and found[key] is None:
            raise ValueError(
                f"{tokens.source[key]}: {key}: got {tokens.named[key]!r}, wanted a token that tokenizer.json"
                " holds; take both files from the same checkpoint"
            )
    return found


def eos_ids(folder: Path, generation: Mapping[str, Any], model_config: Mapping[str, Any], vocab_size: int) -> list[int]:
    """The ids that generation_config.json or, where that has none, config.json says end a text."""
    strict = generation.get("eos_token_id") is not None
    name, source = ("generation_config.json", generation) if strict else ("config.json", model_config)
    value = source.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(
            f"{folder / name}: eos_token_id: got {repr(value)[:100]}, wanted an int or a list of ints; correct it"
        )
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside and strict:
        raise ValueError(
            f"{folder / name}: eos_token_id: got {repr(outside)[:100]}, wanted ids below the vocabulary's {vocab_size};"
            " take tokenizer.json and this file from the same checkpoint"
        )
    return [i for i in ids if i not in outside]


def adds_bos(config: Mapping[str, Any], bos_id: int | None, empty: list[int]) -> bool:
    """Whether a text begins with the BOS: as `add_bos_token` says, else as the post-processor does with no text."""
    if bos_id is None:
        return False
    if config.get("add_bos_token") is not None:
        return bool(config["add_bos_token"])
    return empty[:1] == [bos_id]


def chat_templates(folder: Path, found: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: chat_template.jinja's, else the config's, else chat_template.json's.

    Raises:
      ValueError: they are not text, or several without one named "default".
    """
    if "chat_template.jinja" in found:
        try:
            return {"default": found["chat_template.jinja"].decode()}
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{folder / 'chat_template.jinja'}: got invalid UTF-8 ({error}), wanted Jinja; fetch the file again"
            ) from None
    name = "tokenizer_config.json"
    value = config.get("chat_template")
    if value is None:
        name = "chat_template.json"
        value = parse(folder, found, name).get("chat_template")
    if value is None:
        return {}
    named = _named(value)
    if named is None:
        raise ValueError(
            f"{folder / name}: chat_template: got {type(value).__name__} {repr(value)[:60]}, wanted a string or a list"
            " of objects with 'name' and 'template'; correct it"
        )
    if "default" not in named:
        raise ValueError(
            f"{folder / name}: chat_template: got templates named {repr(sorted(named))[:100]}, wanted one named"
            " 'default'; rename the one to use"
        )
    return named


def _named(value: Any) -> dict[str, str] | None:
    """Templates by name, None when the value is not of a form that has them."""
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else []
    named = [(e.get("name"), e.get("template")) for e in entries if isinstance(e, dict)]
    if not named or len(named) < len(entries) or not all(isinstance(x, str) for pair in named for x in pair):
        return None
    return dict(named)
