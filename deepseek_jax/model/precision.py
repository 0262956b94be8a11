"""The two precisions of training: float32 masters, and what the model computes in."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.layers import RouterBias

Precision = Literal["auto", "float32", "bfloat16"]


def dtype_of(precision: Precision) -> jnp.dtype:
    """What to compute in: "auto" is bfloat16 on accelerators, and float32 on the CPU, where it is ten times faster."""
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def convert_dtype(weights: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """All weights in one dtype, router biases excepted, which are float32."""
    is_variable = lambda x: isinstance(x, nnx.Variable)
    to = lambda leaf: leaf.replace(leaf[...].astype(jnp.float32 if isinstance(leaf, RouterBias) else dtype))
    return jax.tree.map(to, weights, is_leaf=is_variable)


def computed(weights: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """`convert_dtype`, compiled. Weights that have the dtype already are the very same arrays, which no call copies."""
    params, _ = nnx.split_state(weights, nnx.Param, ...)
    return weights if all(leaf.dtype == dtype for leaf in jax.tree.leaves(params)) else _compiled(weights, dtype)


_compiled = jax.jit(convert_dtype, static_argnames="dtype")
