"""What the processes that the tests start do, all of them alike; a folder is shared between them."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax import distributed
from deepseek_jax.checkpoint import convert
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.data.examples import Prompt
from deepseek_jax.data.prompts import batches
from deepseek_jax.evals.accuracy import greedy_accuracy
from deepseek_jax.generation.completion import Completion
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.scan_layers import stack_layers
from deepseek_jax.ops import metrics as ops_metrics
from deepseek_jax.report.metrics import MetricLog
from deepseek_jax.rewards.combine import combine
from deepseek_jax.rl.rollout import RolloutWorker
from deepseek_jax.sharding import Layout, make_mesh
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.loop import Stage, run_stage
from deepseek_jax.train.sft_loss import SFTBatch, sft_batch, sft_objective
from deepseek_jax.train.step import StepConfig, TrainState, init_state, make_train_step
from tests.checkpoint.folders import V3

STEPS, SAVE_EVERY = 6, 2


# --- a state whose every bit depends on every batch and their order, and on no sum over devices ---


class Toy(NamedTuple):
    """Weights divided over all devices, and a counter that every process holds for itself."""

    weights: jax.Array
    seen: jax.Array


@jax.jit
def update(weights: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.mod(weights * 5 + rows, 1021)  # whole numbers, which no device rounds


def toy_start() -> Toy:
    where = NamedSharding(mesh(), PartitionSpec(("data", "fsdp")))
    return Toy(laid(np.arange(8, dtype=np.float32), where), jnp.int32(0))


def toy_stage(folder: Path, *, before: Callable[[int], None] = lambda number: None, **stage: Any) -> Toy:
    """Train the toy to its end; `before` is called before every step."""

    def step(state: Toy, rows: list[float], number: int) -> tuple[Toy, dict[str, float]]:
        before(number)
        assert int(state.seen) == number
        state = Toy(update(state.weights, np.asarray(rows, np.float32)), state.seen + 1)
        return state, {"first": float(whole(state.weights)[0]), "loss": -float(number % 4)}

    with MetricLog(folder) as log:
        data = batches([float(i) for i in range(20)], size=8, seed=0)
        settings = {"steps": STEPS, "save_every": SAVE_EVERY, "shown": {"loss": "loss"}} | stage
        return run_stage(Stage(name="toy", **settings), toy_start(), data, step, folder=folder, log=log)


def whole(array: jax.Array) -> np.ndarray:
    """All of an array that lies on the devices of several processes."""
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(lambda a: a, out_shardings=everywhere)(array).addressable_data(0))


def keep(folder: Path, name: str, tree: Any) -> None:
    """One file a process, with all leaves of a tree of whole arrays or numbers."""
    leaves = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(tree))}
    np.savez(folder / f"{name}.{distributed.process_index()}.npz", **leaves)


# --- laws ------------------------------------------------------------------------------------------


def they_meet_and_agree(folder: Path, /) -> None:
    print("words of the main process")
    me, many = distributed.process_index(), distributed.process_count()
    assert (many, jax.process_count(), jax.device_count(), jax.process_index()) == (2, 2, 8, me)
    assert distributed.is_main() == (me == 0)
    assert distributed.all_gather_objects({"i am": me}) == [{"i am": 0}, {"i am": 1}]
    assert distributed.on_main(lambda: [me, 0.1, None]) == [0, 0.1, None]
    for kind in (ValueError, FileNotFoundError, KeyError):
        with pytest.raises((ValueError, OSError, RuntimeError, KeyError)) as caught:
            with distributed.together():
                if me == 1:
                    raise kind("only here")
        heard = {ValueError: ValueError, FileNotFoundError: OSError, KeyError: RuntimeError}[kind]
        assert type(caught.value) is (kind if me == 1 else heard)
        assert str(caught.value).endswith("only here'" if kind is KeyError else "only here")
        assert ("process 1: " in str(caught.value)) == (me == 0)
    with pytest.raises(ZeroDivisionError if me == 0 else RuntimeError, match="division by zero"):
        distributed.on_main(lambda: 1 / 0)
    rewards_are_the_same_everywhere()
    a_batch_is_put_in_parts()
    keep(folder, "toy", whole(toy_stage(folder / "run").weights))
    resumed = toy_stage(folder / "run")  # a finished stage: what its checkpoint holds
    keep(folder, "restored", (whole(resumed.weights), resumed.seen))


def rewards_are_the_same_everywhere() -> None:
    """Each process would grade otherwise; the rewards are those of the main one."""
    found = [Completion(np.asarray([1, 2]), np.zeros(2, np.float32), True, text="a") for _ in range(4)]

    def grade(**columns: list) -> list[float]:
        return [distributed.process_index() + 0.1 * row for row in range(4)]

    none = SimpleNamespace()
    sampler = SimpleNamespace(each=lambda *of, **more: enumerate(found), settings=EngineConfig())
    reward = combine({"part": grade}, {"part": 1.0})
    roll = RolloutWorker(generator=sampler, tokenizer=none, sampling=none, group_size=4, reward=reward)
    rolled = roll(None, [Prompt("q", [1], {"answer": "a"})], seed=0, step=0)
    assert rolled.rewards.tolist() == [np.float32([0, 0.1, 0.2, 0.1 * 3]).tolist()]
    assert rolled.parts == {"part": [0, 0.1, 0.2, 0.1 * 3]}


def a_batch_is_put_in_parts() -> None:
    """Each process places the rows of its own devices, and all of them hold the batch that each had whole."""
    layout = Layout(mesh=make_mesh(data=2, fsdp=4))
    tokens = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    batch = SFTBatch(tokens, tokens + 1, tokens % 5 > 0)
    put = layout.put(batch)
    for value, given in zip(jax.tree.leaves(put), jax.tree.leaves(batch), strict=True):
        assert not value.is_fully_addressable and len(value.addressable_shards) == 4
        for shard in value.addressable_shards:
            assert shard.data.shape == (2, 3)
            np.testing.assert_array_equal(shard.data, given[shard.index])
        np.testing.assert_array_equal(whole(value), given)
    assert all(one is two for one, two in zip(*map(jax.tree.leaves, (layout.put(put), put)), strict=True))
    moved = put._replace(mask_BT=jax.jit(lambda a: a, out_shardings=layout.sharding(None, None))(put.mask_BT))
    assert [shard.data.shape for shard in layout.put(moved).mask_BT.addressable_shards] == [(2, 3)] * 4


def one_fails(folder: Path, /) -> None:
    """The other is in the middle of something that it will not come back from by itself."""
    if distributed.process_index() == int((folder / "who").read_text()):
        raise ValueError("the data\nof this process are bad")
    time.sleep(100)


def one_is_killed(folder: Path, /) -> None:
    """The second one, before its fourth step, the first checkpoint being whole; only in the first run."""

    def before(number: int) -> None:
        if number == 3 and distributed.process_index() == 1 and not (folder / "killed").exists():
            while not (folder / "run" / "checkpoints" / "toy" / "2").exists():
                time.sleep(0.01)
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    keep(folder, "toy", whole(toy_stage(folder / "run", before=before, profile_steps="2:3").weights))


def one_is_killed_while_the_other_waits(folder: Path, /) -> None:
    if distributed.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


def one_gets_sigterm(folder: Path, /) -> None:
    """The second one, in its fourth step; only in the first run."""

    def before(number: int) -> None:
        last = distributed.process_index() == distributed.process_count() - 1
        if number == 3 and last and not (folder / "asked").exists():
            (folder / "asked").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    keep(folder, "toy", whole(toy_stage(folder / "run", before=before).weights))


def a_folder_is_converted(folder: Path, /) -> None:
    counted = []
    convert.convert_hf(open_folder(folder / "hf"), folder / "converted", advance=counted.append)
    written = open_folder(folder / "converted")
    assert not distributed.is_main() or sum(counted) == written.nbytes
    convert.verify(written.source, written.stored.hashes)
    convert.export_hf(written, folder / "exported")
    with pytest.raises(ValueError, match="exists already"):
        convert.convert_hf(open_folder(folder / "hf"), folder / "converted")


def a_damaged_folder_is_not_converted(folder: Path, /) -> None:
    """The damage lies in a layer of one process."""
    convert.convert_hf(open_folder(folder / "hf"), folder / "converted")


def a_conversion_is_killed(folder: Path, /) -> None:
    """The second process, after its first layer."""
    real = convert.write_whole

    def dying(path: Path, content: bytes) -> None:
        real(path, content)
        if path.suffix == ".done" and distributed.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    convert.write_whole = dying
    convert.convert_hf(open_folder(folder / "hf"), folder / "converted")


# --- a tiny model ----------------------------------------------------------------------------------


def place(shape: tuple[int, ...]) -> NamedSharding:
    """The first axis that four ways of fsdp divide is cut by them; two ways of data hold the same."""
    cut = next((axis for axis, size in enumerate(shape) if size % 4 == 0), None)
    return NamedSharding(mesh(), PartitionSpec(*("fsdp" if axis == cut else None for axis in range(len(shape)))))


def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def laid(value: np.ndarray, where: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, where, lambda at: value[at])


def tiny_model() -> tuple[ModelConfig, nnx.GraphDef, nnx.State]:
    """Made from the same numbers in every process."""
    config = dataclasses.replace(V3, vocab_size=32)
    graphdef, weights = split(Decoder(config, rngs=nnx.Rngs(0)))
    return config, graphdef, jax.tree.map(lambda leaf: laid(np.asarray(leaf), place(leaf.shape)), weights)


def on_the_mesh(batch: SFTBatch) -> SFTBatch:
    """Samples divided over data and fsdp."""
    where = NamedSharding(mesh(), PartitionSpec(("data", "fsdp")))
    return jax.tree.map(lambda value: laid(value, where), batch)


def a_model_is_trained_and_asked(folder: Path, /) -> None:
    """Four steps in two runs, the second from the checkpoint of the first; then greedy answers."""
    config, graphdef, weights = tiny_model()
    optimizer = optax.sgd(0.1)  # AdamW would divide the rounding of a small gradient by its size
    train = make_train_step(graphdef, sft_objective, optimizer, StepConfig(micro_batches=1, bias_gamma=1e-3))
    rng = np.random.default_rng(0)
    rows = [([1, *rng.integers(2, 32, 4).tolist()], rng.integers(2, 32, 6).tolist()) for _ in range(24)]

    def step(state: TrainState, examples: list, number: int) -> tuple[TrainState, dict[str, float]]:
        state, metrics = train(state, on_the_mesh(sft_batch(examples, width=16)))
        return state, ops_metrics.values(metrics)

    for steps in (2, 4):
        with MetricLog(folder / "run") as log:
            stage = Stage(name="sft", steps=steps, save_every=2, shown={"loss": "loss"})
            data = batches(rows, size=8, seed=0)
            state = run_stage(stage, init_state(weights, optimizer), data, step, folder=folder / "run", log=log)
    keep(folder, "weights", [whole(leaf) for leaf in jax.tree.leaves(state.weights)])
    tokenizer = Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
    prompts = [Prompt(text, tokenizer.encode(text, add_bos=True), {"answer": "3"}) for text in ("1+2=?", "7*8=?")]
    everywhere = jax.tree.map(lambda leaf: laid(whole(leaf), NamedSharding(mesh(), PartitionSpec())), state.weights)
    answers = greedy_accuracy(
        Generator(config, graphdef), everywhere, tokenizer, prompts, max_new_tokens=8, stop_ids=tokenizer.eos_ids
    )
    found = [[c.tokens.tolist() for c in answers.completions], answers.scores]
    (folder / f"answers.{distributed.process_index()}.json").write_text(json.dumps(found))


def an_engine_answers(folder: Path, /) -> None:
    """On a mesh over all processes: each plans by itself, and all plan alike."""
    config = dataclasses.replace(V3, vocab_size=32, num_nextn_predict_layers=1)
    layout = Layout(mesh=make_mesh(data=2, expert=2, tensor=2), workload="serve", scan_layers=True)
    graphdef, like = abstract_weights(config, layout=layout)
    weights = stack_layers(
        jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])(), config, Layout(scan_layers=True)
    )
    weights = jax.tree.map(lambda leaf, of: laid(np.asarray(leaf), of.sharding), weights, like)
    settings = EngineConfig(max_num_seqs=8, block_size=4, chunk=8, decode_steps=3, max_model_len=32, batch_sizes=(8,))
    settings = dataclasses.replace(settings, drafts="mtp", draft_tokens=1)
    engine = Engine(config, graphdef, weights, settings)
    for number in range(12):
        sampling = SamplingConfig(max_new_tokens=5, temperature=float(number % 2))
        engine.add([*range(1, 4 + number), number], sampling, seed=number)
    found = {update.id: update.live.request.tokens for update in engine.run() if update.finished}
    (folder / f"tokens.{distributed.process_index()}.json").write_text(json.dumps(sorted(found.items())))
