"""A critic: what each state of a sequence is worth, by a decoder's trunk and one vector."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoder import Decoder, Hidden
from deepseek_jax.model.layers import Maker
from deepseek_jax.model.scoring import real_tokens, routing_of
from deepseek_jax.sharding import LOCAL, Layout


class CriticOutput(NamedTuple):
    """Values of one forward pass, float32 [B, T], and the trunk's routing, load_LE and balance as `Scored` has them."""

    values_BT: jax.Array
    load_LE: jax.Array | None
    balance: jax.Array


class Critic(nnx.Module):
    """A decoder without head and MTP modules, and a vector that its last states are multiplied by.

    The vector starts at 0: values are 0 until the first update. It is float32 whatever the trunk is.

    Args:
        config: the policy's architecture.
        rngs, dtype, layout: as for `Decoder`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs | None,
        dtype: jnp.dtype = jnp.float32,
        layout: Layout = LOCAL,
    ):
        # Tied to its embedding, a decoder makes no head of its own; this one is never asked for logits.
        headless = dataclasses.replace(config, tie_word_embeddings=True, num_nextn_predict_layers=0)
        self.trunk = Decoder(headless, rngs=rngs, dtype=dtype, layout=layout)
        self.value_D = Maker(config, rngs, jnp.float32, layout).shift(config.hidden_size, None)

    def __call__(self, tokens_BT: jax.Array, mask_BT: jax.Array | None = None) -> tuple[jax.Array, Hidden]:
        """Values, float32 [B, T], of whole sequences as `Decoder` takes them, and the trunk's states."""
        hidden = self.trunk(tokens_BT, mask_BT)
        # Multiplied and added up, not a matrix product: those round float32 down on some devices.
        return jnp.sum(hidden.x_BTD.astype(jnp.float32) * self.value_D[...], axis=-1), hidden


def value_of(critic: Critic, tokens_BT: jax.Array, mask_BT: jax.Array) -> CriticOutput:
    """What the state after each token is worth, just before the next one is chosen.

    Args:
        critic: merged.
        tokens_BT: int32 inputs from position 0, padded on the right; column t's value stands beside the log-prob of
            the target of column t.
        mask_BT: where a target counts, as for `score`; routing statistics are over real tokens only.
    """
    values_BT, hidden = critic(tokens_BT, real_tokens(mask_BT))
    load_LE, balance, _ = routing_of(hidden.stats)
    return CriticOutput(values_BT, load_LE, balance)


def critic_from(
    config: ModelConfig, weights: nnx.State, layout: Layout = LOCAL
) -> tuple[nnx.GraphDef[Critic], nnx.State]:
    """A critic that starts from a policy's trunk, or from a reward model's, with values of 0.

    Args:
        config: the policy's architecture.
        weights: the policy's, of whatever dtype; copied, so that either can be trained on.
        layout: the one they have; the critic's is the same.

    Returns:
        Graph and weights: the policy's under `trunk`, without head and MTP modules, router biases among them.

    Raises:
        ValueError: the weights are not those of this architecture and layout.

    Source: arXiv 2203.02155 section 3.5 starts from a reward model's weights and trains critic and policy apart.
    """
    graphdef, like = nnx.split(Critic(config, rngs=None, layout=layout))
    have = dict(nnx.to_flat_state(weights))
    for path, leaf in nnx.to_flat_state(like["trunk"]):
        if path not in have or have[path].get_raw_value().shape != leaf.get_raw_value().shape:
            got = "nothing" if path not in have else list(have[path].get_raw_value().shape)
            wanted = list(leaf.get_raw_value().shape)
            raise ValueError(
                f"weights: {'.'.join(map(str, path))}: got {got}, wanted {wanted}; give those of this config and layout"
            )

    @jax.jit
    def made(weights):
        have = dict(nnx.to_flat_state(weights))
        trunk = [(("trunk", *path), jax.tree.map(jnp.copy, have[path])) for path, _ in nnx.to_flat_state(like["trunk"])]
        value = like["value_D"]
        zeros = value.replace(jnp.zeros(value.get_raw_value().shape, jnp.float32))
        return layout.stored(nnx.from_flat_state([*trunk, (("value_D",), zeros)]))

    return graphdef, made(weights)
