"""A model by its folder, or by its name on the Hugging Face hub."""

import os
import re
from pathlib import Path

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
# What a model is made of. Never pickles, nor Python files: neither is read, and both would run.
_SMALL = ("*.json", "*.jinja", "tokenizer.model", "tiktoken.model", "merges.txt")
_WEIGHTS = "*.safetensors"
# Other forms of the same weights: in folders of their own (`original/`, `onnx/`), or in one file beside the shards.
_OTHERS = ("*/*", "consolidated*")


def model_folder(model: str | Path, *, weights: bool = True) -> Path:
    """The folder of a model.

    Args:
        model: a folder, or `owner/name` or `owner/name@revision` on the hub; a folder that exists wins. What the hub's
            cache lacks is fetched into it, unless HF_HUB_OFFLINE is set.
        weights: fetch them too, not the configuration and the tokenizer alone.

    Raises:
        ValueError: it is neither, or it cannot be fetched.
    """
    if os.path.lexists(model):
        return Path(model)
    named = _NAME.fullmatch(str(model))
    if named is None:
        raise ValueError(f"{model}: no such folder; wanted a model's, or a name on the hub such as owner/name")
    from huggingface_hub import constants, snapshot_download  # loads a client for HTTP

    wanted = [*_SMALL, _WEIGHTS] if weights else list(_SMALL)
    repository, revision = named.groups()
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=list(_OTHERS))
        )
    except (OSError, ValueError) as problem:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(problem).strip().partition("\n")[0]
        raise ValueError(
            f"{model}: no such folder, and no model of that name in the hub's cache {constants.HF_HUB_CACHE}; it was "
            f"not fetched either ({why})"
        ) from None
