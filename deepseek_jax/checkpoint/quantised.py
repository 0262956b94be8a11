"""Model folders whose config.json does not say that their weights are quantised, but another file does."""

from pathlib import Path

from deepseek_jax.checkpoint import files
from deepseek_jax.config.model import shown

_MODELOPT = "hf_quant_config.json"
_WHOLLY = ("quantize_config.json", "quant_config.json")  # AutoGPTQ's and AutoAWQ's before transformers read them


def refuse_other_quantisation(folder: Path) -> None:
    """Refuse weights that are quantised in a way that is not read here, before anyone takes them for something else.

    Raises:
        ValueError: a file of NVIDIA's modelopt, AutoGPTQ or AutoAWQ says that the weights, or the cache, are quantised.
    """
    for name in _WHOLLY:
        if (folder / name).is_file():
            raise ValueError(_says(folder / name, "in the form of AutoGPTQ or AutoAWQ"))
    file = folder / _MODELOPT
    if file.is_file():
        of = files.read_json(file).get("quantization")
        if not isinstance(of, dict):
            raise ValueError(f"{file}: quantization: got {shown(of)}, wanted an object")
        algorithms = [of.get("quant_algo"), of.get("kv_cache_quant_algo")]
        if any(algorithms):
            raise ValueError(_says(file, " and ".join(shown(algorithm) for algorithm in algorithms if algorithm)))


def _says(file: Path, how: str) -> str:
    return (
        f"{file}: the weights are quantised ({how}); DeepSeek's FP8 in blocks, which config.json names, is the one "
        "quantisation that is read: take the model as its makers published it"
    )
