"""A converted folder's arrays: one Orbax checkpoint a layer, filled by TensorStore piece by piece.

Orbax writes an array from memory, and the stacked experts of one R1 layer are 11 GB. So Orbax makes each
checkpoint of empty arrays, and TensorStore, on which Orbax rests, puts the real ones in their place. The bytes of a
piece lie as in the Hugging Face file: nothing is transposed on the way in or out, only named so (zarr's transpose
codec).
`orbax.checkpoint.v1.load` reads such a folder like any other.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import read_json, resolved, sync, writing
from deepseek_jax.checkpoint.headers import DTYPES, Entry
from deepseek_jax.checkpoint.stored_arrays import StoredArray

WEIGHTS = "weights"
MANIFEST = "manifest.json"
_ZARR = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "uint8"}
_KEPT_AS = {"F8_E8M0": np.dtype(np.uint8)}  # TensorStore has no such number; its code is kept
_ALL = slice(None)
# Files are synced once a unit, not once a write; chunks are read and written whole, so caching them buys nothing.
_CONTEXT = {"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}}


def create_layer(folder: Path, arrays: Sequence[StoredArray]) -> None:
    """Let Orbax make the checkpoint that a `OrbaxLayerWriter` of the same arguments fills.

    Of several processes all call it, layer by layer, because Orbax waits for them; any of them may fill it.
    """
    options = ocp.Context()
    options.array.saving.array_metadata_store = None  # it would state the shapes of the empty arrays
    options.array.saving.enable_write_sharding_file = False
    empty = distributed.replicate(np.zeros((), np.float32))
    with options, writing(folder):
        ocp.save(resolved(_partial(folder)), {array.key: empty for array in arrays}, overwrite=True)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


class OrbaxLayerWriter:
    """An Orbax checkpoint in the making, after `create_layer`; it appears under its name with `close`.

    Args:
        folder: its name to be.
        arrays: what it will hold.
    """

    def __init__(self, folder: Path, arrays: Sequence[StoredArray]):
        self._folder = folder
        self._partial = _partial(folder)
        context = ts.Context(_CONTEXT)
        with writing(folder):
            self._stores = {a.key: _create(self._partial, a, context) for a in arrays}

    def write(self, array: StoredArray, index: tuple[slice, ...], value: np.ndarray) -> None:
        """Write one piece, given as the file holds it; safe from several threads."""
        kept = _KEPT_AS.get(array.dtype)
        with writing(self._folder):
            self._stores[array.key][index].write(value if kept is None else value.view(kept)).result()

    def close(self) -> None:
        sync(self._partial)
        self._partial.rename(self._folder)


def _create(folder: Path, array: StoredArray, context: ts.Context) -> ts.TensorStore:
    """An empty array of our orientation, seen in the file's."""
    order, pieces = _order(array), array.pieces()
    metadata = {
        "shape": [array.shape[axis] for axis in order],
        "data_type": _ZARR[array.dtype],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [pieces[axis] for axis in order]}},
        "codecs": [
            {"name": "transpose", "configuration": {"order": order}},
            {"name": "bytes", "configuration": {"endian": "little"}},
        ],
    }
    spec = _spec(folder, array.key) | {"metadata": metadata, "create": True, "delete_existing": True}
    return ts.open(spec, context=context).result().transpose(order)


def _spec(folder: Path, key: str) -> dict:
    base = {"driver": "file", "path": f"{resolved(folder) / 'state'}/"}
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{key}/"}}


def _order(array: StoredArray) -> list[int]:
    """The permutation between our axes and the file's; it is its own inverse."""
    axes = list(range(len(array.shape)))
    return [*axes[:-2], axes[-1], axes[-2]] if array.transposed else axes


class ConvertedFolder:
    """The tensors of a converted folder, as its manifest lists them, read from its Orbax checkpoints.

    Attributes:
        manifest: its parsed manifest.json.
        entries: every tensor's dtype and shape.
        hashes: of every tensor's bytes, xxh3_128 in hexadecimal.

    Raises:
        ValueError: there is no manifest, or it is damaged: the folder was not written to its end.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{path}: missing; the folder was not written to its end, convert it again")
        self.manifest = read_json(path)
        tensors = self.manifest.get("tensors")
        if not isinstance(tensors, dict):
            raise ValueError(f"{path}: tensors: got {type(tensors).__name__}, wanted an object")
        self.entries = {name: _entry(path, name, values) for name, values in tensors.items()}
        self.hashes = {name: values["xxh3_128"] for name, values in tensors.items()}
        self._of: dict[str, tuple[StoredArray, int | None]] = {}
        self._context = ts.Context(_CONTEXT)
        self._stores: dict[tuple[str, str], ts.TensorStore] = {}

    def open(self, arrays: Sequence[StoredArray]) -> None:
        """Say how tensors lie in arrays, and check that these are there; before the first `read`."""
        for array in arrays:
            for tensor in array.tensors:
                self._of[tensor.name] = array, tensor.expert
            self._stores[array.unit, array.key] = self._opened(array)

    def _opened(self, array: StoredArray) -> ts.TensorStore:
        folder = self.folder / WEIGHTS / array.unit
        try:
            store = ts.open(_spec(folder, array.key), context=self._context, open=True, read=True).result()
        except ValueError as problem:
            raise ValueError(f"{folder}: array {array.key!r} cannot be read ({problem!s:.200})") from None
        wanted = tuple(array.shape[axis] for axis in _order(array))
        held, dtype = f"{store.dtype.numpy_dtype}{list(store.shape)}", _KEPT_AS.get(array.dtype, DTYPES[array.dtype])
        if held != f"{dtype}{list(wanted)}":
            raise ValueError(f"{folder}: array {array.key!r}: got {held}, wanted {dtype}{list(wanted)}")
        return store.transpose(_order(array))

    def where(self, name: str) -> str:
        return str(self.folder / WEIGHTS)

    def read(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> np.ndarray:
        """A tensor as the Hugging Face file held it, or a part of it. ValueError when it cannot be read."""
        array, expert = self._of[name]
        axes = (rows, columns)[: len(array.tensors[0].shape)]
        index = axes if expert is None else (expert, *axes)
        try:
            return self._stores[array.unit, array.key][index].read(order="C").result().view(DTYPES[array.dtype])
        except ValueError as problem:
            raise ValueError(f"{self.where(name)}: tensor {name!r} cannot be read ({problem!s:.200})") from None


def _entry(path: Path, name: str, values: object) -> Entry:
    match values:
        case {"dtype": str(dtype), "shape": [*shape], "xxh3_128": str()} if dtype in DTYPES:
            if all(type(width) is int and width >= 0 for width in shape):
                return Entry(dtype, tuple(shape), 0)
    raise ValueError(f"{path}: tensor {name!r}: wanted a dtype of {', '.join(DTYPES)}, a shape and a hash")


def is_converted(folder: Path) -> bool:
    return (folder / WEIGHTS).is_dir()
