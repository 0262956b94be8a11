"""Weights that a loader would refuse are not written."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.checkpoint import names


def check_finite(weights: nnx.State, target: Path) -> None:
    """Refuse NaN and infinity before a folder of them is made. Several processes all call this.

    Args:
        weights: to be written, under whatever layout they lie.
        target: where to, for the message.

    Raises:
        ValueError: which weight holds some.
    """
    flat = nnx.to_flat_state(weights)
    finite = jax.device_get(_all_finite([leaf.get_raw_value() for _, leaf in flat]))
    for (path, _), good in zip(flat, finite, strict=True):
        if not good:
            raise ValueError(
                f"{target}: not written: weight {names.key(path)} holds NaN or infinity; go back to a good checkpoint"
            )


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(array)) for array in arrays]
