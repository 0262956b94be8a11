"""Cases of single operations, each beside a peer that does as many FLOPs or reads as many bytes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops.experts import expert_mlp
from deepseek_jax.ops.logprobs import logprobs_of_logits, token_logprobs
from deepseek_jax.ops.low_rank import product
from deepseek_jax.ops.packed import Packing
from deepseek_jax.parallel.causal_attention import causal_attention
from deepseek_jax.sharding import LOCAL
from tools.suite.case import Case, Work, clocked
from tools.suite.peers import torch_attention, why_none
from tools.suite.subject import Subject


class Shapes(NamedTuple):
    """Of the operations.

    Attributes:
        attention: sequences, tokens, heads, groups of keys, width of a head.
        experts: number, rows, width, inner width, experts a token.
        matrix: rows of the input, inputs, outputs, of a product with codes.
        vocabulary: rows, width and words, of log-probs.
    """

    attention: tuple[int, int, int, int, int]
    experts: tuple[int, int, int, int, int]
    matrix: tuple[int, int, int]
    vocabulary: tuple[int, int, int]


SHAPES = {
    "cpu": Shapes((1, 1024, 9, 3, 64), (64, 4096, 256, 128, 4), (8, 2048, 4096), (512, 576, 49_152)),
    "quick": Shapes((1, 64, 2, 1, 16), (4, 64, 16, 16, 2), (2, 128, 128), (16, 16, 256)),
}
# DeepSeek-V3's: heads of a share of 8 chips, its experts on 8 of them, a down projection, a piece of its vocabulary
ACCELERATOR = Shapes((1, 8192, 16, 16, 128), (32, 16_384, 7168, 2048, 8), (64, 7168, 16_384), (4096, 7168, 129_280))


def kernels(of: Subject, shapes: Shapes | None = None) -> Iterator[Case]:
    """Attention, experts, products with codes, log-probs."""
    shapes = shapes or SHAPES.get(jax.default_backend(), ACCELERATOR)
    make = _maker(of.dtype)
    yield _attention(of.dtype, make, *shapes.attention)
    yield _experts(of.dtype, make, *shapes.experts)
    for scheme in ("fp8", "int8", "int4"):
        yield _codes(of.dtype, make, scheme, *shapes.matrix)
    yield _logprobs(of.dtype, make, *shapes.vocabulary)


def _maker(dtype: str) -> Callable[..., jax.Array]:
    rng = np.random.default_rng(0)
    return lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, jnp.dtype(dtype))


def _attention(dtype: str, make: Callable, B: int, T: int, N: int, G: int, K: int) -> Case:
    q, k, v = make(B, T, N, K), make(B, G, T, K), make(B, G, T, K)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1, 2))
    def gradients(q, k, v):
        return jnp.sum(causal_attention(q, k, v, None, scale=K**-0.5, layout=LOCAL)[0].astype(jnp.float32))

    lacking = why_none()
    pairs = B * N * T * (T + 1) // 2
    itemsize = jnp.dtype(dtype).itemsize
    return Case(
        suite="kernels",
        name=f"causal attention with gradients, {B} x {T}, {N} heads of {K}",
        unit="tokens",
        amount=B * T,
        work=Work(3 * 4 * K * pairs, 4 * itemsize * (q.size + k.size)),
        ours=clocked(lambda: gradients(q, k, v)),
        dtype=dtype,
        peer=None if lacking else clocked(torch_attention(q, k, v, dtype)),
        peer_name="torch",
        alone=lacking,
    )


def _experts(dtype: str, make: Callable, E: int, W: int, D: int, M: int, A: int) -> Case:
    """Beside dense products of as many FLOPs: what groups cost."""
    rng = np.random.default_rng(0)
    x, weights = make(W, D), jnp.full((W, A), 1 / A, jnp.float32)
    chosen = jnp.asarray(np.argsort(rng.random((W, E)), axis=1)[:, :A], jnp.int32)
    gate, up, down = make(E, D, M), make(E, D, M), make(E, M, D)
    grouped = jax.jit(expert_mlp)

    @jax.jit
    def dense(rows, gate, up, down):
        return (jax.nn.silu(rows @ gate) * (rows @ up)) @ down

    rows = make(W * A, D)
    return Case(
        suite="kernels",
        name=f"{E} experts of {D} x {M}, {W} rows, {A} each",
        unit="rows",
        amount=W,
        work=Work(6 * W * A * D * M, (gate.nbytes + up.nbytes + down.nbytes) + 2 * x.nbytes),
        ours=clocked(lambda: grouped(x, weights, chosen, gate, up, down)),
        peer=clocked(lambda: dense(rows, gate[0], up[0], down[0])),
        peer_name="one expert of all rows",
        dtype=dtype,
    )


def _codes(dtype: str, make: Callable, scheme: str, B: int, D: int, F: int) -> Case:
    """Beside the same product with the matrix in full."""
    x, whole = make(B, D), make(D, F)
    packed = jax.jit(Packing(scheme=scheme).pack)(whole.astype(jnp.float32))
    with_codes, with_whole = jax.jit(product), jax.jit(jnp.matmul)
    return Case(
        suite="kernels",
        name=f"{B} rows x {D} x {F} in {scheme}",
        unit="rows",
        amount=B,
        work=Work(2 * B * D * F, packed.nbytes),
        ours=clocked(lambda: with_codes(x, packed)),
        peer=clocked(lambda: with_whole(x, whole)),
        peer_name=f"in {dtype}",
        dtype=dtype,
    )


def _logprobs(dtype: str, make: Callable, W: int, D: int, V: int) -> Case:
    """With gradients, in chunks as in training, beside all logits at once."""
    x, head = make(1, W, D), make(D, V)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, V, (1, W)), jnp.int32)
    in_chunks = lambda x, head: jnp.sum(token_logprobs(x, head, targets)[0])
    at_once = lambda x, head: jnp.sum(logprobs_of_logits((x @ head).astype(jnp.float32), targets)[0])
    ours, peer = (jax.jit(jax.grad(form, argnums=(0, 1))) for form in (in_chunks, at_once))
    return Case(
        suite="kernels",
        name=f"log-probs with gradients, {W} of {V:,}",
        unit="tokens",
        amount=W,
        work=Work(6 * W * D * V, 3 * head.nbytes),
        ours=clocked(lambda: ours(x, head)),
        peer=clocked(lambda: peer(x, head)),
        peer_name="all logits at once",
        dtype=dtype,
    )
