"""Meshes, layouts and their table, and models loaded onto eight devices; these in one process of their own."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.checkpoint import folder as folder_module
from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.convert import convert_hf, export_hf
from deepseek_jax.checkpoint.files import TensorFolder
from deepseek_jax.checkpoint.folder import Model, lay_out, load_model
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.checkpoint.stored_arrays import read_part
from deepseek_jax.config import preset
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.scan_layers import stack_layers
from deepseek_jax.sharding import AXES, LOCAL, Layout, make_mesh, module_layout, weight_sharding
from tests.checkpoint.folders import QWEN2, R1, V3, V32, random_folder
from tests.laws import fixture_of

LAYOUTS = {
    "all three": ({"fsdp": 2, "expert": 2, "tensor": 2}, "train"),
    "experts": ({"expert": 8}, "train"),
    "tensor": ({"tensor": 4, "fsdp": 2}, "train"),
    "context": ({"fsdp": 2, "context": 2, "expert": 2}, "train"),
    "serving": ({"data": 2, "expert": 2, "tensor": 2}, "serve"),
}
# What cuts each dimension of a weight, by the end of its path; all other weights are whole on every device.
F, T, E, S = ("fsdp", "context"), "tensor", "expert", ("expert", "tensor")
TRAIN = {
    "embed": (T, F),
    "head": (F, T),
    "project": (F, None),
    "attention.q_a": (F, T),
    "attention.q_b": (F, T),
    "attention.kv_a": (F, T),
    "attention.kv_b": (F, T),
    "attention.q": (F, T),
    "attention.k": (F, T),
    "attention.v": (F, T),
    "attention.q_bias": (T,),
    "attention.k_bias": (T,),
    "attention.v_bias": (T,),
    "attention.o": (T, F),
    "indexer.q": (F, T),
    "indexer.k": (F, None),
    "indexer.weights": (F, None),
    "mlp.gate": (F, T),
    "mlp.up": (F, T),
    "mlp.down": (T, F),
    "mlp.router": (F, None),
    "shared.gate": (F, T),
    "shared.up": (F, T),
    "shared.down": (T, F),
    "experts.gate": (E, F, T),
    "experts.up": (E, F, T),
    "experts.down": (E, T, F),
}
SERVE = {name: tuple(None if axis == F else axis for axis in cut) for name, cut in TRAIN.items()} | {
    "experts.gate": (S, None, None),
    "experts.up": (S, None, None),
    "experts.down": (S, None, None),
}
TABLES = {"train": TRAIN, "serve": SERVE}
WHOLE = {"norm", "shift", "bias", "q_norm", "kv_norm", "attention_norm", "mlp_norm", "token_norm", "hidden_norm"}
WHOLE |= {"q_head_norm", "k_head_norm"}


# Ranks and index heads that eight ways divide.
EVEN_V32 = dataclasses.replace(
    V32,
    attention=dataclasses.replace(
        V32.attention, kv_lora_rank=24, indexer=dataclasses.replace(V32.attention.indexer, index_n_heads=8)
    ),
)


def layout_of(name: str | None, *, scan_layers: bool = False) -> Layout:
    if name is None:
        return Layout(scan_layers=scan_layers)
    sizes, workload = LAYOUTS[name]
    return Layout(mesh=make_mesh(**sizes), workload=workload, scan_layers=scan_layers)


def by_the_table(layout: Layout, key: str, rank: int) -> NamedSharding:
    *rest, last = key.split(".")
    if last in WHOLE:
        return NamedSharding(layout.mesh, PartitionSpec())
    table = TABLES[layout.workload]
    spec = table[last] if last in ("embed", "head", "project") else table[f"{rest[-1]}.{last}"]
    assert len(spec) == rank
    return NamedSharding(layout.mesh, PartitionSpec(*spec))


def bits(value) -> tuple:
    return value.dtype, value.shape, np.asarray(value).tobytes()


# --- laws that need eight devices ----------------------------------------------------------------


def a_mesh_has_the_five_axes_in_order(folders: Path) -> None:
    mesh = make_mesh(tensor=2, fsdp=4)
    assert mesh.axis_names == AXES == ("data", "fsdp", "expert", "context", "tensor")
    assert tuple(mesh.shape.values()) == (1, 4, 1, 1, 2)
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert make_mesh(jax.devices()[2:4], data=2).devices.ravel().tolist() == jax.devices()[2:4]


def sizes_that_do_not_multiply_to_the_devices_are_refused(folders: Path) -> None:
    with pytest.raises(ValueError, match="mesh: 1 x 2 x 2 x 1 x 1 does not make the 8 devices there are"):
        make_mesh(fsdp=2, expert=2)
    with pytest.raises(ValueError, match="mesh: 1 x 1 x 1 x 1 x 16 does not make the 8 devices there are"):
        make_mesh(tensor=16)
    with pytest.raises(ValueError, match="mesh: 1 x 1 x 1 x 8 x 1 does not make the 4 devices there are"):
        make_mesh(jax.devices()[:4], context=8)
    with pytest.raises(ValueError, match="mesh: fsdp: got -2, wanted a whole number from 1"):
        make_mesh(fsdp=-2, tensor=-4)


def every_weight_is_cut_by_the_table(folders: Path) -> None:
    """Of every architecture, and of the published sizes on the meshes that they divide."""
    meshes = [sizes for sizes, _ in LAYOUTS.values()] + [{"data": 4, "tensor": 2}, {"fsdp": 8}, {"context": 8}]
    published = map(preset, ("r1-671b", "v3.2-671b", "kimi-k2", "distill-llama-8b", "distill-qwen3-8b"))
    for config in (V3, R1, EVEN_V32, QWEN2, *published):
        weights = [(names.key(path), leaf) for path, leaf in nnx.to_flat_state(abstract_weights(config)[1])]
        assert {"embed", "head", "layers.1.attention.o"} <= {key for key, _ in weights}
        for sizes, workload in itertools.product(meshes, TABLES):
            layout = Layout(mesh=make_mesh(**sizes), workload=workload)
            for key, leaf in weights:
                shape = leaf.get_raw_value().shape
                found = weight_sharding(layout, shape, leaf.get_metadata()["axes"], key)
                wanted = by_the_table(layout, key, len(shape))
                assert found.is_equivalent_to(wanted, len(shape)), (key, found)


def a_layer_of_a_stack_is_cut_as_it_is_alone(folders: Path) -> None:
    """Whole along the stack; embedding, head and modules lie as they do without stacks."""
    for name in LAYOUTS:
        layout = layout_of(name, scan_layers=True)
        for path, leaf in nnx.to_flat_state(abstract_weights(R1, layout=layout)[1]):
            value = leaf.get_raw_value()
            in_stack = path[0] == "stacks"
            alone = by_the_table(layout, names.key(path), value.ndim - in_stack)
            wanted = NamedSharding(layout.mesh, PartitionSpec(*(None,) * in_stack, *alone.spec))
            assert value.sharding.is_equivalent_to(wanted, value.ndim), path


def a_layout_refuses_what_it_does_not_divide(folders: Path) -> None:
    """With the numbers, one of each kind; the divisible ones are let through."""
    of = dataclasses.replace
    odd_rank, odd_query = (of(R1, attention=of(R1.attention, **{rank: 33})) for rank in ("kv_lora_rank", "q_lora_rank"))
    narrow = of(R1, moe=of(R1.moe, moe_intermediate_size=151))
    cases = [
        (R1, {"expert": 3}, "train", "n_routed_experts 8 is not divisible by mesh axis expert 3"),
        (R1, {"tensor": 8}, "train", "num_attention_heads 4 is not divisible by mesh axis tensor 8"),
        (R1, {"expert": 3, "tensor": 2}, "serve", "n_routed_experts 8 is .* by mesh axes expert 3 x tensor 2"),
        (R1, {"fsdp": 3}, "train", "hidden_size 136 is not divisible by mesh axis fsdp 3"),
        (R1, {"fsdp": 2, "context": 3}, "train", "hidden_size 136 is not divisible by mesh axes fsdp 2 x context 3"),
        (of(R1, vocab_size=63), {"tensor": 2}, "train", "vocab_size 63 is not divisible by mesh axis tensor 2"),
        (of(R1, intermediate_size=201), {"tensor": 2}, "train", "intermediate_size 201 is not .* mesh axis tensor 2"),
        (narrow, {"tensor": 2}, "train", "moe_intermediate_size 151 is not divisible by mesh axis tensor 2"),
        (odd_rank, {"fsdp": 2}, "train", "kv_lora_rank 33 is not divisible by mesh axis fsdp 2"),
        (odd_query, {"context": 2}, "train", "q_lora_rank 33 is not divisible by mesh axis context 2"),
        (odd_query, {"tensor": 2}, "serve", "q_lora_rank 33 is not divisible by mesh axis tensor 2"),
        (V32, {"tensor": 2}, "train", "index_n_heads 3 is not divisible by mesh axis tensor 2"),
        (QWEN2, {"tensor": 4}, "train", "num_key_value_heads 2 is not divisible by mesh axis tensor 4"),
        (QWEN2, {"expert": 2}, "train", "mesh: expert 2 for a model without experts, wanted 1"),
    ]
    for config, sizes, workload, says in cases:
        count = int(np.prod(list(sizes.values())))
        layout = Layout(mesh=make_mesh(jax.devices()[:count], **sizes), workload=workload)
        with pytest.raises(ValueError, match=f"^{says}$"):
            layout.check(config)
        with pytest.raises(ValueError, match=f"^{says}$"):
            abstract_weights(config, layout=layout)
        LOCAL.check(config)
    for name in LAYOUTS:
        layout_of(name).check(R1)
    Layout(mesh=make_mesh(data=8)).check(QWEN2)


def a_layout_refuses_batches_that_it_does_not_divide(folders: Path) -> None:
    layout = Layout(mesh=make_mesh(data=2, fsdp=2, context=2))
    layout.check_batch(8, 16)
    with pytest.raises(ValueError, match="^batch 6 is not divisible by mesh axes data 2 x fsdp 2$"):
        layout.check_batch(6, 16)
    with pytest.raises(ValueError, match="^length 15 is not divisible by mesh axis context 2$"):
        layout.check_batch(8, 15)
    LOCAL.check_batch(7, 13)


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
def loaded(folder: Path, layout: str | None, dtype: jnp.dtype | None) -> tuple[dict[str, jax.Array], int]:
    """Weights, and how many bytes were read for them."""
    model, given = given_bytes(load_model, folder, dtype=dtype, layout=layout_of(layout))
    return names.flat(model.weights), given


LOADS = [
    *(("hf", layout, jnp.float32) for layout in LAYOUTS),
    ("converted", "all three", jnp.float32),
    ("converted", "serving", jnp.float32),
    ("hf", "all three", None),
]


def weights_laid_on_a_mesh_are_those_of_one_device(folders: Path) -> None:
    """Bit for bit, from either kind of folder, FP8 blocks that the mesh cuts through included."""
    for kind, name, dtype in LOADS:
        (wanted, _), (got, _) = (loaded(*of) for of in ((folders / "hf", None, dtype), (folders / kind, name, dtype)))
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            place = by_the_table(layout_of(name), key, value.ndim)
            assert got[key].sharding.is_equivalent_to(place, value.ndim), (name, key, got[key].sharding)
            assert got[key].addressable_shards[0].data.shape == place.shard_shape(value.shape), (name, key)
            assert bits(got[key]) == bits(value), (kind, name, key)


def a_stacked_layout_loads_the_stacks_of_the_layers(folders: Path) -> None:
    """With the description of a stacked module; and what is saved from it is what was loaded."""
    by_layer = load_model(folders / "unpacked")
    wanted = names.flat(stack_layers(by_layer.weights, by_layer.config, Layout(scan_layers=True)))
    for name in (None, "all three"):
        layout = layout_of(name, scan_layers=True)
        model = load_model(folders / "unpacked", layout=layout)
        assert model.config == by_layer.config
        assert nnx.merge(model.graphdef, model.weights).layout == layout
        got = names.flat(model.weights)
        assert got.keys() == wanted.keys() and any(value.ndim == 4 for value in got.values())
        for key, value in wanted.items():
            assert bits(got[key]) == bits(value), (name, key)
        saved = folders / f"saved {name}"
        save_model(model, saved)
        assert [path.name for path in sorted(saved.iterdir())] == ["config.json", "model.safetensors"]
        for file in saved.iterdir():
            assert file.read_bytes() == (folders / "unpacked" / file.name).read_bytes(), file


def a_model_in_memory_is_laid_out_as_it_would_be_loaded(folders: Path) -> None:
    whole = load_model(folders / "unpacked")
    held = names.flat(whole.weights)
    assert lay_out(whole, LOCAL) == whole
    for name in ("context", "serving"):
        laid = lay_out(whole, layout_of(name))
        assert nnx.merge(laid.graphdef, laid.weights).layout == layout_of(name)
        for key, value in names.flat(laid.weights).items():
            place = by_the_table(layout_of(name), key, value.ndim)
            assert value.sharding.is_equivalent_to(place, value.ndim) and bits(value) == bits(held[key]), (name, key)
    layout = layout_of("context", scan_layers=True)
    like = names.flat(abstract_weights(whole.config, layout=layout)[1])
    wanted = names.flat(stack_layers(whole.weights, whole.config, Layout(scan_layers=True)))
    for key, value in names.flat(lay_out(whole, layout).weights).items():
        assert value.sharding.is_equivalent_to(like[key].sharding, value.ndim) and bits(value) == bits(wanted[key]), key


def sharded_logits_are_those_of_one_device(folders: Path) -> None:
    """The model's own and its MTP module's, to 2e-5 on logits up to 4."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 12)), jnp.int32)

    def forward(model: Model):
        def run(weights, tokens):
            decoder = nnx.merge(model.graphdef, weights)
            hidden = decoder(tokens)
            (drafted,) = decoder.draft(hidden.x_BTD, tokens)
            return decoder.logits(hidden.x_BTD), decoder.logits(drafted.x_BTD)

        return [np.asarray(logits) for logits in jax.jit(run)(model.weights, tokens)]

    wanted = forward(load_model(folders / "sane"))
    assert all(0.5 < np.abs(logits).max() < 20 for logits in wanted)
    sharded = forward(load_model(folders / "sane", layout=layout_of("all three")))
    for got, logits in zip(sharded, wanted, strict=True):
        np.testing.assert_allclose(got, logits, rtol=0, atol=2e-5)


def a_mesh_that_does_not_divide_is_refused_before_weights_are_read(folders: Path) -> None:
    cases = [
        ("hf", {"fsdp": 3}, "hidden_size 136 is not divisible by mesh axis fsdp 3"),
        ("converted", {"expert": 3}, "n_routed_experts 8 is not divisible by mesh axis expert 3"),
        ("v32", {"tensor": 4}, "index_n_heads 3 is not divisible by mesh axis tensor 4"),
    ]
    for folder, sizes, says in cases:
        (count,) = sizes.values()
        layout = Layout(mesh=make_mesh(jax.devices()[:count], **sizes))

        def refused(folder=folders / folder, layout=layout, says=says) -> None:
            with pytest.raises(ValueError, match=f"^{says}$"):
                load_model(folder, layout=layout)

        assert given_bytes(refused)[1] == 0


def a_device_is_given_the_bytes_of_its_own_experts(folders: Path) -> None:
    """What a process with that device alone would read: of each matrix one expert in eight, and no other."""
    opened = open_folder(folders / "hf")
    layout = layout_of("experts")
    of_experts = [array for array in opened.arrays if array.stacked]
    assert len(of_experts) == 2 * 2 * 3  # codes and scales, of the MoE layer and the module's
    for array in of_experts:
        place = weight_sharding(layout, array.shape, ("expert", "expert_embed", "expert_mlp"), array.key)
        for device, index in place.devices_indices_map(array.shape).items():
            name = array.tensors[device.id].name
            got, given = given_bytes(read_part, opened.source, array, index)
            assert bits(got[0]) == bits(opened.source.read(name))
            assert given == got.nbytes == opened.source.entries[name].nbytes


def of_the_whole(folder: Path) -> int:
    """Bytes of all tensors, and of the two that the MTP module's copies are compared with."""
    entries = TensorFolder(folder).entries
    compared = sum(entries[name].nbytes for name in ("model.embed_tokens.weight", "lm_head.weight"))
    return sum(entry.nbytes for entry in entries.values()) + compared


def loading_reads_every_byte_once_where_no_two_parts_alternate(folders: Path) -> None:
    """All devices being of this process, that is the whole folder."""
    for name in (None, "experts"):
        assert loaded(folders / "hf", name, jnp.float32)[1] == of_the_whole(folders / "hf")


def loading_reads_every_byte_once_on_any_mesh(folders: Path) -> None:
    given = {name: loaded(folders / "hf", name, jnp.float32)[1] for name in LAYOUTS}
    assert given == dict.fromkeys(LAYOUTS, of_the_whole(folders / "hf"))


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
    turned = sum(turned_as_read(folders, layout_of(name)) for name in ("tensor", "context", "serving"))
    assert turned > 60


def turned_as_read(folders: Path, layout: Layout) -> int:
    """How many weights are turned, each of them and the others read as they lie."""
    asked, real = {}, folder_module.read_part

    def recording(source, array, index):
        asked.setdefault((array.path, array.shape), set()).add(bounds(index, array.shape))
        return real(source, array, index)

    folder_module.read_part = recording
    try:
        weights = names.flat(load_model(folders / "hf", layout=layout).weights)
    finally:
        folder_module.read_part = real
    turned = 0
    for array in open_folder(folders / "hf").arrays:
        if array.copy_of is not None:
            continue
        if array.path[-1] == "scale":  # small ones: cut by experts alone
            ways = layout.parts("expert") if array.stacked else 1
            assert len(asked[array.path, array.shape]) == ways, array.path
            continue
        weight = weights[names.key(array.path)]
        held = by_the_table(layout, names.key(array.path), weight.ndim).devices_indices_map(weight.shape).values()
        parts = {bounds(index, weight.shape) for index in held}
        if array.transposed:
            parts = {(*part[:-2], part[-1], part[-2]) for part in parts}
            turned += 1
        assert asked[array.path, array.shape] == parts, array.path
    return turned


def bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(at.indices(length)[:2] for at, length in zip(index, shape, strict=True))


LAWS = [
    a_mesh_has_the_five_axes_in_order,
    sizes_that_do_not_multiply_to_the_devices_are_refused,
    every_weight_is_cut_by_the_table,
    a_layer_of_a_stack_is_cut_as_it_is_alone,
    a_layout_refuses_what_it_does_not_divide,
    a_layout_refuses_batches_that_it_does_not_divide,
    weights_laid_on_a_mesh_are_those_of_one_device,
    a_stacked_layout_loads_the_stacks_of_the_layers,
    a_model_in_memory_is_laid_out_as_it_would_be_loaded,
    sharded_logits_are_those_of_one_device,
    a_mesh_that_does_not_divide_is_refused_before_weights_are_read,
    a_device_is_given_the_bytes_of_its_own_experts,
    a_device_is_read_the_part_that_it_holds,
    rows_and_columns_are_read_without_their_neighbours,
    loading_reads_every_byte_once_where_no_two_parts_alternate,
    loading_reads_every_byte_once_on_any_mesh,
]


def fill(folders: Path) -> None:
    random_folder(folders / "hf", R1, shards=3)
    random_folder(folders / "v32", V32)
    convert_hf(open_folder(folders / "hf"), folders / "converted")
    config = dataclasses.replace(R1, quantization=None, num_hidden_layers=3)
    save_model(Model(config, *split(Decoder(config, rngs=nnx.Rngs(0)))), folders / "unpacked")
    export_hf(open_folder(folders / "unpacked", to="fp8"), folders / "sane")


found = fixture_of(LAWS, fill)


@pytest.mark.parametrize("law", [law.__name__ for law in LAWS])
def test_on_eight_devices(law, found):
    assert found[law] == "", found[law]


@pytest.mark.parametrize("sizes, axis", [({"rows": 1}, "rows"), ({"tensor": 1, "model": 1, "pipe": 1}, "model")])
def test_an_unknown_axis_is_refused(sizes, axis):
    with pytest.raises(ValueError, match=f"mesh: got axis '{axis}', wanted one of {', '.join(AXES)}"):
        make_mesh(**sizes)


@pytest.mark.parametrize("size", [0, -1, 1.0, True])
def test_a_size_that_is_no_whole_number_from_1_is_refused(size):
    with pytest.raises(ValueError, match=f"mesh: expert: got {size}, wanted a whole number from 1"):
        make_mesh(jax.devices()[:1], expert=size)


@pytest.mark.parametrize("words", [{"workload": "sample"}, {"transport": "all"}, {"remat": "everything"}])
def test_a_word_that_no_layout_has_is_refused(words):
    ((name, word),) = words.items()
    with pytest.raises(ValueError, match=f"^{name}: got '{word}', wanted one of [a-z_]+, [a-z_, ]+$"):
        Layout(**words)


@pytest.mark.parametrize("capacity_factor", [0.9, float("nan"), float("inf")])
def test_a_slack_below_the_balanced_share_is_refused(capacity_factor):
    with pytest.raises(ValueError, match=f"capacity_factor: got {capacity_factor}, wanted 1 or more"):
        Layout(capacity_factor=capacity_factor)


@pytest.mark.parametrize("given", [LOCAL, Layout(scan_layers=True, remat="layers"), Layout(workload="serve", lanes=4)])
def test_a_models_static_description_keeps_its_layout(given):
    graphdef, _ = abstract_weights(preset("tiny"), layout=given)
    assert module_layout(graphdef) == given


def test_a_module_without_a_layout_is_local():
    assert module_layout(nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))) == LOCAL
