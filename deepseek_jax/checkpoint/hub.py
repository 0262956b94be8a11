"""A model by its folder, or by its name on the Hugging Face hub."""

import os
import re
from pathlib import Path

from deepseek_jax.checkpoint.headers import Entry, entry_of

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
    from huggingface_hub import snapshot_download  # loads a client for HTTP

    wanted = [*_SMALL, _WEIGHTS] if weights else list(_SMALL)
    repository, revision = named.groups()
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=list(_OTHERS))
        )
    except (OSError, ValueError) as problem:
        raise _not_fetched(f"{model}: no such folder, and no model of that name", "it was", problem) from None


def hub_headers(model: str | Path) -> dict[str, Entry]:
    """Every tensor of a model on the hub by the headers of its files, which are fetched without the weights.

    Args:
        model: `owner/name` or `owner/name@revision`.

    Raises:
        ValueError: the headers cannot be fetched, or are none of safetensors.
    """
    from huggingface_hub import get_safetensors_metadata

    repository, revision = _NAME.fullmatch(str(model)).groups()
    try:
        files = get_safetensors_metadata(repository, revision=revision).files_metadata
    except Exception as problem:  # of the client for HTTP, or of the parser: they have no class in common
        raise _not_fetched(f"{model}: no weights of it", "their headers were", problem) from None
    found = {}
    for file, held in files.items():
        for name, tensor in held.tensors.items():
            values = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": list(tensor.data_offsets)}
            found[name] = entry_of(Path(f"{model}/{file}"), name, values, 0)
    return found


def _not_fetched(missing: str, they: str, problem: Exception) -> ValueError:
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(problem).strip().partition("\n")[0]
    return ValueError(f"{missing} in the hub's cache {constants.HF_HUB_CACHE}; {they} not fetched either ({why})")
