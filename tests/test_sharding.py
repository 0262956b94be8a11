"""Meshes, the table of shardings, and models loaded onto eight devices; these in one process of their own."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.checkpoint import folder as folder_module
from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.convert import convert_hf, export_hf
from deepseek_jax.checkpoint.files import TensorFolder
from deepseek_jax.checkpoint.folder import Model, load_model, save_hf
from deepseek_jax.checkpoint.layout import part
from deepseek_jax.checkpoint.opened import open_folder
from deepseek_jax.config import preset
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.sharding import AXES, make_mesh, weight_sharding
from tests.checkpoint.folders import QWEN2, R1, V3, V32, random_folder

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8
MESHES = {
    "all three": {"fsdp": 2, "expert": 2, "tensor": 2},
    "experts": {"expert": 8},
    "tensor": {"tensor": 4, "fsdp": 2},
}
# What cuts each dimension of a weight, by the end of its path; all other weights are whole on every device.
TABLE = {
    "embed": ("tensor", "fsdp"),
    "head": ("fsdp", "tensor"),
    "project": ("fsdp", None),
    "attention.q_a": ("fsdp", None),
    "attention.q_b": (None, "tensor"),
    "attention.kv_a": ("fsdp", None),
    "attention.kv_b": (None, "tensor"),
    "attention.q": ("fsdp", "tensor"),
    "attention.k": ("fsdp", "tensor"),
    "attention.v": ("fsdp", "tensor"),
    "attention.q_bias": ("tensor",),
    "attention.k_bias": ("tensor",),
    "attention.v_bias": ("tensor",),
    "attention.o": ("tensor", "fsdp"),
    "indexer.q": (None, "tensor"),
    "indexer.k": ("fsdp", None),
    "indexer.weights": ("fsdp", None),
    "mlp.gate": ("fsdp", "tensor"),
    "mlp.up": ("fsdp", "tensor"),
    "mlp.down": ("tensor", "fsdp"),
    "mlp.router": ("fsdp", None),
    "shared.gate": ("fsdp", "tensor"),
    "shared.up": ("fsdp", "tensor"),
    "shared.down": ("tensor", "fsdp"),
    "experts.gate": ("expert", "fsdp", "tensor"),
    "experts.up": ("expert", "fsdp", "tensor"),
    "experts.down": ("expert", "tensor", "fsdp"),
}
WHOLE = {"norm", "shift", "bias", "q_norm", "kv_norm", "attention_norm", "mlp_norm", "token_norm", "hidden_norm"}


def by_the_table(mesh: Mesh, key: str, rank: int) -> NamedSharding:
    *rest, last = key.split(".")
    if last in WHOLE:
        return NamedSharding(mesh, PartitionSpec())
    spec = TABLE[last] if last in ("embed", "head", "project") else TABLE[f"{rest[-1]}.{last}"]
    assert len(spec) == rank
    return NamedSharding(mesh, PartitionSpec(*spec))


def bits(value) -> tuple:
    return value.dtype, value.shape, np.asarray(value).tobytes()


# --- laws that need eight devices ----------------------------------------------------------------


def a_mesh_has_the_four_axes_in_order(folders: Path) -> None:
    mesh = make_mesh(tensor=2, fsdp=4)
    assert mesh.axis_names == AXES == ("data", "fsdp", "expert", "tensor")
    assert tuple(mesh.shape.values()) == (1, 4, 1, 2)
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert make_mesh(jax.devices()[2:4], data=2).devices.ravel().tolist() == jax.devices()[2:4]


def sizes_that_do_not_multiply_to_the_devices_are_refused(folders: Path) -> None:
    with pytest.raises(ValueError, match="mesh: 1 x 2 x 2 x 1 does not make the 8 devices there are"):
        make_mesh(fsdp=2, expert=2)
    with pytest.raises(ValueError, match="mesh: 1 x 1 x 1 x 16 does not make the 8 devices there are"):
        make_mesh(tensor=16)
    with pytest.raises(ValueError, match="mesh: 1 x 1 x 1 x 8 does not make the 4 devices there are"):
        make_mesh(jax.devices()[:4], tensor=8)
    with pytest.raises(ValueError, match="mesh: fsdp: got -2, wanted a whole number from 1"):
        make_mesh(fsdp=-2, tensor=-4)


def every_weight_is_cut_by_the_table(folders: Path) -> None:
    """Of every architecture, and of the published sizes on the meshes that they divide."""
    for config in (V3, R1, V32, QWEN2, preset("r1-671b"), preset("v3.2-671b"), preset("distill-llama-8b")):
        for sizes in ({"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 8}, {"data": 4, "tensor": 2}, {"fsdp": 8}):
            mesh = make_mesh(**sizes)
            seen = set()
            for path, leaf in nnx.to_flat_state(abstract_weights(config)[1]):
                key, shape = names.key(path), leaf.get_raw_value().shape
                found = weight_sharding(mesh, shape, leaf.get_metadata()["axes"], key)
                assert found.is_equivalent_to(by_the_table(mesh, key, len(shape)), len(shape)), (key, found)
                seen.add(key)
            assert {"embed", "head", "layers.1.attention.o"} <= seen


def given_bytes(call: Callable[..., object], *arguments, **options) -> tuple[object, int]:
    """What a call returns, and how many bytes os.pread gave meanwhile."""
    given, real = [], os.pread

    def counting(*where):
        value = real(*where)
        given.append(len(value))
        return value

    os.pread = counting
    try:
        return call(*arguments, **options), sum(given)
    finally:
        os.pread = real


@functools.cache
def loaded(folder: Path, mesh: str | None, dtype: jnp.dtype | None) -> tuple[dict[str, jax.Array], int]:
    """Weights, and how many bytes were read for them."""
    place = None if mesh is None else make_mesh(**MESHES[mesh])
    model, given = given_bytes(load_model, folder, dtype=dtype, mesh=place)
    return names.flat(model.weights), given


LOADS = [(kind, mesh, jnp.float32) for mesh in MESHES for kind in ("hf", "converted")] + [("hf", "all three", None)]


def weights_laid_on_a_mesh_are_those_of_one_device(folders: Path) -> None:
    """Bit for bit, from either kind of folder, FP8 blocks that the mesh cuts through included."""
    for kind, name, dtype in LOADS:
        (wanted, _), (got, _) = (loaded(*of) for of in ((folders / "hf", None, dtype), (folders / kind, name, dtype)))
        assert got.keys() == wanted.keys()
        mesh = make_mesh(**MESHES[name])
        for key, value in wanted.items():
            place = by_the_table(mesh, key, value.ndim)
            assert got[key].sharding.is_equivalent_to(place, value.ndim), (name, key, got[key].sharding)
            assert got[key].addressable_shards[0].data.shape == place.shard_shape(value.shape), (name, key)
            assert bits(got[key]) == bits(value), (kind, name, key)


def sharded_logits_are_those_of_one_device(folders: Path) -> None:
    """The model's own and its MTP module's, to 2e-5 on logits up to 4."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 12)), jnp.int32)

    def forward(model: Model):
        def run(weights, tokens):
            decoder = nnx.merge(model.graphdef, weights)
            hidden = decoder(tokens)
            (drafted,) = decoder.draft(hidden.x_BTD, tokens)
            return decoder.logits(hidden.x_BTD), decoder.logits(drafted.x_BTD)

        return [np.asarray(logits) for logits in jax.jit(run)(model.weights, tokens)]

    wanted = forward(load_model(folders / "sane"))
    assert all(0.5 < np.abs(logits).max() < 20 for logits in wanted)
    for sizes in MESHES.values():
        for got, logits in zip(forward(load_model(folders / "sane", mesh=make_mesh(**sizes))), wanted, strict=True):
            np.testing.assert_allclose(got, logits, rtol=0, atol=2e-5, err_msg=str(sizes))


def a_mesh_that_does_not_divide_is_refused_by_name(folders: Path) -> None:
    cases = [
        (
            folders / "hf",
            make_mesh(jax.devices()[:3], fsdp=3),
            "embed of size 136 is not divisible by mesh axis fsdp 3",
        ),
        (
            folders / "hf",
            make_mesh(jax.devices()[:3], expert=3),
            "expert of size 8 is not divisible by mesh axis expert 3",
        ),
        (folders / "v32", make_mesh(tensor=4, fsdp=2), "heads of size 18 is not divisible by mesh axis tensor 4"),
    ]
    weights = ["embed", r"layers\.1\.mlp\.experts\.down", r"layers\.0\.attention\.indexer\.q"]
    for (folder, mesh, says), weight in zip(cases, weights, strict=True):
        with pytest.raises(ValueError, match=f"^{weight}: axis {says}$"):
            load_model(folder, mesh=mesh)


def a_device_is_given_the_bytes_of_its_own_experts(folders: Path) -> None:
    """What a process with that device alone would read: of each matrix one expert in eight, and no other."""
    opened = open_folder(folders / "hf")
    mesh = make_mesh(expert=8)
    stacked = [array for array in opened.arrays if array.stacked]
    assert len(stacked) == 2 * 2 * 3  # codes and scales, of the MoE layer and the module's
    for array in stacked:
        place = weight_sharding(mesh, array.shape, ("expert", "embed", "mlp"), array.key)
        for device, index in place.devices_indices_map(array.shape).items():
            name = array.tensors[device.id].name
            got, given = given_bytes(part, opened.source, array, index)
            assert bits(got[0]) == bits(opened.source.read(name))
            assert given == got.nbytes == opened.source.entries[name].nbytes


def of_the_whole(folder: Path) -> int:
    """Bytes of all tensors, and of the two that the MTP module's copies are compared with."""
    entries = TensorFolder(folder).entries
    compared = sum(entries[name].nbytes for name in ("model.embed_tokens.weight", "lm_head.weight"))
    return sum(entry.nbytes for entry in entries.values()) + compared


def loading_reads_every_byte_once_where_no_two_parts_alternate(folders: Path) -> None:
    """All devices being of this process, that is the whole folder."""
    for mesh in (None, "experts"):
        assert loaded(folders / "hf", mesh, jnp.float32)[1] == of_the_whole(folders / "hf")


def loading_reads_every_byte_once_on_any_mesh(folders: Path) -> None:
    given = {mesh: loaded(folders / "hf", mesh, jnp.float32)[1] for mesh in MESHES}
    assert given == dict.fromkeys(MESHES, of_the_whole(folders / "hf"))


def rows_and_columns_are_read_without_their_neighbours(folders: Path) -> None:
    """Of codes, scales, bfloat16 and float32, and of a vector."""
    source = TensorFolder(folders / "hf")
    ends = ("0.mlp.up_proj.weight", "0.mlp.up_proj.weight_scale_inv", "embed_tokens.weight", "1.mlp.gate.weight")
    for name in [name for name in source.entries if name.endswith((*ends, "correction_bias"))]:
        whole, given = given_bytes(source.read, name)
        assert given == whole.nbytes == source.entries[name].nbytes
        for rows, columns in itertools.product((slice(0, 1), slice(1, None), slice(1, 1), slice(None)), repeat=2):
            wanted = whole[(rows, columns)[: whole.ndim]]
            got, given = given_bytes(source.read, name, rows, columns)
            assert bits(got) == bits(wanted) and given == wanted.nbytes, (name, rows, columns)


def a_device_is_read_the_part_that_it_holds(folders: Path) -> None:
    """The file's [out, in] is cut as our [in, out] is, turned; or a process would read what others hold."""
    asked, real = {}, folder_module.part

    def recording(source, array, index):
        asked.setdefault((array.path, array.shape), set()).add(bounds(index, array.shape))
        return real(source, array, index)

    mesh = make_mesh(**MESHES["tensor"])
    folder_module.part = recording
    try:
        weights = names.flat(load_model(folders / "hf", mesh=mesh).weights)
    finally:
        folder_module.part = real
    turned = 0
    for array in open_folder(folders / "hf").arrays:
        if array.copy or array.path[-1] == "scale":
            continue
        weight = weights[names.key(array.path)]
        held = by_the_table(mesh, names.key(array.path), weight.ndim).devices_indices_map(weight.shape).values()
        parts = {bounds(index, weight.shape) for index in held}
        if array.transposed:
            parts = {(*part[:-2], part[-1], part[-2]) for part in parts}
            turned += 1
        assert asked[array.path, array.shape] == parts, array.path
    assert turned > 20


def bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(at.indices(length)[:2] for at, length in zip(index, shape, strict=True))


LAWS = [
    a_mesh_has_the_four_axes_in_order,
    sizes_that_do_not_multiply_to_the_devices_are_refused,
    every_weight_is_cut_by_the_table,
    weights_laid_on_a_mesh_are_those_of_one_device,
    sharded_logits_are_those_of_one_device,
    a_mesh_that_does_not_divide_is_refused_by_name,
    a_device_is_given_the_bytes_of_its_own_experts,
    a_device_is_read_the_part_that_it_holds,
    rows_and_columns_are_read_without_their_neighbours,
    loading_reads_every_byte_once_where_no_two_parts_alternate,
    loading_reads_every_byte_once_on_any_mesh,
]


def run_laws(folders: Path) -> None:
    """In the process with eight devices: what went wrong with each law, as JSON in the folder."""
    assert jax.device_count() == DEVICES
    found = {}
    for law in LAWS:
        try:
            law(folders)
            found[law.__name__] = ""
        except (Exception, pytest.fail.Exception):  # the latter is what pytest.raises raises
            found[law.__name__] = traceback.format_exc()
    (folders / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    folders = tmp_path_factory.mktemp("folders")
    random_folder(folders / "hf", R1, shards=3)
    random_folder(folders / "v32", V32)
    convert_hf(open_folder(folders / "hf"), folders / "converted")
    config = dataclasses.replace(R1, quantization=None)
    save_hf(Model(config, *split(Decoder(config, rngs=nnx.Rngs(0)))), folders / "unpacked")
    export_hf(open_folder(folders / "unpacked", to="fp8"), folders / "sane")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    # code that is not optimised computes the same, and compiles in a third of the time
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    code = f"from pathlib import Path; from tests.test_sharding import run_laws; run_laws(Path({str(folders)!r}))"
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr
    return json.loads((folders / "found.json").read_text())


@pytest.mark.parametrize("law", [law.__name__ for law in LAWS])
def test_on_eight_devices(law, found):
    assert found[law] == "", found[law]


@pytest.mark.parametrize("sizes, axis", [({"rows": 1}, "rows"), ({"tensor": 1, "model": 1, "pipe": 1}, "model")])
def test_an_unknown_axis_is_refused(sizes, axis):
    with pytest.raises(ValueError, match=f"mesh: got axis '{axis}', wanted one of data, fsdp, expert, tensor"):
        make_mesh(**sizes)


@pytest.mark.parametrize("size", [0, -1, 1.0, True])
def test_a_size_that_is_no_whole_number_from_1_is_refused(size):
    with pytest.raises(ValueError, match=f"mesh: expert: got {size}, wanted a whole number from 1"):
        make_mesh(jax.devices()[:1], expert=size)
