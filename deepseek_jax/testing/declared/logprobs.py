"""Log-probs and divergences without the logits of a whole batch, by chunks of positions and on a mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops.divergence import Divergence, token_divergences
from deepseek_jax.ops.logprobs import token_logprobs
from deepseek_jax.parallel.divergence import sharded_divergences
from deepseek_jax.parallel.logprobs import sharded_logprobs
from deepseek_jax.sharding import Layout, make_mesh
from deepseek_jax.testing import Draw, Kernel, choices

_TEMPERATURE, _PENALTY = 0.7, 1.3
_OUTSIDE = -1e30
MESHES = {"data": {"data": 8}, "tensor": {"fsdp": 2, "tensor": 4}, "context": {"data": 2, "context": 2, "tensor": 2}}
# logits are added up in float32 whatever their factors' dtype; only gradients are products in it
_ALIKE: dict[str, Any] = {
    "tolerance": {"float32": 2.0**-20, "bfloat16": 2.0**-20},
    "gradients": ("hidden", "head"),
    "gradient_tolerance": {"float32": 2.0**-16, "bfloat16": 2.0**-6},
    "gradient_noise": {"float32": 2.0**-19, "bfloat16": 2.0**-19},  # a token that is certain has none
    "numbers": ("normal", "whole", "zeros"),
}


def layout_of(devices: Sequence[Any], sizes: Mapping[str, int]) -> Layout:
    """A mesh of such sizes, to train on."""
    return Layout(mesh=make_mesh(devices, **sizes), workload="train", remat="nothing")


# --- log-probs -----------------------------------------------------------------------------------


def _bits(chosen: np.ndarray) -> np.ndarray:
    """As words of 32 bits."""
    padded = np.zeros((*chosen.shape[:-1], -(-chosen.shape[-1] // 32) * 32), np.uint32)
    padded[..., : chosen.shape[-1]] = chosen
    words = padded.reshape(*chosen.shape[:-1], -1, 32)
    return np.sum(words << np.arange(32, dtype=np.uint32), axis=-1, dtype=np.uint32)


def _of_bits(words: np.ndarray, count: int) -> np.ndarray:
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :count].astype(bool)


def _inputs(draw: Draw) -> dict[str, Any]:
    B, T, D, V = draw.of("B", "T", "D", "V")
    hidden, head = draw.numbers(B, T, D), draw.numbers(D, V, scale=2 * D**-0.5)
    tokens = draw.integers(0, V, B, T)
    words = {"support": None, "penalised": None}
    if draw.ragged["as_sampled"]:
        support, penalised = (draw.ids.random((B, T, V)) < share for share in (0.5, 0.2))
        np.put_along_axis(support, tokens[..., None], True, axis=-1)
        words = {"support": _bits(support), "penalised": _bits(penalised)}
    return {"hidden": hidden, "head": head, "tokens": tokens, **words}


def _logits(hidden, head, support, penalised):
    logits = jnp.einsum("btd,dv->btv", hidden, head)
    if penalised is not None:
        less = jnp.where(logits > 0, logits / _PENALTY, logits * _PENALTY)
        logits = jnp.where(_of_bits(penalised, logits.shape[-1]), less, logits)
    logits = logits / _TEMPERATURE
    return logits if support is None else jnp.where(_of_bits(support, logits.shape[-1]), logits, _OUTSIDE)


def _likeliest(every):
    return jax.lax.stop_gradient(jnp.max(every, axis=-1))


def _twin(hidden, head, tokens, support, penalised, **_):
    every = jax.nn.log_softmax(_logits(hidden, head, support, penalised), axis=-1)
    entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
    return jnp.take_along_axis(every, jnp.asarray(tokens)[..., None], axis=-1)[..., 0], entropy, _likeliest(every)


def _size(hidden, head):
    """Of a position's logits: the largest sum of magnitudes, and what a log of a sum may add."""
    return 4 + np.max(np.einsum("btd,dv->btv", np.abs(hidden), np.abs(head)), axis=-1)


def _bound(tolerance, hidden, head, **_):
    size = tolerance * _size(hidden, head) * _PENALTY / _TEMPERATURE
    return size, size * np.log(head.shape[1] + 1), size


def _run(hidden, head, tokens, support, penalised, chunk):
    words = {"support": support, "penalised": penalised}
    return token_logprobs(hidden, head, tokens, temperature=_TEMPERATURE, penalty=_PENALTY, chunk=chunk, **words)


def _run_sharded(hidden, head, tokens, support, penalised, mesh, devices):
    words = {"support_BTW": support, "penalised_BTW": penalised}
    layout = layout_of(devices, MESHES[mesh])
    return sharded_logprobs(hidden, head, tokens, layout, temperature=_TEMPERATURE, penalty=_PENALTY, **words)


TOKEN_LOGPROBS = Kernel(
    name="token_logprobs",
    run=_run,
    twin=_twin,
    bound=_bound,
    inputs=lambda draw: {**_inputs(draw), "chunk": draw.sizes["chunk"]},
    sizes={"B": (1, 3), "T": (1, 5), "D": (8,), "V": (5, 70), "chunk": (1, 2, 8)},
    ragged={"as_sampled": choices(0, 1)},
    compiled=({"B": 4, "T": 512, "D": 1024, "V": 32768, "chunk": 64},),
    **_ALIKE,
)
SHARDED_LOGPROBS = Kernel(
    name="sharded_logprobs",
    run=_run_sharded,
    twin=_twin,
    bound=_bound,
    inputs=lambda draw: {**_inputs(draw), "mesh": draw.sizes["mesh"]},
    sizes={"B": (8,), "T": (2, 6), "D": (8,), "V": (64, 160), "mesh": tuple(MESHES)},
    ragged={"as_sampled": choices(0, 1)},
    compiled=({"B": 8, "T": 512, "D": 1024, "V": 32768, "mesh": "tensor"},),
    devices=8,
    **_ALIKE,
)


# --- divergences ---------------------------------------------------------------------------------


def _divergence_inputs(draw: Draw) -> dict[str, Any]:
    B, T, D, V = draw.of("B", "T", "D", "V")
    of_student = draw.numbers(B, T, D), draw.numbers(D, V, scale=2 * D**-0.5)
    # one teacher is as wide as the student, the other wider
    of_teachers = tuple(
        (draw.numbers(B, T, width), draw.numbers(width, V, scale=2 * width**-0.5)) for width in (D, 2 * D)
    )
    tokens = draw.integers(0, V, B, T)
    given = {"hidden": of_student[0], "head": of_student[1], "teachers": of_teachers, "tokens": tokens}
    return {**given, "direction": draw.sizes["direction"]}


def _of(direction: Any) -> Divergence:
    return Divergence(direction=direction, temperature=2.0, weights=(0.25, 0.75))


def _divergence_twin(hidden, head, teachers, tokens, direction, **_):
    logits = jnp.einsum("btd,dv->btv", hidden, head)
    ours, value = jax.nn.log_softmax(logits / 2, axis=-1), 0.0
    for weight, (states, theirs) in zip((0.25, 0.75), teachers, strict=True):
        p = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", states, theirs) / 2, axis=-1)
        kl = jnp.exp(p) * (p - ours) if direction == "forward" else jnp.exp(ours) * (ours - p)
        value += 4 * weight * jnp.sum(kl, axis=-1)
    every = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(every, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]
    return value, chosen, -jnp.sum(jnp.exp(every) * every, axis=-1), _likeliest(every)


def _divergence_bound(tolerance, hidden, head, teachers, **_):
    size = _size(hidden, head)
    of_all = size + sum(_size(*of) for of in teachers)
    entropy = size * np.log(head.shape[1] + 1)
    return tuple(tolerance * of for of in (4 * of_all * of_all, size, entropy, size))


def _run_divergences(hidden, head, teachers, tokens, direction, chunk):
    return token_divergences(hidden, head, teachers, tokens, _of(direction), chunk=chunk)


def _run_sharded_divergences(hidden, head, teachers, tokens, direction, mesh, devices):
    return sharded_divergences(hidden, head, teachers, tokens, _of(direction), layout_of(devices, MESHES[mesh]))


TOKEN_DIVERGENCES = Kernel(
    name="token_divergences",
    run=_run_divergences,
    twin=_divergence_twin,
    bound=_divergence_bound,
    inputs=lambda draw: {**_divergence_inputs(draw), "chunk": draw.sizes["chunk"]},
    sizes={"B": (1, 3), "T": (1, 5), "D": (8,), "V": (5, 70), "chunk": (1, 2, 8), "direction": ("forward", "reverse")},
    compiled=({"B": 4, "T": 256, "D": 1024, "V": 32768, "chunk": 64, "direction": "reverse"},),
    **_ALIKE,
)
SHARDED_DIVERGENCES = Kernel(
    name="sharded_divergences",
    run=_run_sharded_divergences,
    twin=_divergence_twin,
    bound=_divergence_bound,
    inputs=lambda draw: {**_divergence_inputs(draw), "mesh": draw.sizes["mesh"]},
    sizes={"B": (8,), "T": (2,), "D": (8,), "V": (64,), "mesh": tuple(MESHES), "direction": ("forward", "reverse")},
    compiled=({"B": 8, "T": 256, "D": 1024, "V": 32768, "mesh": "tensor", "direction": "reverse"},),
    devices=8,
    **_ALIKE,
)
