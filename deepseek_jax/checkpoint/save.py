"""A model in memory written as a Hugging Face folder, under whatever layout it lies."""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from deepseek_jax import distributed
from deepseek_jax.checkpoint import files, names, writer
from deepseek_jax.checkpoint.convert import write_hf
from deepseek_jax.checkpoint.finite import check_finite
from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.checkpoint.headers import NAMES, Entry
from deepseek_jax.checkpoint.model_folder import DTYPE_KEYS
from deepseek_jax.checkpoint.sidecars import copy_sidecars, drop_missing_code
from deepseek_jax.config import to_hf
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.packing import refuse_packed
from deepseek_jax.model.scan_layers import members


def save_model(
    model: Model, target: Path, *, source: Path | None = None, tokenizer: Mapping[str, bytes] | None = None
) -> None:
    """Write a model from memory as a Hugging Face folder, in the dtypes it has, under whatever layout it lies.

    Several processes all call this. The main one writes; one weight of one layer at a time is gathered for it, whole
    on every device and in the main memory of every process.

    Args:
        model: to write.
        target: folder to make; it appears when it is whole.
        source: folder whose configuration and tokenizer files go with it; None writes config.json from the model.
        tokenizer: further files by name, such as `Tokenizer.files`.

    Raises:
        ValueError: the target exists, or the weights are packed or not finite.
    """
    refuse_packed(model.weights, "to be written")
    files.refuse_existing(target, source)
    check_finite(model.weights, target)
    with files.shared_folder(target) as partial:
        distributed.on_main(lambda: _write_sidecars(model, partial, source, tokenizer or {}))
        memory = _InMemory(model, target)
        if distributed.process_count() == 1:
            write_hf(memory, partial, writer.plan(memory))
        else:
            _write_together(memory, partial)


def _write_sidecars(model: Model, folder: Path, source: Path | None, tokenizer: Mapping[str, bytes]) -> None:
    values = to_hf(model.config)
    if source is not None:
        copy_sidecars(source, folder)
        values = files.read_json(folder / "config.json")
        values.pop("quantization_config", None)  # what is in memory is unpacked
        params, _ = nnx.split_state(model.weights, nnx.Param, ...)
        values |= {key: jax.tree.leaves(params)[0].dtype.name for key in DTYPE_KEYS if key in values}
    files.write_whole(folder / "config.json", json.dumps(values, indent=2).encode())
    for name, content in tokenizer.items():
        files.write_whole(folder / name, content)
    drop_missing_code(folder)


def _write_together(memory: "_InMemory", folder: Path) -> None:
    """The tensors as safetensors. All processes gather them, in the same order; the main one writes."""
    with distributed.together():
        shards = writer.ShardWriter(folder, writer.plan(memory)) if distributed.is_main() else None
    writes: list[Future] = []
    # what goes wrong in writing is kept to the end: until then the other processes wait for this one in every gather
    with ThreadPoolExecutor(1) as pool:
        for name in memory.entries:
            value = memory.read(name)
            if shards is not None:
                wait(writes[-1:])
                writes.append(pool.submit(shards.write, name, 0, value))
    if shards is not None:
        shards.close()
    for write in writes:
        write.result()


class _InMemory:
    """A model's weights as the tensors of a checkpoint, whether they lie by layer or in stacks."""

    def __init__(self, model: Model, folder: Path):
        self.folder = folder
        self._held: dict[str, tuple[jax.Array, int | None]] = {}  # by layer: an array, and its slot if that is a stack
        for path, leaf in nnx.to_flat_state(model.weights):
            for slot, member in enumerate(members(path, model.config)):
                self._held[names.key(member)] = leaf.get_raw_value(), slot if path[0] == "stacks" else None
        self._gathered: tuple[str, np.ndarray] = "", np.empty(0)
        table = names.tensors(model.config, abstract_weights(model.config)[1])
        self._tensors = {tensor.name: tensor for tensor in table}
        dtype = lambda tensor: NAMES[np.dtype(self._held[self._key(tensor)][0].dtype)]
        self.entries = {name: Entry(dtype(tensor), tensor.shape, 0) for name, tensor in self._tensors.items()}

    def _key(self, tensor: names.Tensor) -> str:
        """The key of the weight that a tensor is, or is a copy of; a tied head is the embedding."""
        key = names.key(tensor.copy_of or tensor.path)
        return key if key in self._held else "embed"

    def where(self, name: str) -> str:
        return str(self.folder)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        tensor = self._tensors[name]
        key = self._key(tensor)
        array, slot = self._held[key]
        if array.is_fully_addressable:
            value = _entry(array, slot, tensor.expert)
        else:
            value = self._whole(key)
            value = value if tensor.expert is None else value[tensor.expert]
        value = np.asarray(value)
        value = value.T if tensor.transposed and key != "embed" else value
        return value[(rows, columns)[: value.ndim]]

    def _whole(self, key: str) -> np.ndarray:
        """A weight from all processes, which all ask for it; the last is kept, for its experts follow each other."""
        if self._gathered[0] != key:
            array, slot = self._held[key]
            self._gathered = key, multihost_utils.process_allgather(_entry(array, slot, None), tiled=True)
        return self._gathered[1]


def _entry(array: jax.Array, *slots: int | None) -> jax.Array:
    """The entry at these places along the first axes; None is no axis."""
    given = tuple(np.int32(slot) for slot in slots if slot is not None)
    return _taken(array, given) if given else array


@jax.jit
def _taken(array: jax.Array, slots: tuple[np.int32, ...]) -> jax.Array:
    """By dynamic indices: static ones would compile once an expert."""
    for slot in slots:
        array = jax.lax.dynamic_index_in_dim(array, slot, keepdims=False)
    return array
