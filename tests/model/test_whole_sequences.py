"""A model whose sequences attend by tiles against the same with all pairs of queries and keys at once."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.model import attention as module
from deepseek_jax.model.decoder import Decoder
from deepseek_jax.ops.attention import attend, causal_mask, same_segment
from deepseek_jax.ops.kernels import splash
from deepseek_jax.parallel import causal_attention as forms
from deepseek_jax.sharding import LOCAL, Layout
from tests.checkpoint.folders import QWEN2, V3, V32

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIGS = {"mla": V3, "gqa": QWEN2, "v3.2": V32}
T = 150  # two tiles, of which the last is not whole


def all_pairs(q, k, v, segments, *, scale, **_):
    at = jnp.tile(jnp.arange(q.shape[1]), (q.shape[0], 1))
    mask = causal_mask(at, at)
    return attend(q, k, v, mask if segments is None else same_segment(mask, segments, segments), scale), None


def loss_and_gradients(kind: str, *, packed: bool, layout: Layout = LOCAL):
    """Of log-probs of random tokens, weighted at random; half of the last row is padding."""
    config = dataclasses.replace(CONFIGS[kind], initializer_range=0.3, vocab_size=40, num_hidden_layers=1)
    model = Decoder(config, rngs=nnx.Rngs(0), layout=layout)
    rng = np.random.default_rng(0)
    tokens, weights = rng.integers(0, 40, (2, T)), rng.normal(size=(2, T))
    mask = np.ones((2, T), bool)
    mask[1, T // 2 :] = False
    ids = np.where(mask, 1 + np.arange(T) // 40, 0) if packed else None
    options = {"segments_BT": jnp.asarray(ids, jnp.int32), "per_row": 4} if packed else {}

    @nnx.jit
    def run(model):
        def loss(model):
            x = model(jnp.asarray(tokens), jnp.asarray(mask), **options).x_BTD
            found = jax.nn.log_softmax(model.logits(x))[..., :5].sum(axis=-1)
            return jnp.sum(found * jnp.asarray(weights * mask, jnp.float32))

        return nnx.value_and_grad(loss)(model)

    return run(model)


def require_equal(found, wanted):
    for got, want in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5 * max(1.0, float(jnp.abs(want).max())))


@pytest.mark.parametrize(
    "kind, packed, remat", [("mla", True, "nothing"), ("gqa", False, "nothing"), ("mla", False, "layers")]
)
def test_loss_and_gradients_are_those_of_all_pairs(kind, packed, remat, monkeypatch):
    monkeypatch.setattr(forms, "_ALL_PAIRS", 0)
    layout = Layout(remat=remat)
    found = loss_and_gradients(kind, packed=packed, layout=layout)
    monkeypatch.setattr(module, "causal_attention", all_pairs)
    require_equal(found, loss_and_gradients(kind, packed=packed, layout=layout))


@pytest.fixture
def as_on_tpu(monkeypatch):
    """jax's kernel, interpreted."""
    for name in ("kernel", "chosen_attention"):
        monkeypatch.setattr(splash, name, partial(getattr(splash, name), interpret=True))
    monkeypatch.setattr(splash, "_SIDES", (splash.LANES,))  # or one tile would do
    monkeypatch.setattr(forms, "_platform", lambda layout: "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind, packed", [("mla", True), ("gqa", False), ("v3.2", True), ("v3.2", False)])
def test_loss_and_gradients_are_those_of_the_kernel_for_tpus(kind, packed, as_on_tpu):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_platform", lambda layout: "cpu")
        found = loss_and_gradients(kind, packed=packed)  # of all pairs, which are few; of tiles where keys are chosen
    require_equal(loss_and_gradients(kind, packed=packed, layout=Layout(remat="all_but_attention")), found)


def test_on_a_tpu_too_many_chosen_keys_are_attended_to_by_tiles(as_on_tpu, monkeypatch):
    monkeypatch.setattr(splash, "mask_fits", lambda of: False)
    monkeypatch.setattr(splash, "chosen_attention", None)
    found = loss_and_gradients("v3.2", packed=True)
    monkeypatch.setattr(forms, "_platform", lambda layout: "cpu")
    require_equal(found, loss_and_gradients("v3.2", packed=True))


def test_what_is_kept_of_a_layer_has_no_scores(monkeypatch):
    """With `all_but_attention` the backward pass gets result and logarithms, and computes no softmax forward again."""

    monkeypatch.setattr(forms, "_ALL_PAIRS", 0)

    def turns(remat):
        config = dataclasses.replace(QWEN2, vocab_size=40, num_hidden_layers=1)
        model = Decoder(config, rngs=nnx.Rngs(0), layout=Layout(remat=remat))
        loss = lambda model: jnp.sum(model(jnp.zeros((1, T), int)).x_BTD ** 2)
        graphdef, weights = nnx.split(model)
        text = str(jax.make_jaxpr(jax.grad(lambda weights: loss(nnx.merge(graphdef, weights))))(weights))
        return text.count("scan[")

    assert (turns("nothing"), turns("all_but_attention"), turns("layers")) == (2, 2, 3)
