"""LoRA adapters by Hugging Face's module names, and PEFT's folders of them in and out."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from deepseek_jax import distributed
from deepseek_jax.checkpoint import files, names, writer
from deepseek_jax.checkpoint.finite import check_finite
from deepseek_jax.checkpoint.headers import NAMES, make_header
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.lora import ALL_LINEAR, LoRAConfig, abstract_adapter, adapter_from_arrays, first_adapter
from deepseek_jax.model.scan_layers import members
from deepseek_jax.sharding import LOCAL, Layout

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"a": "lora_A", "b": "lora_B"}
# The choice of V3.2's indexer passes it no gradient, and routing is steered by the router's bias, not by training it.
_FROZEN = ("router", "indexer")
_LAYER = re.compile(r"^(?:model\.)?layers\.[0-9]{1,9}\.")
_EXPERT = re.compile(r"(^|\.)experts\.[0-9]{1,9}\.")
# Keys of adapter_config.json that are read, those that say nothing of the arithmetic, and values of others that change
# nothing. Every further key has to be off (null, false, 0 or empty), which is how PEFT writes what is not used.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "target_parameters"}
_IGNORED = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
    ),
    *("revision", "task_type"),
}
_HARMLESS = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal")}
_ADVICE = {"lora_dropout": "dropout acts in training alone, set it to 0 there"}


class Adapter(NamedTuple):
    """An adapter in memory: its settings and its matrices."""

    lora: LoRAConfig
    weights: nnx.State


def adapted_paths(config: ModelConfig, lora: LoRAConfig) -> list[names.Path]:
    """Paths, by layer, of the matrices that the targets name.

    A target is the end of a module's name from a dot on, as for PEFT, with experts not numbered: `gate_proj` means the
    gates of dense layers, shared experts and routed experts; `mlp.gate_proj`, `shared_experts.gate_proj` and
    `experts.gate_proj` mean one of the three. All layers are adapted alike, modules for multi-token prediction not at
    all. "all-linear" is every projection. Embedding, head, norms, router and V3.2's indexer stay frozen.

    Raises:
        ValueError: a target that this model has no module for; the message names those that it has.
    """
    inside = {_inside(name): [] for name in _modules(config)}
    for name, tensor in _modules(config).items():
        inside[_inside(name)].append(tensor.path)
    hits = set(inside) if lora.targets == ALL_LINEAR else set()
    for target in () if lora.targets == ALL_LINEAR else lora.targets:
        hit = {module for module in inside if module == target or module.endswith(f".{target}")}
        if not hit:
            known = ", ".join(sorted(inside))
            raise ValueError(f"targets: got {target!r:.80}, wanted {ALL_LINEAR!r} or the ends of names among {known}")
        hits |= hit
    return list(dict.fromkeys(path for module in sorted(hits) for path in inside[module]))


def new_adapter(
    config: ModelConfig, lora: LoRAConfig, *, seed: int, dtype: jnp.dtype = jnp.float32, layout: Layout = LOCAL
) -> nnx.State:
    """An adapter that changes nothing yet, for a model on a layout: `model.lora.first_adapter` by module names.

    Raises:
        ValueError: an unknown target, or a mesh that does not divide the model.
    """
    return first_adapter(config, lora, adapted_paths(config, lora), seed=seed, dtype=dtype, layout=layout)


def save_adapter(
    adapter: nnx.State, lora: LoRAConfig, config: ModelConfig, target: Path, *, base: str | None = None
) -> None:
    """Write an adapter as a folder that PEFT loads, in the dtype it has, under whatever layout it lies.

    Several processes all call this; each gathers the adapter in its main memory, and the main one writes.

    Args:
        adapter: of a model of this configuration.
        lora: what it was made with.
        config: the model's.
        target: folder to make; it appears when it is whole.
        base: name or folder of the model, which PEFT's users find in the configuration.

    Raises:
        ValueError: the target exists; numbers that are not finite; the adapter is not of these configurations; or
            routed experts that PEFT could not read, which joins their gates and ups: one adapted without the other, or
            with `rslora`.
    """
    check_finite(adapter, target)
    settings = _settings(config, lora, base)
    tensors = dict(_filed(_by_layer(adapter, config), _table(config, lora)))
    with files.shared_folder(target) as partial:
        distributed.on_main(lambda: _write(partial, settings, tensors))


def load_adapter(
    folder: Path, config: ModelConfig, *, dtype: jnp.dtype = jnp.float32, layout: Layout = LOCAL
) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote, for a model of this configuration.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: the model's.
        dtype: of A and B in memory.
        layout: of the model.

    Raises:
        ValueError: no LoRA; a setting that would change what the model computes and is not supported here (DoRA,
            dropout, trained biases or modules, unequal ranks, some of the layers); targets that the model lacks;
            tensors that are missing, unexpected, misshapen or damaged, among them routed experts joined as PEFT
            saves them from transformers 5.
    """
    file = folder / CONFIG
    values = files.read_json(file)
    try:
        lora = _read_settings(values)
        table = _table(config, lora)
    except ValueError as problem:
        raise ValueError(f"{file}: {problem}") from None
    source = _AdapterFile(folder)
    _check(source, table)
    like = abstract_adapter(config, lora, adapted_paths(config, lora), dtype=dtype, layout=layout)
    parts: dict[names.Path, list[np.ndarray]] = {}
    for name, place in table.items():
        parts.setdefault(place.path, []).append(source.read(name).T.astype(dtype))
    stacked = {place.path for place in table.values() if place.expert is not None}
    arrays = {path: np.stack(of) if path in stacked else of[0] for path, of in parts.items()}
    return Adapter(lora, adapter_from_arrays(arrays, like, config))


class _Place(NamedTuple):
    """Where a tensor of an adapter's file lies in an adapter by layer, and its shape in the file."""

    path: names.Path
    shape: tuple[int, int]
    expert: int | None


class _AdapterFile(files.TensorFolder):
    """The one file of an adapter's folder."""

    def _listing(self) -> dict[Path, list[str] | None]:
        if not (self.folder / WEIGHTS).is_file():
            raise ValueError(f"{self.folder}: no {WEIGHTS}; pickled .bin adapters are not read")
        return {self.folder / WEIGHTS: None}


def _modules(config: ModelConfig) -> Mapping[str, names.Tensor]:
    """The matrices that may be adapted, by the full names of Hugging Face's modules."""
    table = names.tensors(config, abstract_weights(config)[1])
    may = lambda tensor: tensor.path[0] == "layers" and tensor.transposed and not set(tensor.path) & set(_FROZEN)
    return {tensor.name.removesuffix(".weight"): tensor for tensor in table if may(tensor)}


def _inside(module: str) -> str:
    """A module's name within its layer, without the number of an expert."""
    return _EXPERT.sub(r"\1experts.", _LAYER.sub("", module))


def _table(config: ModelConfig, lora: LoRAConfig) -> dict[str, _Place]:
    """Every tensor of an adapter's file, by its name."""
    paths, table = set(adapted_paths(config, lora)), {}
    for module, tensor in _modules(config).items():
        if tensor.path in paths:
            rows, columns = tensor.shape
            for part, shape in (("a", (lora.rank, columns)), ("b", (rows, lora.rank))):
                name = f"{_PREFIX}{module}.{_PARTS[part]}.weight"
                table[name] = _Place((*tensor.path, part), shape, tensor.expert)
    return table


def _by_layer(adapter: nnx.State, config: ModelConfig) -> dict[names.Path, np.ndarray]:
    """An adapter's matrices, whole and by layer. All processes ask for them in the same order."""
    held = {}
    for path, leaf in nnx.to_flat_state(adapter):
        value = _gathered(leaf.get_raw_value())
        for place, member in enumerate(members(path, config)):
            held[member] = value[place] if path[0] == "stacks" else value
    return held


def _gathered(value: jax.Array) -> np.ndarray:
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def _filed(held: Mapping[names.Path, np.ndarray], table: Mapping[str, _Place]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, after checking that they are all there is."""
    differing = held.keys() ^ {place.path for place in table.values()}
    if differing:
        raise ValueError(f"adapter: {names.key(min(differing, key=str))} is not what its targets say; wanted the same")
    for name, place in table.items():
        value = held[place.path]
        value = (value if place.expert is None else value[place.expert]).T
        if value.shape != place.shape:
            raise ValueError(f"adapter: {name}: got shape {list(value.shape)}, wanted {list(place.shape)}")
        yield name, value


def _write(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    files.write_whole(folder / CONFIG, json.dumps(settings, indent=2).encode())
    header = make_header({name: (NAMES[value.dtype], value.shape) for name, value in tensors.items()})
    shards = writer.ShardWriter(folder, writer.Plan({WEIGHTS: header}, None))
    try:
        for name, value in tensors.items():
            shards.write(name, 0, value)
    finally:
        shards.close()


def _settings(config: ModelConfig, lora: LoRAConfig, base: str | None) -> dict[str, Any]:
    """adapter_config.json.

    On transformers 5, whose routed experts are one parameter, PEFT takes every module called gate_proj, up_proj or
    down_proj of a model with experts for theirs. It finds those of dense layers and shared experts as parameters.
    Source: PEFT's src/peft/utils/transformers_weight_conversion.py.
    """
    modules = sorted({_inside(name[len(_PREFIX) :].rsplit(".", 2)[0]) for name in _table(config, lora)})
    parameters = [of for of in modules if config.moe and of.startswith("mlp.") and not of.startswith("mlp.experts.")]
    _check_experts(modules, lora)
    # of routed experts two words, or they would be those of all
    spelled = lambda module: module.removeprefix("mlp.") if ".experts." in module else module.rsplit(".", 1)[1]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [spelled(module) for module in modules if module not in parameters],
    }
    return settings | ({"target_parameters": [f"{of}.weight" for of in parameters]} if parameters else {})


def _check_experts(modules: Collection[str], lora: LoRAConfig) -> None:
    """PEFT joins the gates and ups of routed experts: rank and alpha double, and so alpha / rank stays."""
    joined = [of for of in ("mlp.experts.gate_proj", "mlp.experts.up_proj") if of in modules]
    if len(joined) == 1:
        raise ValueError(
            f"targets: got {joined[0]} alone, which PEFT cannot read; wanted gate_proj and up_proj of both"
        )
    if joined and lora.rslora:
        raise ValueError("rslora: got True for routed experts, whose joined rank PEFT takes the root of; wanted False")


def _read_settings(values: Mapping[str, Any]) -> LoRAConfig:
    """The settings in adapter_config.json. ValueError for all that would be left undone."""
    if values.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: got {values.get('peft_type')!r:.80}, wanted 'LORA'")
    for key, value in values.items():
        if value and key not in _READ | _IGNORED and value not in _HARMLESS.get(key, ()):
            advice = _ADVICE.get(key, "merge the adapter with PEFT instead")
            raise ValueError(f"{key}: got {value!r:.80}, which is not supported; {advice}")
    rslora = values.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise ValueError(f"use_rslora: got {rslora!r:.80}, wanted true or false")
    return LoRAConfig(rank=values.get("r"), alpha=values.get("lora_alpha"), targets=_targets(values), rslora=rslora)


def _targets(values: Mapping[str, Any]) -> tuple[str, ...] | str:
    """Targets as `LoRAConfig` has them, from names of modules and of parameters, with layers or without."""
    if values.get("target_modules") == ALL_LINEAR:
        return ALL_LINEAR
    found = []
    for key, suffix in (("target_modules", ""), ("target_parameters", ".weight")):
        listed = values.get(key) or []
        if not isinstance(listed, list) or not all(isinstance(of, str) for of in listed):
            raise ValueError(f"{key}: got {listed!r:.80}, wanted a list of names; spell a pattern out")
        found += [_inside(of.removesuffix(suffix)) for of in listed]
    return tuple(sorted(set(found)))


def _check(source: _AdapterFile, table: Mapping[str, _Place]) -> None:
    for problem, differing in (
        ("missing", table.keys() - source.entries.keys()),
        ("unexpected", source.entries.keys() - table.keys()),
    ):
        if differing:
            more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            raise ValueError(
                f"{source.folder}: {problem} tensor {min(differing)!r:.200}{more} for its {CONFIG} and this model"
            )
    for name, place in table.items():
        got = source.entries[name].shape
        if got != place.shape:
            where = f"{source.where(name)}: tensor {name!r}"
            raise ValueError(f"{where}: got shape {list(got)}, wanted {list(place.shape)} by {CONFIG} and the model")
