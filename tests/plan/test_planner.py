"""The planner: known fits, meshes that the model takes, and laws of memory."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from deepseek_jax.config import PRESETS, preset
from deepseek_jax.plan import advice, memory, model_bytes, model_flops, planner, roofline, weights
from deepseek_jax.plan.chart import curves, write_chart
from deepseek_jax.plan.chips import CHIPS, GIB, chip
from deepseek_jax.plan.commands import commands
from deepseek_jax.plan.meshes import Sizes, meshes, weights_a_device
from deepseek_jax.plan.model_bytes import MASTERS, StateDTypes
from deepseek_jax.plan.planner import plan
from deepseek_jax.sharding import AXES, Layout, cut_numbers, misfit

R1 = preset("r1-671b")
WORKLOADS = ("serve", "train", "grpo")
GB = 10**9


def context_of(config) -> int:
    return min(4096, config.max_position_embeddings)


# --- chips ---------------------------------------------------------------------------------------


def test_chips_have_the_published_memories():
    sizes = {each.name: each.hbm_bytes for each in CHIPS}
    assert sizes == {
        "v4": 32 * GIB,
        "v5e": 16 * GB,
        "v5p": 95 * GIB,
        "v6e": 32 * GB,
        "v7x": 192 * GIB,
        "h100": 80 * GB,
        "h200": 141 * GB,
        "b200": 180 * GB,
        "gb200": 186 * GB,
        "mi300x": 192 * GB,
        "a100": 80 * GB,
        "l4": 24 * GB,
        "l40s": 48 * GB,
        "a10g": 24 * GB,
        "rtx4090": 24 * GB,
        "rtx5090": 32 * GB,
    }


@pytest.mark.parametrize(
    "name, bandwidth, bf16, eight_bits, link",
    [
        ("v4", 1.2, 275, 275, 600),
        ("v5e", 0.819, 197, 393, 400),
        ("v5p", 2.765, 459, 459, 1200),
        ("v6e", 1.638, 918, 1836, 800),
        ("v7x", 7.38, 2307, 4614, 1200),
        ("h100", 3.35, 989, 1979, 900),
        ("h200", 4.8, 989, 1979, 900),
        ("b200", 8, 2250, 4500, 1800),
        ("gb200", 8, 2500, 5000, 1800),
        ("mi300x", 5.3, 1307, 2615, 448),
        ("a100", 2.039, 312, 624, 600),
        ("l4", 0.3, 121, 242, 64),
        ("l40s", 0.864, 362, 733, 64),
        ("a10g", 0.6, 70, 140, 64),
        ("rtx4090", 1.008, 165, 330, 64),
        ("rtx5090", 1.792, 209, 419, 128),
    ],
)
def test_chips_have_the_makers_speeds(name, bandwidth, bf16, eight_bits, link):
    """TB/s of memory, dense TFLOP/s in bfloat16 and 8 bits (with float32 sums), GB/s of links, both ways.

    Of data sheets: A100 80GB SXM, L4, L40S, A10G, and the Ada and Blackwell papers for GeForce; PCIe Gen 4 or 5 x16
    where there is no faster link.
    """
    each = chip(name)
    assert (each.bandwidth / 1e12, each.bf16_flops / 1e12) == pytest.approx((bandwidth, bf16))
    assert (each.flops_8bit / 1e12, each.link_bytes_per_s / 1e9) == pytest.approx((eight_bits, link))


@pytest.mark.parametrize("each", CHIPS, ids=lambda each: each.name)
def test_a_slice_is_named_by_sides_that_make_its_chips(each):
    for chips in each.slices:
        each.check(chips)
        name = each.slice_name(chips)
        assert math.prod(int(side) for side in name.replace(" ", "").split("x")) == chips
    assert chip(each.name.upper()) is each


@pytest.mark.parametrize(
    "spelled, name",
    [
        ("TPU v5e", "v5e"),
        ("tpu-v5p", "v5p"),
        ("Ironwood", "v7x"),
        ("tpu7x", "v7x"),
        ("NVL72", "gb200"),
        ("A100-80GB", "a100"),
        ("RTX 4090", "rtx4090"),
    ],
)
def test_a_chip_has_more_names_than_one(spelled, name):
    assert chip(spelled).name == name


def test_a_byte_takes_as_long_as_its_slowest_link():
    """On two hosts of eight H200 with 450 GB/s between GPUs and 50 GB/s between hosts, each way."""
    h200 = chip("h200")
    inside = h200.seconds_a_byte(8, 8)
    assert inside == h200.seconds_a_byte(1, 1) == pytest.approx(1 / 450e9)
    # of a gather every host takes in the other's half once, eight GPUs sharing the work: 1 of a ring's 15 parts
    assert h200.seconds_a_byte(16, 8) == pytest.approx(max(14 / 15 / 450e9, 1 / 15 / 50e9))
    # of an exchange each GPU has something for each of the eight there
    assert h200.seconds_a_byte(16, 8, exchange=True) == pytest.approx(8 / 15 / 50e9)
    # where no two of a group are on one host all goes over the network
    for exchange in (False, True):
        assert h200.seconds_a_byte(4, 1, exchange=exchange) == pytest.approx(1 / 50e9)
    # a v7x is two devices, which share its links
    assert chip("v7x").seconds_a_byte(128, 128) == pytest.approx(2 / 600e9)


def test_an_axis_is_slow_as_far_as_it_leaves_an_island():
    """Eight GPUs an island, the last axes within it."""
    h100 = chip("h100")
    sizes = Sizes(fsdp=4, expert=4, tensor=4)
    one = lambda *axes, **how: roofline.seconds_a_byte(h100, sizes, *axes, **how) * roofline.ASSUMED["link"]
    assert one("tensor") == pytest.approx(1 / 450e9)
    assert one("expert", exchange=True) == pytest.approx(h100.seconds_a_byte(4, 2, exchange=True))
    assert one("expert", "tensor") == pytest.approx(h100.seconds_a_byte(16, 8))
    assert one("fsdp") == pytest.approx(h100.seconds_a_byte(4, 1))
    assert roofline.seconds_a_byte(chip("v5p"), sizes, "fsdp") == roofline.seconds_a_byte(chip("v5p"), sizes, "tensor")


# --- known fits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, chips, fits, tight",
    [
        ("h100", 8, False, True),
        ("h200", 8, True, False),
        ("h100", 16, True, False),
        ("v5e", 64, True, False),
        ("v6e", 32, True, False),
        ("v5p", 8, True, True),
        ("v7x", 4, True, True),
    ],
)
def test_where_r1_in_fp8_fits(name, chips, fits, tight):
    found = plan("r1", R1, chip(name), chips=chips, dtype="fp8")
    assert (found.fits, found.tight) == (fits, tight)
    assert planner.weights_share(R1, chip(name), chips, "fp8") == pytest.approx(
        673_150_611_808 / (chips * chip(name).hbm_bytes), rel=1e-12
    )
    assert (found.memory.total <= 0.9 * found.hbm) is fits
    # experts over all devices, the rest over `tensor`; beside that replicas of what nothing cuts: routers, norms
    routed = weights.weight_bytes_by_kind(R1, "fp8")["routed_experts"]
    spread = routed / (chips * chip(name).devices) + (673_150_611_808 - routed) / found.mesh["tensor"]
    assert 0 <= found.memory.weights / spread - 1 < 0.08


@pytest.mark.parametrize("name, chips", [("h100", 16), ("h200", 8), ("v5e", 64), ("v6e", 32), ("v5p", 8), ("v7x", 4)])
def test_the_smallest_slice_that_fits_is_found(name, chips):
    found = plan("r1", R1, chip(name), dtype="fp8")
    assert (found.chips, found.fits, found.dtype) == (chips, True, "fp8")
    smaller = chip(name).slices[chip(name).slices.index(chips) - 1]
    assert not plan("r1", R1, chip(name), chips=smaller, dtype="fp8").fits
    assert plan("r1", R1, chip(name)).dtype == "bf16"  # what programs compute in, whatever the files are in


def test_training_r1_wants_a_pod():
    found = plan("r1", R1, chip("v5p"), workload="train")
    assert found.fits and 64 <= found.chips <= 512
    state = model_bytes.train_state_bytes(R1)
    held = found.memory.weights + found.memory.optimizer
    assert 1 <= held * found.chips / (state.weights + state.moments) < 2  # what no axis cuts is held more than once
    half = plan("r1", R1, chip("v5p"), workload="train", moments="bfloat16", chips=found.chips)
    for each, times in ((found, 2), (half, 1)):  # two moments a float32 weight, on whatever mesh
        assert each.memory.optimizer == pytest.approx(times * each.memory.weights, rel=1e-4)
    assert half.moments == "bfloat16"
    assert not plan("r1", R1, chip("v5e"), workload="train").fits


# --- every plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_model_has_a_plan_on_every_chip(name, workload):
    config = preset(name)
    for each in CHIPS:
        found = plan(name, config, each, workload=workload, context=context_of(config))
        assert found.fits == (found.memory.total <= found.limit)
        assert all(size >= 0 for size in dataclasses.astuple(found.memory)) and found.memory.weights > 0
        assert 0 < found.tokens_per_second < math.inf and found.seconds.longest == max(found.seconds)
        assert found.bound in ("compute", "memory", "collective")
        kept = {"train": found.mesh}
        if workload != "train":
            kept["serve"] = found.rollout_mesh if workload == "grpo" else found.mesh
        if workload == "serve":
            del kept["train"]
        for kind, sizes in kept.items():
            assert math.prod(sizes.values()) == found.chips * each.devices
            mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
            Layout(mesh=mesh, workload=kind).check(config)  # the model's own refusal of what does not divide
        if workload != "serve":
            mesh = AbstractMesh(tuple(found.mesh[axis] for axis in AXES), AXES)
            Layout(mesh=mesh, workload="train").check_batch(found.batch, found.context)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"chips": 3}, "chips: got 3, wanted for v5e one of 1, 4, 8, 16, 32, 64, 128, 256"),
        ({"chips": 512}, "chips: got 512"),
        ({"workload": "sing"}, "workload: got 'sing', wanted one of serve, train, grpo"),
        ({"context": 0}, "context: got 0, wanted 1 to 163840"),
        ({"context": 10**6}, "context: got 1000000"),
        ({"batch": 0}, "batch: got 0, wanted at least 1"),
        ({"dtype": "fp4"}, "dtype: got 'fp4'"),
        ({"dtype": "fp8", "workload": "train"}, "quantized weights are only served"),
        ({"kv_cache_dtype": "fp8", "workload": "grpo"}, "kv_cache_dtype: got 'fp8' to grpo, wanted bf16"),
        ({"kv_cache_dtype": "int4"}, "dtype: got 'int4', wanted one of f32, bf16, fp8, int8"),
        ({"batch": 3, "chips": 256, "workload": "train"}, "no mesh of v5e x 256 divides context 4096 and batch 3"),
    ],
)
def test_a_wrong_number_is_refused(change, says):
    with pytest.raises(ValueError, match=says) as refusal:
        plan("r1", R1, chip("v5e"), **change)
    assert "\n" not in str(refusal.value)


def test_a_cache_of_codes_leaves_room_for_more_sequences():
    """On one mesh it is 768 / 1280 of the bytes, as TPUs lay out R1's; and the commands say so."""
    given = dict(chips=64, batch=512, context=4096)
    exact, codes = (plan("r1", R1, chip("v5p"), kv_cache_dtype=dtype, **given) for dtype in ("bf16", "fp8"))
    assert codes.mesh == exact.mesh and codes.memory.cache * 1280 == exact.memory.cache * 768
    assert codes.seconds.memory < exact.seconds.memory
    known = commands(codes, "r1-671b")
    assert "--prompt TEXT --kv-cache-dtype fp8 --serve-expert" in known.run
    assert known.compile.endswith("--kv-cache-dtype fp8") and not known.missing


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match="chip: got 'v9', wanted one of v4, v5e, v5p, v6e, v7x, h100"):
        chip("v9")
    with pytest.raises(ValueError, match="chips: got 12, wanted for h100 .* or a multiple of 8"):
        plan("r1", R1, chip("h100"), chips=12)


# --- laws ----------------------------------------------------------------------------------------

models = st.sampled_from(list(PRESETS))


@given(models, st.sampled_from(["bf16", "fp8", "int4"]), st.integers(1, 300), st.integers(1, 200), st.integers(1, 50))
def test_serving_memory_grows_with_batch_and_context(name, dtype, batch, context, more):
    config = preset(name)
    for sizes in meshes(config, "serve", 8):
        total = lambda batch, context, sizes=sizes: memory.serve_memory(config, dtype, sizes, batch, context).total
        assert total(batch, context) <= total(batch + more, context)
        assert total(batch, context) <= total(batch, context + more)


@given(models, st.integers(0, 6), st.integers(3, 8))
def test_training_memory_grows_with_batch_and_context(name, doublings, context):
    config = preset(name)
    for sizes in meshes(config, "train", 8):
        total = lambda batch, length, sizes=sizes: memory.train_memory(config, MASTERS, sizes, batch, length).total
        batch, length = 8 << doublings, 1 << context
        assert total(batch, length) <= total(2 * batch, length)
        assert total(batch, length) <= total(batch, 2 * length)


@pytest.mark.parametrize("workload", WORKLOADS[:2])
@pytest.mark.parametrize(
    "name", ["r1-671b", "v3.2-671b", "kimi-k2", "v2-lite", "distill-qwen3-8b", "distill-llama-70b"]
)
def test_more_chips_never_need_more_memory_each(name, workload):
    config, batch, length = preset(name), 512, 4096

    def least(devices):
        of, kept = (memory.serve_memory, "bf16") if workload == "serve" else (memory.train_memory, MASTERS)
        found = meshes(config, workload, devices)
        return min(of(config, kept, sizes, batch, length).total for sizes in found)

    needed = [least(1 << power) for power in range(8)]
    assert needed == sorted(needed, reverse=True)
    assert needed[-1] < needed[0] / 2


@given(models, st.sampled_from(WORKLOADS[:2]), st.integers(0, 8))
def test_a_meshs_parts_hold_the_whole_model(name, workload, power):
    """No mesh loses a weight: all devices together hold at least the model."""
    config, dtype = preset(name), "bf16"
    whole = weights.weight_bytes(config, dtype, mtp=workload == "train")
    for sizes in meshes(config, workload, 1 << power):
        a_device = weights_a_device(config, dtype, workload, sizes)
        assert whole <= a_device * math.prod(sizes) and a_device <= whole
    assert weights_a_device(config, dtype, workload, Sizes()) == whole


axes = st.sampled_from([1, 2, 3, 4, 7, 8, 16, 64])


@given(models, st.sampled_from(WORKLOADS[:2]), st.builds(Sizes, *(axes,) * 5))
def test_a_mesh_that_divides_a_models_numbers_divides_its_weights(name, workload, sizes):
    """And one that does not divides some weight of it, or its heads, not either."""
    config = preset(name)
    cut = [
        (size, sizes.parts(workload, axis))
        for weight in weights.weights(config)
        for size, axis in zip(weight.shape, weight.axes, strict=True)
        if axis is not None
    ]
    heads = [(number, sizes.parts(workload, axis)) for _, number, axis in cut_numbers(config) if "heads" in axis]
    divides = not any(size % parts for size, parts in cut + heads) and (config.moe is not None or sizes.expert == 1)
    assert (misfit(config, workload, sizes._asdict()) is None) == divides


def test_pieces_of_a_layer_by_hand():
    """One sequence of 1024 tokens of R1 on one device of a mesh with 8-way tensor parallelism, forward."""
    found = memory.layer_activations(R1, 1024, 1024, Sizes(tensor=8), "serve")
    assert found == {
        "attention": 2 * 1024 * 16 * (192 + 128) * 2,
        "scores": 2 * 4 * 16 * 128 * 128,  # eight tiles along the sequence
        "experts": math.ceil(2 * 1.1 * 1024 * 8 / 8 * (2 * 7168 + 3 * 2048)),
        "dense": 2 * 1024 * 3 * 18432 // 8,
        "states": 2 * 3 * 1024 * 7168,
    }
    backward = memory.layer_activations(R1, 1024, 1024, Sizes(tensor=8), "train")
    rows = 1.1 * 1024 * 8  # with their whole states, and a part of every expert
    twice = {kind: 2 * size for kind, size in found.items()} | {"experts": math.ceil(4 * rows * (2 * 7168 + 3 * 256))}
    assert backward == twice


@pytest.mark.parametrize(
    "name, step, kind, used, sizes, batch",
    [
        ("r1-671b", "grpo", "tpu", 89.1, Sizes(expert=64, fsdp=8), 512),
        ("r1-671b", "train", "tpu", 94.5, Sizes(expert=64, fsdp=8), 512),
        ("v2-lite", "grpo", "tpu", 26.3, Sizes(expert=4, fsdp=4), 16),
        ("r1-671b", "grpo", "gpu", 143.9, Sizes(expert=16, fsdp=8), 128),
        ("r1-671b", "grpo", "gpu", 117.2, Sizes(fsdp=4, expert=4, context=4, tensor=2), 64),
        ("r1-671b", "grpo", "gpu", 132.2, Sizes(fsdp=2, expert=8, context=8), 128),
        ("r1-671b", "train", "gpu", 156.1, Sizes(expert=16, context=8), 128),
        ("v2-lite", "grpo", "gpu", 43.3, Sizes(expert=4, fsdp=2), 8),
        ("distill-qwen-1.5b", "train", "gpu", 28.3, Sizes(), 1),
        ("distill-qwen-1.5b", "grpo", "gpu", 28.2, Sizes(), 1),
        ("distill-qwen-7b", "grpo", "gpu", 32.5, Sizes(fsdp=2, tensor=2), 2),
        ("v2-lite", "train", "gpu", 73.8, Sizes(expert=2, fsdp=2), 4),
        ("v2-lite", "train", "gpu", 51.3, Sizes(expert=8), 8),
        ("distill-llama-8b", "train", "gpu", 65.5, Sizes(tensor=2), 1),
        ("distill-qwen-14b", "grpo", "gpu", 34.1, Sizes(fsdp=4, tensor=2), 4),
        ("distill-qwen-32b", "train", "gpu", 72.0, Sizes(fsdp=4, tensor=2), 4),
    ],
)
def test_what_an_update_holds_is_what_the_compiler_says(name, step, kind, used, sizes, batch):
    """Gigabytes of both compilers: float32 weights and moments, computed in bfloat16, 4,096 tokens; within 5 %."""
    modules = step == "train"
    found = memory.train_memory(preset(name), MASTERS, sizes, batch, 4096, kind=kind, modules=modules).total
    assert found == pytest.approx(used * GB, rel=0.05)


@pytest.mark.parametrize(
    "name, kind, used, sizes, rollout",
    [
        ("v2-lite", "gpu", 23.4, Sizes(expert=4, fsdp=2), Sizes(tensor=8)),
        ("distill-qwen-7b", "gpu", 19.0, Sizes(fsdp=2, tensor=2), Sizes(tensor=4)),
        ("distill-qwen-32b", "gpu", 42.7, Sizes(fsdp=4, tensor=2), Sizes(tensor=8)),
        ("v2-lite", "tpu", 9.4, Sizes(expert=4, fsdp=4), Sizes(tensor=16)),
        ("r1-671b", "tpu", 27.2, Sizes(expert=64, fsdp=8), Sizes(data=2, expert=16, tensor=16)),
        ("r1-671b", "gpu", 69.7, Sizes(expert=16, fsdp=8), Sizes(expert=8, tensor=16)),
    ],
)
def test_what_a_transfer_holds_is_what_the_compiler_says(name, kind, used, sizes, rollout):
    """Within 5 %, as for updates."""
    found = memory.transfer_memory(preset(name), MASTERS, sizes, rollout, kind=kind).total
    assert found == pytest.approx(used * GB, rel=0.05)


@pytest.mark.parametrize(
    "name, used, sizes, batch, prompts",
    [
        ("r1-671b", 117.6, Sizes(expert=16), 16, True),
        ("r1-671b", 76.8, Sizes(expert=32), 32, True),
        ("distill-qwen-7b", 16.1, Sizes(), 1, True),
        ("r1-671b", 86.5, Sizes(tensor=16), 128, False),
        ("v2-lite", 39.9, Sizes(), 64, False),
        ("distill-llama-70b", 28.7, Sizes(tensor=8), 64, False),
    ],
)
def test_what_serving_holds_on_gpus_is_what_the_compiler_says(name, used, sizes, batch, prompts):
    """Whole prompts of 4,096 tokens, and decoding over as many; within 5 %."""
    of = memory.prefill_memory if prompts else memory.serve_memory
    assert of(preset(name), "bf16", sizes, batch, 4096).total == pytest.approx(used * GB, rel=0.05)


def test_speed_is_bound_by_the_slowest():
    found = plan("r1", R1, chip("v5p"), chips=64, batch=512)
    assert getattr(found.seconds, found.bound) == found.seconds.longest
    assert found.tokens_per_second == pytest.approx(512 / found.seconds.longest, rel=1e-12)
    flops = model_flops.decode_flops(R1, 512, 4096).total
    assert found.seconds.compute == pytest.approx(flops / (64 * 459e12 * 0.5), rel=1e-12)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_grpo_keeps_masters_moments_and_reference_through_every_phase(moments):
    """By hand, of a model whose every matrix is cut by the mesh; what it takes is the fullest phase."""
    config = preset("distill-qwen-7b")
    found = plan("7b", config, chip("h100"), workload="grpo", chips=8, moments=moments)
    phases = found.phases
    assert list(phases) == ["transfer", "rollout", "scoring", "update"]
    assert found.memory.total == max(of.total for of in phases.values())
    state = memory.state_of("bf16", moments)
    assert phases == memory.grpo_memory(
        config, state, Sizes(**found.mesh), Sizes(**found.rollout_mesh), found.batch, found.context, kind="gpu"
    )
    weights = weights_a_device(config, "f32", "train", Sizes(**found.mesh))
    for of in phases.values():
        assert (of.weights, of.reference) == (weights, weights // 2)
        assert of.optimizer == weights * (2 if moments == "float32" else 1)
    update, rollout, transfer = phases["update"], phases["rollout"], phases["transfer"]
    assert rollout.serving == transfer.serving == weights_a_device(config, "bf16", "serve", Sizes(**found.rollout_mesh))
    assert rollout.gradient == 0 < rollout.cache and update.cache == update.serving == 0 < update.gradient
    assert phases["scoring"].total < update.total


def test_a_modules_state_is_kept_where_it_does_not_run():
    """R1's GRPO update: weights and moments of the module, but no activations of it; samples are drawn without it."""
    sizes = Sizes(expert=64, fsdp=8)
    ran, idle = (memory.train_memory(R1, MASTERS, sizes, 512, 4096, modules=of) for of in (True, False))
    assert (ran.weights, ran.optimizer) == (idle.weights, idle.optimizer)
    assert ran.activations - idle.activations == 4096 * (7168 + 128 * 128) * 2
    # its layer lies outside the loop over layers, and embedding and head have a gradient of it too
    layer, tables = memory.gathered_to_train(R1, sizes, 2)
    assert ran.workspace - idle.workspace == layer + tables / 2
    without = dataclasses.replace(R1, num_nextn_predict_layers=0)
    given = MASTERS, sizes, Sizes(expert=32, tensor=16)
    with_module, plain = memory.transfer_memory(R1, *given), memory.transfer_memory(without, *given)
    assert (with_module.serving, with_module.workspace) == (plain.serving, plain.workspace)
    assert with_module.weights > plain.weights


def test_micro_batches_hold_one_part_and_a_float32_sum():
    """33.1 GB of XLA:GPU: distill-qwen-1.5b on one device, two sequences of 4,096 tokens one after another."""
    config = preset("distill-qwen-1.5b")
    parts = memory.train_memory(config, MASTERS, Sizes(), 2, 4096, kind="gpu", micro_batches=2)
    one = memory.train_memory(config, MASTERS, Sizes(), 1, 4096, kind="gpu")
    assert parts.total == pytest.approx(33.1 * GB, rel=0.05)
    assert parts.gradient == parts.weights > 2 * one.gradient


def test_computing_in_float32_makes_no_copy():
    whole = memory.train_memory(R1, StateDTypes(compute="f32"), Sizes(expert=64, fsdp=8), 512, 4096)
    half = memory.train_memory(R1, MASTERS, Sizes(expert=64, fsdp=8), 512, 4096)
    assert whole.computed == 0 < half.computed == half.gradient == whole.gradient / 2
    assert (whole.weights, whole.optimizer) == (half.weights, half.optimizer)


# --- a given memory ------------------------------------------------------------------------------


def test_what_24_gb_hold():
    found = {each.model: each for each in advice.advise_all(24 * GB, context=4096)}
    assert (
        found["distill-qwen-7b"].dtype == found["distill-llama-8b"].dtype == found["distill-qwen3-8b"].dtype == "bf16"
    )
    assert found["distill-qwen-14b"].dtype == "fp8"
    assert found["distill-qwen-32b"].dtype == "int4"
    assert not found.keys() & {"r1-671b", "v3.2-671b", "kimi-k2", "distill-llama-70b", "tiny"}
    assert advice.advise_all(10**9, context=4096) == []


@pytest.mark.parametrize("name, gigabytes", [("distill-qwen-7b", 24), ("distill-qwen-32b", 80), ("v2-lite", 40)])
def test_the_longest_context_is_the_longest(name, gigabytes):
    config = preset(name)
    found = advice.advise(name, config, "bf16", gigabytes * GB, context=64)
    needs = lambda length: memory.serve_memory(config, "bf16", Sizes(), 1, length).total
    assert found.fits and needs(found.context) <= 0.9 * gigabytes * GB
    assert found.context == config.max_position_embeddings or needs(found.context + 1) > 0.9 * gigabytes * GB


def test_what_is_too_large_is_told_in_devices():
    found = advice.advise("r1", R1, "fp8", 80 * GB, context=4096)
    assert (found.fits, found.context, found.devices) == (False, 0, 16)


def test_the_guides_rules():
    names = {name: advice.rule_of_thumb(preset(name)) for name in PRESETS}
    assert names["distill-qwen-1.5b"] == "4 GB" and names["distill-qwen-7b"] == "8-16 GB"
    assert names["distill-qwen-32b"] == "24-48 GB" and names["distill-llama-70b"] == "48 GB"
    assert names["r1-671b"] == "400-480 GB in 4 bits" and names["kimi-k2"] is None and names["distill-qwen-14b"] is None
    assert [advice.thumb_tensor_parallel(n * GB) for n in (4, 24, 80, 192, 640)] == [1, 1, 3, 8, 8]
    # the arithmetic bears the guide out where it speaks of 4 bits
    assert 340 * GB < weights.weight_bytes(R1, "int4") < 400 * GB


# --- chart ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", WORKLOADS)
def test_curves_rise_and_pass_the_plan(workload, tmp_path):
    config, each = preset("distill-qwen-7b"), chip("h100")
    found = plan("7b", config, each, workload=workload, context=4096)
    drawn = curves(found, config, each)
    assert found.batch in drawn and list(drawn) == sorted(drawn)
    for totals in drawn.values():
        assert totals == sorted(totals) and totals[0] > found.memory.weights
    # 131072 / 32 = 4096 is one of the points
    assert drawn[found.batch][-6] == found.memory.total
    write_chart(tmp_path / "memory.png", found, config, each)
    assert (tmp_path / "memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_page_asks_the_network_for_nothing(tmp_path):
    config, each = preset("v2-lite"), chip("v5e")
    found = plan("<v2>", config, each)
    write_chart(tmp_path / "memory.html", found, config, each)
    page = (tmp_path / "memory.html").read_text()
    assert "&lt;v2&gt;" in page and "<v2>" not in page and "data:image/png;base64,iVBOR" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    with pytest.raises(ValueError, match="wanted a name that ends in .png or .html"):
        write_chart(tmp_path / "memory.gif", found, config, each)
