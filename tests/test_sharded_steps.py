"""A model on a mesh of eight devices against the same one on one device; these in one process of their own.

Logits, decoding, loss, gradients and one optimizer step, over meshes of every axis and models of every kind.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.adapters import adapted_paths, new_adapter
from deepseek_jax.generation.completion import Record
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.lora import LoRAConfig, abstract_adapter, adapter_from_arrays, with_adapter
from deepseek_jax.model.scan_layers import members, stack_layers, unstack_layers
from deepseek_jax.ops.logprobs import to_bits, token_logprobs
from deepseek_jax.parallel.logprobs import sharded_logprobs
from deepseek_jax.rl.batch import Batch
from deepseek_jax.rl.loss import GRPOLossConfig
from deepseek_jax.rl.objective import frozen_scores, grpo_objective
from deepseek_jax.sharding import LOCAL, Layout, Remat, Transport, make_mesh
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.sft_loss import SFTBatch, make_sft_objective
from deepseek_jax.train.step import StepConfig, init_state, make_adapter_step, make_train_step
from tests.checkpoint.folders import QWEN2, R1, V32
from tests.laws import fixture_of

DEVICES = 8
B, T = 8, 16
TOLERANCE = 2e-5
# wide enough for eight parts of every kind
MLA = dataclasses.replace(
    R1,
    quantization=None,
    hidden_size=64,
    intermediate_size=64,
    vocab_size=64,
    num_attention_heads=8,
    num_hidden_layers=3,
    attention=dataclasses.replace(R1.attention, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=8, v_head_dim=8),
    moe=dataclasses.replace(R1.moe, moe_intermediate_size=16, first_k_dense_replace=1),
)
SPARSE = dataclasses.replace(
    MLA,
    model_type="deepseek_v32",
    attention=dataclasses.replace(
        MLA.attention,
        indexer=dataclasses.replace(V32.attention.indexer, index_n_heads=8, index_head_dim=16, index_topk=6),
    ),
    num_nextn_predict_layers=0,
)
GQA = dataclasses.replace(
    QWEN2,
    hidden_size=64,
    intermediate_size=64,
    vocab_size=64,
    num_attention_heads=8,
    num_hidden_layers=2,
    attention=dataclasses.replace(
        QWEN2.attention, num_key_value_heads=8, head_dim=8, qk_norm=True
    ),  # and Qwen3's norms
)
CONFIGS = {"mla": MLA, "sparse": SPARSE, "gqa": GQA}
SCANNED = Layout(scan_layers=True)  # of one device, sooner compiled than LOCAL
FACTORS = [
    {"data": a, "fsdp": b, "expert": c, "context": d, "tensor": e}
    for a in (1, 2, 4, 8)
    for b in (1, 2, 4, 8)
    for c in (1, 2, 4, 8)
    for d in (1, 2, 4, 8)
    for e in (1, 2, 4, 8)
    if a * b * c * d * e == DEVICES
]
rng = np.random.default_rng(0)
TOKENS = rng.integers(0, 64, (B, T + 1)).astype(np.int32)
ADVANTAGES = np.broadcast_to(rng.normal(size=(B, 1)).astype(np.float32), (B, T))
MASK = np.arange(T) < rng.integers(4, T + 1, (B, 1))


@functools.cache
def weights_of(kind: str) -> nnx.State:
    return jax.jit(lambda: split(Decoder(CONFIGS[kind], rngs=nnx.Rngs(0)))[1])()


def laid(kind: str, layout: Layout) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's description and weights under a layout."""
    config = CONFIGS[kind]
    graphdef, like = abstract_weights(config, layout=layout)
    if layout.scan_layers:
        return graphdef, stack_layers(weights_of(kind), config, layout)
    if layout.mesh is None:
        return graphdef, weights_of(kind)
    return graphdef, jax.tree.map(lambda a, of: jax.device_put(a, of.sharding), weights_of(kind), like)


def objectives(kind: str):
    """Supervised fine-tuning with the modules, where there are some, and GRPO; each with its batch."""
    old = np.float32(-4.0) + np.zeros((B, T), np.float32)
    mtp = 0.3 if CONFIGS[kind].num_nextn_predict_layers else 0.0
    return {
        "sft": (make_sft_objective(mtp_weight=mtp), SFTBatch(TOKENS[:, :-1], TOKENS[:, 1:], MASK)),
        "grpo": (
            partial(grpo_objective, config=GRPOLossConfig(beta=0.1), temperature=0.9),
            Batch(TOKENS[:, :-1], TOKENS[:, 1:], MASK, old, old, ADVANTAGES),
        ),
    }


@functools.cache
def stepped(kind: str, objective: str, layout: Layout, micro_batches: int = 1):
    """Weights and metrics after one step of plain gradient descent: the weights' change is the gradient."""
    graphdef, weights = laid(kind, layout)
    of, batch = objectives(kind)[objective]
    config = StepConfig(balance_alpha=0.01, bias_gamma=0.01, micro_batches=micro_batches)
    step = make_train_step(graphdef, of, optax.sgd(1.0), config)
    state, metrics = step(init_state(weights, optax.sgd(1.0), layout), batch)
    found = unstack_layers(state.weights, CONFIGS[kind], LOCAL) if layout.scan_layers else state.weights
    return {k: np.asarray(v) for k, v in names.flat(found).items()}, jax.tree.map(np.asarray, metrics)


def same(got, wanted, what: str, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance, err_msg=what)


def drawn(count: int, *workloads: str) -> Iterator[tuple[str, Layout]]:
    """So many kinds of model, each on a mesh of a shape of its own, all else at random; the same in every run."""
    random, shapes = np.random.default_rng(count), set()
    while len(shapes) < count:
        kind = list(CONFIGS)[len(shapes) % len(CONFIGS)]
        sizes = dict(FACTORS[random.integers(len(FACTORS))])
        if CONFIGS[kind].moe is None:  # no axis of experts there: what it would be is data
            sizes |= {"data": sizes["data"] * sizes["expert"], "expert": 1}
        if tuple(sizes.values()) in shapes:
            continue
        shapes.add(tuple(sizes.values()))
        yield (
            kind,
            Layout(
                mesh=make_mesh(**sizes),
                workload=str(random.choice(workloads)),
                transport=str(random.choice(get_args(Transport))),
                scan_layers=bool(random.integers(2)),
                remat=str(random.choice(get_args(Remat))),
                capacity_factor=float(random.choice([1.0, 4.0])),
            ),
        )


# --- laws that need eight devices ----------------------------------------------------------------


def a_step_on_a_mesh_is_that_of_one_device():
    """Loss, metrics, gradients of all weights, and the router biases' move."""
    for number, (kind, layout) in enumerate(drawn(14, "train")):
        objective = ("sft", "grpo")[number // len(CONFIGS) % 2]
        same(stepped(kind, objective, layout), stepped(kind, objective, LOCAL), f"{kind} {objective} {layout}")


def logits_on_a_mesh_are_those_of_one_device():
    for kind, layout in drawn(14, "train", "serve"):
        same(logits(kind, layout), logits(kind, LOCAL), f"{kind} {layout}")


@functools.cache
def logits(kind: str, layout: Layout):
    graphdef, weights = laid(kind, layout)

    def run(weights):
        model = nnx.merge(graphdef, weights)
        hidden = model(TOKENS[:, :-1])
        drafts = model.draft(hidden.x_BTD, jnp.asarray(TOKENS[:, 1:]))
        return [model.logits(of.x_BTD) for of in (hidden, *drafts)]

    return [np.asarray(of) for of in jax.jit(run)(weights)]


@functools.cache
def sampled(kind: str, layout: Layout):
    graphdef, weights = laid(kind, layout)
    generator = Generator(CONFIGS[kind], graphdef)
    prompts = [row[:length].tolist() for row, length in zip(TOKENS, (3, 7, 5), strict=False)]
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0, top_p=0.95)
    found = generator(weights, prompts, sampling, seeds=range(6), samples=2)
    return [(of.tokens.tolist(), of.logprobs) for of in found]


def what_is_sampled_on_a_mesh_is_what_one_device_samples():
    """The same tokens, with the same log-probs, whatever rows the mesh adds."""
    for kind, layout in drawn(9, "serve", "train"):
        got, wanted = sampled(kind, layout), sampled(kind, LOCAL)
        assert [tokens for tokens, _ in got] == [tokens for tokens, _ in wanted], f"{kind} {layout}"
        same([of for _, of in got], [of for _, of in wanted], f"{kind} {layout}")


@functools.cache
def engine_runs(kind: str, layout: Layout, drafts: str):
    """What an engine draws, prompts in chunks, some of them cached, and what it compiled after its warm-up."""
    graphdef, weights = laid(kind, layout)
    settings = EngineConfig(
        max_num_seqs=8, max_model_len=40, block_size=4, num_blocks=30, chunk=8, max_num_batched_tokens=64,
        decode_steps=3, batch_sizes=(8,), drafts=drafts, draft_tokens=1, admission="preempt",
    )  # fmt: skip
    engine = Engine(CONFIGS[kind], graphdef, weights, settings, record=Record(routes=CONFIGS[kind].moe is not None))
    list(engine.warm_up())
    compiled, found = engine.runner.compiled, {}
    for number in range(24):
        stem, own = TOKENS[0, : (0, 5, 8, 16)[number % 4]].tolist(), TOKENS[number % B, : 1 + number % 13].tolist()
        settings = dict(max_new_tokens=9, temperature=float(number % 2), prompt_logprobs=number % 5 == 0)
        engine.add([*stem, *own], SamplingConfig(**settings), seed=number)
        if number % 3 == 0:
            found |= {update.id: update.live for update in engine.step() if update.finished}
    found |= {update.id: update.live for update in engine.run() if update.finished}
    assert all(pool.used == 0 for pool in engine.scheduler.cache.pools)
    assert engine.metrics.accepted > 0
    lives = [found[number] for number in range(24)]
    routes = [np.sort(np.concatenate(of.routes)).tolist() if of.routes else [] for of in lives]
    return (
        [of.request.tokens for of in lives],
        routes,
        [np.asarray([*of.logprobs, *of.prompt_logprobs]) for of in lives],
        engine.runner.compiled - compiled,
    )


def an_engine_on_a_mesh_draws_what_one_device_draws(*kinds: str):
    """With chunks, hits, drafts, records and log-probs of prompts; and nothing is compiled after its warm-up."""
    sizes = {"mla": {"data": 2, "expert": 2, "tensor": 2}, "sparse": {"expert": 4, "context": 2}}
    for kind in kinds or CONFIGS:
        layout = Layout(mesh=make_mesh(**sizes.get(kind, {"data": 4, "tensor": 2})), workload="serve", scan_layers=True)
        drafts = "mtp" if CONFIGS[kind].num_nextn_predict_layers else "lookup"
        got, wanted = engine_runs(kind, layout, drafts), engine_runs(kind, SCANNED, drafts)
        assert got[0] == wanted[0], kind
        assert got[1] == wanted[1], kind
        same(got[2], wanted[2], kind)
        assert got[3] == 0, f"{kind}: {got[3]} compiled after the warm-up"


def scored(given, function, *more, **bits):
    """((a number of both, (log-probs, entropies, best log-probs)), its gradients in states and head)."""
    hidden, head, tokens = given

    def total(hidden, head):
        logp, entropy, best = function(hidden, head, tokens, *more, temperature=0.7, penalty=1.6, **bits)
        return jnp.sum(jnp.sin(logp) + entropy), (logp, entropy, best)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, head)


def log_probs_after_a_penalty_on_a_mesh_are_those_of_one_device():
    """Values and gradients, also where a part of the vocabulary begins inside a word of the bits."""
    rng = np.random.default_rng(0)
    for sizes, V in (({"tensor": 8}, 200), ({"fsdp": 2, "tensor": 4}, 64), ({"data": 2, "context": 4}, 64)):
        layout = Layout(mesh=make_mesh(**sizes))
        hidden, head = (rng.normal(size=size).astype(np.float32) for size in ((B, T, 16), (16, V)))
        tokens = rng.integers(0, V, (B, T)).astype(np.int32)
        penalised = to_bits(jnp.asarray(rng.random((B, T, V)) < 0.4))
        support = to_bits(jnp.asarray((rng.random((B, T, V)) < 0.6) | (np.arange(V) == tokens[..., None])))
        of = partial(scored, (hidden, head, tokens))
        for kept in (support, None):
            wanted = of(token_logprobs, support=kept, penalised=penalised)
            got = of(sharded_logprobs, layout, support_BTW=kept, penalised_BTW=penalised)
            same(got[0][1], wanted[0][1], f"{sizes}")
            same(got[1], wanted[1], f"gradients, {sizes}", tolerance=1e-4)
        plain = of(token_logprobs, support=None, penalised=None)
        assert not np.allclose(wanted[0][1][0], plain[0][1][0], atol=0.1)


def micro_batches_change_nothing_on_a_mesh():
    layout = Layout(mesh=make_mesh(fsdp=2, expert=2, tensor=2), scan_layers=True, remat="layers")
    same(stepped("mla", "sft", layout, 2), stepped("mla", "sft", SCANNED), "micro batches")


def cutting_a_batch_in_parts_moves_no_row():
    """A part has the collectives that a whole batch has, and none beside them; scores come in the batch's order."""
    layout = Layout(mesh=make_mesh(data=8))
    graphdef, weights = laid("gqa", layout)
    objective, batch = objectives("gqa")["grpo"]
    rows = np.random.default_rng(1).permutation(np.repeat(np.arange(B), 4))
    batch = jax.tree.map(lambda a: a[rows], batch)
    on_mesh = layout.put(batch)

    def of_step(parts):
        step = make_train_step(graphdef, objective, optax.sgd(1.0), StepConfig(micro_batches=parts))
        return collectives(step.lower(init_state(weights, optax.sgd(1.0), layout), on_mesh))

    whole, cut = of_step(1), of_step(4)
    assert cut <= whole + whole, (whole, cut)  # the first part stands before the loop over the others
    score = partial(frozen_scores, temperature=0.9)
    of_scores = lambda parts: frozen_scores.lower(graphdef, weights, on_mesh, temperature=0.9, micro_batches=parts)
    assert collectives(of_scores(4)) <= collectives(of_scores(1))
    wanted = np.asarray(score(*laid("gqa", LOCAL), batch))
    same(score(graphdef, weights, on_mesh, micro_batches=4), wanted, "scores")
    assert len(np.unique(wanted[:, 0])) == B


PUT_ON = ({"data": 2, "fsdp": 4}, {"fsdp": 2, "expert": 2, "context": 2}, {"context": 2, "tensor": 4})


def a_batch_is_put_shard_by_shard():
    """Each device gets its own rows and positions."""
    for sizes in PUT_ON:
        layout = Layout(mesh=make_mesh(**sizes))
        rows = layout.parts("batch")
        _, batch = objectives("mla")["grpo"]
        routes = np.arange(B * T * 6).reshape(B, T, 3, 2)
        lengths = np.full((B, 1), T, np.int32)
        put = layout.put(batch._replace(routes_BTLA=routes, entropy_coef_B=np.arange(B), lengths_BK=lengths))
        for name, value in zip(put._fields, put, strict=True):
            if value is None:
                continue
            wanted = {"routes_BTLA": routes, "entropy_coef_B": np.arange(B), "lengths_BK": lengths}.get(name)
            wanted = getattr(batch, name) if wanted is None else wanted
            by_position = T // layout.parts("sequence") if name.endswith(("_BT", "_BTLA")) else 1
            np.testing.assert_array_equal(value, wanted)
            assert len(value.addressable_shards) == DEVICES
            for shard in value.addressable_shards:
                assert shard.data.shape[0] == B // rows, (sizes, name)
                assert value.ndim == 1 or shard.data.shape[1] == by_position, (sizes, name)
        again = layout.put(put)
        assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(put), strict=True))
        if rows > 1:
            with pytest.raises(ValueError, match=f"batch 7 is not divisible by mesh ax[ie]s .*{sizes['fsdp']}"):
                layout.put(jax.tree.map(lambda a: a[:7], batch))
    assert LOCAL.put(batch) is batch


def a_step_on_a_batch_that_was_put():
    """The step is the same bit for bit as on a host's arrays, and compiles once."""
    for sizes in PUT_ON:
        layout = Layout(mesh=make_mesh(**sizes), scan_layers=True)
        graphdef, weights = laid("mla", layout)
        of, batch = objectives("mla")["grpo"]

        def after(batches, graphdef=graphdef, weights=weights, of=of, layout=layout):
            step = make_train_step(graphdef, of, optax.sgd(1.0), StepConfig())
            state = init_state(weights, optax.sgd(1.0), layout)
            for given in batches:
                state, metrics = step(state, given)
            assert step._cache_size() == 1
            return jax.tree.map(np.asarray, (state, metrics))

        got, wanted = after([layout.put(batch) for _ in range(2)]), after([batch] * 2)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=str(sizes))


def collectives(lowered: jax.stages.Lowered) -> Counter[str]:
    """How many of each kind stand in a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", lowered.compile().as_text()))


LORA = LoRAConfig(rank=4, alpha=8, targets="all-linear")


@functools.cache
def adapted_step(kind: str, layout: Layout):
    """An adapter, by layer, after a step of plain gradient descent beside frozen weights, with the metrics."""
    config, (graphdef, weights) = CONFIGS[kind], laid(kind, layout)
    of, batch = objectives(kind)["grpo"]
    step = make_adapter_step(graphdef, of, optax.sgd(1.0), StepConfig(balance_alpha=0.01), LORA)
    state, metrics = step(
        init_state(adapter_of(kind, layout), optax.sgd(1.0), layout), layout.put(batch), frozen=weights
    )
    found = {}
    for path, leaf in nnx.to_flat_state(state.weights):
        values = np.asarray(leaf[...])
        apart = values if path[0] == "stacks" else [values]
        found |= dict(zip(members(path, config), map(np.asarray, apart), strict=True))
    return found, jax.tree.map(np.asarray, metrics)


def adapter_of(kind: str, layout: Layout) -> nnx.State:
    """Neither matrix is zero; the same numbers under every layout."""
    config, paths = CONFIGS[kind], adapted_paths(CONFIGS[kind], LORA)
    first, random = dict(nnx.to_flat_state(new_adapter(config, LORA, seed=0))), np.random.default_rng(3)
    arrays = {path: random.normal(0, 0.1, leaf[...].shape).astype(np.float32) for path, leaf in first.items()}
    return adapter_from_arrays(arrays, abstract_adapter(config, LORA, paths, layout=layout), config)


ADAPTED = {
    "experts": (
        "mla",
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"scan_layers": True, "remat": "layers", "capacity_factor": 1.0},
    ),
    "context": ("mla", {"data": 2, "expert": 2, "context": 2}, {"transport": "all_to_all"}),
    "rows": ("mla", {"expert": 4, "tensor": 2}, {"transport": "all_gather", "capacity_factor": 1.0}),
    "sparse": ("sparse", {"fsdp": 4, "expert": 2}, {"remat": "all_but_attention"}),
    "dense": ("gqa", {"data": 2, "fsdp": 2, "tensor": 2}, {"scan_layers": True}),
}


def an_adapters_step_on_a_mesh_is_that_of_one_device(*names: str):
    """Metrics and the gradients of both matrices, whatever cuts rows and columns, and in every transport."""
    for name in names or ADAPTED:
        kind, sizes, settings = ADAPTED[name]
        layout = Layout(mesh=make_mesh(**sizes), **settings)
        got, wanted = adapted_step(kind, layout), adapted_step(kind, SCANNED if layout.scan_layers else LOCAL)
        assert got[0].keys() == wanted[0].keys()
        same([got[0][key] for key in wanted[0]], list(wanted[0].values()), name)
        same(got[1], wanted[1], name)


def an_adapters_step_of_a_dense_model_is_that_of_one_device():
    an_adapters_step_on_a_mesh_is_that_of_one_device("dense")


def samples_beside_an_adapter_on_a_mesh_are_those_of_one_device():
    """The same tokens and log-probs of a serving layout, from frozen weights and adapter laid out for it."""

    def sampled(kind, layout):
        graphdef, weights = laid(kind, layout)
        given = [row[:length].tolist() for row, length in zip(TOKENS, (3, 7, 5), strict=False)]
        generator = Generator(CONFIGS[kind], graphdef)
        sampling = SamplingConfig(max_new_tokens=6)
        found = generator(
            with_adapter(weights, adapter_of(kind, layout), LORA), given, sampling, seeds=range(6), samples=2
        )
        return [of.tokens.tolist() for of in found], [of.logprobs for of in found]

    for kind, sizes, stack in (("mla", {"fsdp": 2, "expert": 2, "tensor": 2}, True), ("gqa", {"tensor": 8}, False)):
        layout = Layout(mesh=make_mesh(**sizes), workload="serve", transport="all_gather", scan_layers=stack)
        got, wanted = sampled(kind, layout), sampled(kind, LOCAL)
        assert got[0] == wanted[0]
        same(got[1], wanted[1], kind)


def adamw_on_a_mesh_is_that_of_one_device():
    """Two steps, moments included; a small gradient divided by its own size shows its rounding."""

    def run(layout):
        graphdef, weights = laid("mla", layout)
        of, batch = objectives("mla")["sft"]
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 2, untrained=())
        step = make_train_step(graphdef, of, optimizer, StepConfig())
        state = init_state(weights, optimizer, layout)
        for _ in range(2):
            state, _ = step(state, batch)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]

    mesh = make_mesh(data=2, fsdp=2, expert=2)
    same(run(Layout(mesh=mesh)), run(LOCAL), "adamw", tolerance=1e-4)


def a_state_keeps_lying_as_its_weights_do():
    """After a step every weight and moment is where it was: a step that moved them would compile again and again."""
    layout = Layout(mesh=make_mesh(fsdp=2, expert=2, tensor=2), scan_layers=True)
    graphdef, weights = laid("mla", layout)
    of, batch = objectives("mla")["sft"]
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 2)
    step = make_train_step(graphdef, of, optimizer, StepConfig(bias_gamma=0.01))
    state = init_state(weights, optimizer, layout)
    before = [a.sharding for a in jax.tree.leaves(state)]
    for _ in range(2):
        state, _ = step(state, batch)
    after = jax.tree.leaves(state)
    assert all(a.sharding.is_equivalent_to(place, a.ndim) for a, place in zip(after, before, strict=True))
    assert step._cache_size() == 1


QUICK = [
    micro_batches_change_nothing_on_a_mesh,
    a_batch_is_put_shard_by_shard,
    an_adapters_step_of_a_dense_model_is_that_of_one_device,
]
THOROUGH = [
    a_step_on_a_batch_that_was_put,
    cutting_a_batch_in_parts_moves_no_row,
    a_step_on_a_mesh_is_that_of_one_device,
    logits_on_a_mesh_are_those_of_one_device,
    what_is_sampled_on_a_mesh_is_what_one_device_samples,
    an_engine_on_a_mesh_draws_what_one_device_draws,
    log_probs_after_a_penalty_on_a_mesh_are_those_of_one_device,
    adamw_on_a_mesh_is_that_of_one_device,
    a_state_keeps_lying_as_its_weights_do,
    an_adapters_step_on_a_mesh_is_that_of_one_device,
    samples_beside_an_adapter_on_a_mesh_are_those_of_one_device,
]


quick = fixture_of(QUICK)


@pytest.mark.parametrize("law", [law.__name__ for law in QUICK])
def test_on_eight_devices(law, quick):
    assert quick[law] == "", quick[law]


thorough = fixture_of(THOROUGH)


@pytest.mark.slow
@pytest.mark.parametrize("law", [law.__name__ for law in THOROUGH])
def test_on_many_meshes_of_eight_devices(law, thorough):
    assert thorough[law] == "", thorough[law]
