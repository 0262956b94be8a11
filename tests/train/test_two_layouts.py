"""GRPO that trains in one layout and samples in another, on eight devices: the same as on one, and what it moves."""

import dataclasses
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.config import ModelConfig, preset
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.data.examples import Prompt
from deepseek_jax.generation.generator import Generator
from deepseek_jax.model.decoder import abstract_weights
from deepseek_jax.model.layers import RouterBias
from deepseek_jax.model.scan_layers import members, stack_layers
from deepseek_jax.model.transfer import Transfer, sampled_config, serving_layout, serving_sizes
from deepseek_jax.parallel.reshard import reshard
from deepseek_jax.plan.communication import reshard_lower_bound
from deepseek_jax.plan.cost_analysis import cost_analysis
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rl.loss import GRPOLossConfig
from deepseek_jax.sharding import LOCAL, Layout, make_mesh
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.grpo import GRPOTrainer
from deepseek_jax.train.grpo_config import GRPOConfig
from tests.laws import fixture_of
from tests.test_sharded_steps import CONFIGS, laid

TOKENIZER = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
SMALL = GRPOConfig(
    steps=4,
    prompts_per_step=4,
    group_size=4,
    max_new_tokens=8,
    lr=1e-3,
    warmup=1,
    loss=GRPOLossConfig(beta=0.1),
)
# kind of model, how it is trained, and how it is sampled: sizes of meshes and what else is set
LAYOUTS = {
    "heads": ("mla", {"fsdp": 4, "expert": 2}, {"scan_layers": True, "remat": "layers"}, {"expert": 1, "tensor": 4}),
    "experts": ("mla", {"fsdp": 4, "expert": 2}, {}, {"expert": 4, "tensor": 2}),
    "apart": (
        "sparse",
        {"expert": 4, "context": 2},
        {"scan_layers": True},
        {"expert": 2, "tensor": 2, "unrolled": True},
    ),
    "dense": ("gqa", {"fsdp": 8}, {"scan_layers": True}, {"tensor": 4}),
    "chosen": ("gqa", {"data": 2, "fsdp": 2, "tensor": 2}, {}, {}),
}
# Beside one device's: of log-probs, and of Adam's moments after an update, whose gradient is clipped to norm 1.
LOGPROBS, MOMENTS = 2e-5, 2e-5


def config_of(kind: str) -> ModelConfig:
    return dataclasses.replace(CONFIGS[kind], max_position_embeddings=64)


def digits(prompts, completions, completion_ids, **columns):
    return [sum(ch.isdigit() for ch in c) / (1 + len(i)) for c, i in zip(completions, completion_ids, strict=True)]


def prompts(count: int = 4) -> list[Prompt]:
    tokens = lambda text: TOKENIZER.chat([{"role": "user", "content": text}])
    return [Prompt(t, tokens(t), {}) for t in (f"{n}+{n + 1}=?" for n in range(count))]


def layouts(name: str) -> tuple[str, Layout, Layout]:
    kind, sizes, further, serve = LAYOUTS[name]
    train = Layout(mesh=make_mesh(**sizes), **further)
    return kind, train, serving_layout(config_of(kind), train, **serve)


def trainer(kind: str, train: Layout = LOCAL, serve: Layout = LOCAL, **changes) -> GRPOTrainer:
    graphdef, weights = laid(kind, train)
    config = sampled_config(config_of(kind))
    generator = Generator(config, abstract_weights(config, layout=serve)[0])
    return GRPOTrainer(
        dataclasses.replace(SMALL, **changes),
        Model(config_of(kind), graphdef, weights),
        TOKENIZER,
        generator,
        combine({"digits": digits}, {"digits": 1.0}),
        width=32,
        seed=3,
    )


def by_layer(weights: nnx.State, config: ModelConfig) -> dict[tuple, np.ndarray]:
    found = {}
    for path, leaf in nnx.to_flat_state(weights):
        value = np.asarray(leaf.get_raw_value())
        parts = value if path[0] == "stacks" else [value]
        found |= dict(zip(members(path, config), parts, strict=True))
    return found


def assert_same_update(got: GRPOTrainer, wanted: GRPOTrainer) -> None:
    config = got.model.config
    states = [of.first_state() for of in (got, wanted)]
    # a reference far away, that its share of the gradient is seen
    apart = [state._replace(reference=jax.tree.map(lambda w: 1.1 * w, state.reference)) for state in states]
    one, other = (of.step(state, prompts, 0) for of, state in zip((got, wanted), apart, strict=True))
    assert len({tuple(c.tokens) for c in other.rollout.completions}) > 4
    for mine, theirs in zip(one.rollout.completions, other.rollout.completions, strict=True):
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, rtol=0, atol=LOGPROBS)
    moments = [by_layer(learned.state.train.moments[1][0].mu, config) for learned in (one, other)]
    assert max(np.abs(m).max() for m in moments[1].values()) > 1e-3
    for path, value in moments[1].items():
        np.testing.assert_allclose(moments[0][path], value, rtol=0, atol=MOMENTS, err_msg=str(path))
    assert abs(other.metrics["kl"]) > 1e-3 and other.metrics["grad_norm"] > 0.1
    for name in ("loss", "kl", "grad_norm", "entropy", "reward", "sampling/sampling_logp_difference/max"):
        assert one.metrics[name] == pytest.approx(other.metrics[name], rel=1e-4, abs=2e-5), name


@contextmanager
def copies_gone_before_updates(of: GRPOTrainer) -> Iterator[None]:
    """Checks that nothing holds the sampler's copy of the weights once a rollout is over."""
    copies, gone = [], []
    transfer, learn = of._to_sampler, of.learn

    def noted(weights):
        moved = transfer(weights)
        copies.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(moved))
        return moved

    def looked_at(*arguments):
        gone.extend(ref() is None for ref in copies)
        return learn(*arguments)

    of._to_sampler, of.learn = noted, looked_at
    yield
    assert gone and all(gone)


# --- laws in a process with eight devices ----------------------------------------------------------


def a_step_in_two_layouts_is_that_of_one_device():
    kind, train, serve = layouts("dense")
    of = trainer(kind, train, serve)
    with copies_gone_before_updates(of):
        assert_same_update(of, trainer(kind))


def a_step_in_any_two_layouts_is_that_of_one_device():
    for name in LAYOUTS:
        kind, train, serve = layouts(name)
        assert_same_update(trainer(kind, train, serve, updates_per_rollout=2), trainer(kind, updates_per_rollout=2))


def an_adapter_goes_along():
    """Beside its frozen weights, from stacks to single layers; what it has learnt is in the next rollout."""
    kind, train, serve = layouts("apart")
    got, wanted = (trainer(*of, lora_rank=4, lr=1e-2) for of in ((kind, train, serve), (kind,)))
    first = [of.step(of.first_state(), prompts, 0).state for of in (got, wanted)]
    assert max(float(jnp.abs(b).max()) for b in jax.tree.leaves(first[1].train.weights)) > 1e-3
    moved, masters = (by_layer(of, got.model.config) for of in (got.policy(first[0]), got._computed(first[0].train)))
    assert any(path[-1] == "b" for path in moved) and not any(path[0] == "mtp" for path in moved)
    for path, value in moved.items():
        np.testing.assert_array_equal(value, masters[path], err_msg=str(path))
    one, other = (of.step(state, prompts, 1) for of, state in zip((got, wanted), first, strict=True))
    for mine, theirs in zip(one.rollout.completions, other.rollout.completions, strict=True):
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, rtol=0, atol=1e-3)


@contextmanager
def compilations() -> Iterator[list[str]]:
    found: list[str] = []
    listen = lambda event, seconds, **_: found.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def nothing_is_compiled_after_the_first_step():
    kind, train, serve = layouts("heads")
    of = trainer(kind, train, serve, dtype="bfloat16")
    with compilations() as first:
        state = of.step(of.first_state(), prompts, 0).state
    with compilations() as later:
        for number in (1, 2):
            state = of.step(state, prompts, number).state
    assert first and not later


def weights_arrive_as_they_are():
    """Bit for bit the cast of the masters, where the sampler's layout has them, from stacks and from single layers."""
    for name in LAYOUTS:
        kind, train, serve = layouts(name)
        _, weights = laid(kind, train)
        config = sampled_config(CONFIGS[kind])
        for dtype in (jnp.float32, jnp.bfloat16):
            moved = Transfer(config, train, serve, dtype)(weights)
            _, like = abstract_weights(config, dtype, serve)
            assert jax.tree.structure(moved) == jax.tree.structure(like), name
            for path, leaf in nnx.to_flat_state(moved):
                value, want = leaf.get_raw_value(), dict(nnx.to_flat_state(like))[path].get_raw_value()
                assert value.sharding.is_equivalent_to(want.sharding, value.ndim), path
                assert value.dtype == (jnp.float32 if isinstance(leaf, RouterBias) else dtype), path
            masters = by_layer(weights, CONFIGS[kind])
            for path, value in by_layer(moved, config).items():
                np.testing.assert_array_equal(value, masters[path].astype(value.dtype), err_msg=str(path))


def single_layers_become_stacks():
    train = Layout(mesh=make_mesh(fsdp=8))
    serve = dataclasses.replace(train.serving(data=2, tensor=4), scan_layers=True)
    moved = Transfer(CONFIGS["gqa"], train, serve, jnp.dtype(jnp.float32))(laid("gqa", train)[1])
    wanted = stack_layers(laid("gqa", train)[1], CONFIGS["gqa"], serve)
    for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def an_array_lies_as_it_is_asked_to(times: int = 6):
    """From any sharding to any other of meshes of any shape, whose axes may have no finer mesh in common."""
    rng = np.random.default_rng(0)
    shapes = [(8,), (2, 4), (4, 2), (2, 2, 2), (1, 8)]
    x = np.arange(16 * 32 * 24, dtype=np.float32).reshape(16, 32, 24)

    def drawn() -> NamedSharding:
        shape = shapes[rng.integers(len(shapes))]
        names = tuple("abc"[: len(shape)])
        spec: list[tuple[str, ...]] = [(), (), ()]
        for name in rng.permutation(names):
            if (dim := rng.integers(4)) < 3:
                spec[dim] += (str(name),)
        mesh = Mesh(np.asarray(jax.devices()).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))
        return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))

    for _ in range(times):
        of, to = drawn(), drawn()
        moved = jax.jit(lambda x, of=of, to=to: reshard(x, of, to), out_shardings=to)(jax.device_put(x, of))
        np.testing.assert_array_equal(moved, x)
        assert moved.sharding.is_equivalent_to(to, x.ndim)


def what_is_moved_is_what_arithmetic_says():
    for kind, sizes, serve, times in (
        ("gqa", {"fsdp": 8}, {"data": 8}, 1.0),  # a gather
        ("mla", {"fsdp": 8}, {"data": 8}, 1.0),
        ("gqa", {"tensor": 8}, {"tensor": 8}, 0.0),  # lies there already
        ("gqa", {"fsdp": 2, "tensor": 4}, {"data": 2, "tensor": 4}, 1.0),
        ("mla", {"fsdp": 4, "expert": 2}, {"expert": 2, "tensor": 4}, None),
        ("mla", {"fsdp": 2, "expert": 2, "tensor": 2}, {"tensor": 8}, None),
        ("sparse", {"expert": 4, "context": 2}, {"data": 2, "expert": 2, "tensor": 2}, None),
        ("gqa", {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}, None),
    ):
        train = Layout(mesh=make_mesh(**sizes), scan_layers=True)
        to, config = train.serving(**serve), sampled_config(CONFIGS[kind])
        transfer = Transfer(config, train, to, jnp.dtype(jnp.float32))
        like = abstract_weights(CONFIGS[kind], layout=train)[1]
        compiled = transfer.program(like).lower(like).compile()
        sent = sum(of.bytes for of in cost_analysis(compiled.as_text(), train.mesh.shape).collectives)
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes <= 4 * (memory.argument_size_in_bytes + memory.output_size_in_bytes)
        least = reshard_lower_bound(config, train, to, jnp.dtype(jnp.float32))
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(laid(kind, LOCAL)[1]))
        assert (least > held / 100) == (times != 0), (kind, serve)
        print(
            f"{kind} {sizes} to {serve}: sends {sent} bytes a device, {sent / max(least, 1):.2f} of the least",
            file=sys.stderr,
        )
        if times is None:  # XLA goes by way of more than one collective
            assert least <= sent <= 2.5 * least, (kind, serve, sent / least)
        else:
            assert sent == pytest.approx(times * least, rel=1e-6), (kind, serve)


def an_array_lies_as_it_is_asked_to_many_times():
    an_array_lies_as_it_is_asked_to(30)


QUICK = [
    a_step_in_two_layouts_is_that_of_one_device,
    an_array_lies_as_it_is_asked_to,
    single_layers_become_stacks,
]
THOROUGH = [
    an_array_lies_as_it_is_asked_to_many_times,
    a_step_in_any_two_layouts_is_that_of_one_device,
    an_adapter_goes_along,
    nothing_is_compiled_after_the_first_step,
    weights_arrive_as_they_are,
    what_is_moved_is_what_arithmetic_says,
]


quick = fixture_of(QUICK)


@pytest.mark.parametrize("law", [law.__name__ for law in QUICK])
def test_on_eight_devices(law, quick):
    assert quick[law] == "", quick[law]


thorough = fixture_of(THOROUGH)


@pytest.mark.slow
@pytest.mark.parametrize("law", [law.__name__ for law in THOROUGH])
def test_on_eight_devices_at_length(law, thorough):
    assert thorough[law] == "", thorough[law]


# --- what a model is sampled on --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices", "given", "wanted"),
    [
        ("r1-671b", 512, {}, {"data": 2, "expert": 16, "tensor": 16}),
        ("r1-671b", 64, {}, {"data": 1, "expert": 4, "tensor": 16}),
        ("r1-671b", 64, {"tensor": 1}, {"data": 1, "expert": 64, "tensor": 1}),
        ("r1-671b", 64, {"expert": 8}, {"data": 1, "expert": 8, "tensor": 8}),
        ("v2-lite", 16, {}, {"data": 1, "expert": 1, "tensor": 16}),
        ("distill-qwen-32b", 16, {}, {"data": 2, "expert": 1, "tensor": 8}),
        ("distill-qwen-1.5b", 8, {}, {"data": 4, "expert": 1, "tensor": 2}),
        ("distill-qwen-1.5b", 8, {"tensor": 1}, {"data": 8, "expert": 1, "tensor": 1}),
        ("distill-qwen-1.5b", 8, {"data": 4}, {"data": 4, "expert": 1, "tensor": 2}),
        ("r1-671b", 64, {"data": 4}, {"data": 4, "expert": 1, "tensor": 16}),
        ("r1-671b", 64, {"data": 2, "tensor": 4}, {"data": 2, "expert": 8, "tensor": 4}),
        ("r1-671b", 64, {"data": 2, "expert": 8, "tensor": 4}, {"data": 2, "expert": 8, "tensor": 4}),
    ],
)
def test_the_mesh_to_sample_on_suits_the_model(name, devices, given, wanted):
    assert serving_sizes(preset(name), devices, **given) == wanted


@pytest.mark.parametrize("given", [{"tensor": 0}, {"expert": -2}, {"data": 0}])
def test_sizes_of_nothing_are_refused(given):
    with pytest.raises(ValueError, match="mesh: got .*, wanted at least 1"):
        serving_sizes(preset("r1-671b"), 8, **given)


@pytest.mark.parametrize(("given", "message"), [({"tensor": 3}, "tensor 3"), ({"expert": 16}, "expert 16")])
def test_sizes_that_do_not_divide_the_devices_are_refused(given, message):
    with pytest.raises(ValueError, match=f"{message}.* do not divide the 8 devices"):
        serving_sizes(preset("r1-671b"), 8, **given)


def test_replicas_that_leave_devices_out_are_refused():
    with pytest.raises(ValueError, match="data 3 x expert 1 x tensor 1 do not divide the 8 devices"):
        serving_sizes(preset("distill-qwen-1.5b"), 8, data=3)
    with pytest.raises(ValueError, match="got data 2 for 8 devices and a model over expert 1 x tensor 2, wanted 4"):
        serving_sizes(preset("distill-qwen-1.5b"), 8, data=2)
    with pytest.raises(ValueError, match="got data 1 for 64 devices and a model over expert 2 x tensor 4, wanted 8"):
        serving_sizes(preset("r1-671b"), 64, data=1, expert=2, tensor=4)


def test_without_a_mesh_weights_are_the_very_same_arrays():
    _, weights = laid("gqa", LOCAL)
    assert serving_layout(CONFIGS["gqa"], LOCAL) == LOCAL
    moved = Transfer(CONFIGS["gqa"], LOCAL, LOCAL, jnp.dtype(jnp.float32))(weights)
    assert all(one is other for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(weights), strict=True))
    with pytest.raises(ValueError, match="tensor 2 do not divide the 1 devices"):
        serving_layout(CONFIGS["gqa"], LOCAL, tensor=2)


def test_weights_that_are_given_up_are_trained_themselves():
    kept = trainer("gqa")
    given = trainer("gqa")
    given.model = given.model._replace(weights=jax.tree.map(jnp.copy, given.model.weights))
    given.donate = True
    leaves, states = jax.tree.leaves(given.model.weights), [kept.first_state(), given.first_state()]
    assert all(leaf.is_deleted() for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept.model.weights))
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, other)
