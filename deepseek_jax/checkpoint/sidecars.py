"""The small files that travel with the weights from folder to folder: configuration, tokenizer, code, licence, card."""

import json
import os
import re
from pathlib import Path

from deepseek_jax.checkpoint.files import read_json, write_whole

# Without these a model means something else, so that one which cannot be copied is an error.
NAMED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model"),
)
# The words and the code that a checkpoint is published with. Larger ones are left out, as are links out of the folder.
_BESIDE = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY|README)[\w.-]{0,40}|[A-Za-z_]\w{0,99}\.py", re.ASCII)
LARGEST = 4 << 20  # bytes of one of the latter
_LOCAL_CLASS = re.compile(r"([A-Za-z_]\w*)\.[A-Za-z_]\w*", re.ASCII)
_WITH_CODE = ("config.json", "tokenizer_config.json")


def copy_sidecars(source: Path, target: Path) -> None:
    """Copy the files of a model that are no weights, those that exist, byte for byte.

    Raises:
        ValueError: a file of the configuration or the tokenizer is a link out of the folder, whose content nobody meant
            to hand on.
    """
    for name in NAMED:
        if not (source / name).is_file():
            continue
        if not _belongs(source / name):
            raise ValueError(f"{source / name}: is a link out of its folder; put the file itself there, or remove it")
        write_whole(target / name, (source / name).read_bytes())
    for path in sorted(source.iterdir()):
        if _BESIDE.fullmatch(path.name) and path.is_file() and _belongs(path) and path.stat().st_size <= LARGEST:
            write_whole(target / path.name, path.read_bytes())


def drop_missing_code(folder: Path) -> None:
    """Take out of `auto_map` what names Python files that the folder lacks, which transformers would not find."""
    for name in _WITH_CODE:
        values = read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(held := values.get("auto_map"), dict):
            continue
        kept = {key: value for key, value in held.items() if _has_code(folder, value)}
        if kept != held:
            values |= {"auto_map": kept}
            if not kept:
                del values["auto_map"]
            write_whole(folder / name, json.dumps(values, indent=2, ensure_ascii=False).encode())


def _belongs(path: Path) -> bool:
    """Whether a file is its folder's own. The hub's cache holds links into the `blobs` beside its snapshots."""
    real, folder = os.path.realpath(path), os.path.realpath(path.parent)
    blobs = os.path.join(os.path.dirname(os.path.dirname(folder)), "blobs")
    return os.path.dirname(real) in (folder, blobs)


def _has_code(folder: Path, value: object) -> bool:
    """Whether all classes of an entry are there, or in a repository that the entry names ("owner/name--file.Class")."""
    classes = [of for of in (value if isinstance(value, list) else [value]) if of is not None]
    if not classes or not all(isinstance(of, str) for of in classes):
        return False
    local = [_LOCAL_CLASS.fullmatch(of) for of in classes if "--" not in of]
    return all(found is not None and (folder / f"{found[1]}.py").is_file() for found in local)
