"""The least that chips send, against numbers worked out by hand."""

import dataclasses

import pytest

from deepseek_jax.config import preset
from deepseek_jax.plan.communication import comm_lower_bound, dispatched, gathered, shared_sequences, summed_gradients
from deepseek_jax.plan.meshes import Sizes

R1 = preset("r1-671b")
TINY = preset("tiny")
V32 = preset("v3.2-671b")


def test_r1s_update_on_512_chips():
    """One sequence of 4,096 tokens a chip, 64 groups of experts: 8 rows of 7,168 bfloat16 a token in 58 layers and a
    module, to others 63 of 64 times, there and back and both again backward."""
    rows = 4 * 63 / 64 * 4096 * 8 * 59 * 7168 * 2
    found = comm_lower_bound(R1, Sizes(expert=64, fsdp=8), "train", 512, 4096)
    weights = 3 * sum(of.nbytes for of in gathered(R1, Sizes(expert=64, fsdp=8), modules=True))
    weights += sum(of.nbytes for of in summed_gradients(R1, Sizes(expert=64, fsdp=8), modules=True))
    assert rows == pytest.approx(109.1e9, rel=1e-3)
    assert found == pytest.approx(rows + weights, rel=1e-12) and weights == pytest.approx(153e9, rel=0.02)


def test_serving_moves_rows_alone_and_once_there_and_back():
    """In decoding a chip has the tokens of its own sequences, however its mesh cuts the heads."""
    for sizes in ({"expert": 4, "tensor": 16}, {"expert": 64}):
        found = comm_lower_bound(R1, Sizes(**sizes), "decode", 512, 4096)
        assert found == pytest.approx(2 * 63 / 64 * (512 / 64) * 8 * 58 * 7168 * 2, rel=1e-12)
    prefill = comm_lower_bound(R1, Sizes(expert=64), "prefill", 64, 4096)
    assert prefill == pytest.approx(2 * 63 / 64 * 4096 * 8 * 58 * 7168 * 2, rel=1e-12)


def test_the_modules_run_in_supervised_training_alone():
    of = Sizes(expert=64, fsdp=8)
    ran, idle = (dispatched(R1, "train", of, 10, modules=modules).nbytes for modules in (True, False))
    assert ran == pytest.approx(59 / 58 * idle)


def test_replicas_send_their_gradients_and_nothing_else():
    """A ring of two sends half of an array twice: once summing, once gathering."""
    dense = dataclasses.replace(TINY, moe=None)
    count = 0
    for sizes in ({"data": 2}, {"data": 4}):
        found = comm_lower_bound(dense, Sizes(**sizes), "grpo", 4, 16, width=4)
        n = sizes["data"]
        count = count or found / (2 * 1 / 2 * 4)  # of parameters, from the first
        assert found == pytest.approx(2 * (n - 1) / n * count * 4)
    D, V, F, L = dense.hidden_size, dense.vocab_size, dense.intermediate_size, dense.num_hidden_layers
    assert count > 2 * V * D + 3 * L * D * F  # embedding, head and MLPs are among them
    assert count == int(count)


def test_one_chip_sends_nothing():
    assert comm_lower_bound(TINY, Sizes(), "train", 4, 16) == 0


@pytest.mark.parametrize(
    "name, context, length, exchanged, others",
    [
        # MLA: 128 heads of 192 + 128 numbers exchanged, latents of 512 + 64 from seven others
        ("r1-671b", 8, 4096, 61 * 128 * 320 * 7 / 8, 61 * 576 * 7),
        # eight key-value heads over eight devices: their own share of keys and values of 128 numbers travels
        ("distill-llama-8b", 8, 4096, 32 * 32 * 256 * 7 / 8, 32 * 8 * 256 * 7 / 8),
        # two of them on four devices are not divided: all travel, and their gradients are summed
        ("distill-qwen-1.5b", 4, 4096, 28 * 12 * 256 * 3 / 4, 28 * 2 * 256 * (3 + 2 * 3 / 3)),
    ],
)
def test_devices_that_share_sequences_send(name, context, length, exchanged, others):
    """By hand, a token of a device, in one pass of three; sums over all passes."""
    sent = shared_sequences(preset(name), Sizes(context=context), 1, length, 3)
    assert [of.nbytes for of in sent] == pytest.approx([3 * 2 * exchanged, 3 * 2 * others])


def test_chosen_keys_are_not_divided():
    """V3.2 sums gradients of keys and values of all heads where it chooses keys, and not before."""
    many, few = (shared_sequences(V32, Sizes(context=8), 1, length, 1)[1].nbytes for length in (4096, 2048))
    assert many - few == 2 * 61 * 2 * 7 * 128 * 320
