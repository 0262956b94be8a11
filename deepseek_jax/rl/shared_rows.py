"""How many samples of a group are to share a row with their prompt: the number at which an update computes least.

A prompt in a row with k samples is computed once for k; but every query of a row meets every key, those of the other
samples too, so that long samples are better off in rows of their own.
"""

import math
from typing import NamedTuple

from flax import nnx

from deepseek_jax.config import GQAConfig, ModelConfig
from deepseek_jax.model.decoder import abstract_weights


class Work(NamedTuple):
    """Multiply-adds of a forward pass: `token`, of a token with all weights, `pair`, of a query and a key."""

    token: float
    pair: float

    def of_rows(self, rows: int, width: int) -> float:
        return rows * width * (self.token + width * self.pair)


class Shape(NamedTuple):
    """Rows of an update, their columns, and the samples that one holds at most."""

    rows: int
    width: int
    per_row: int


def work_of(config: ModelConfig) -> Work:
    """What a token and a pair cost, all layers and heads; the choice of experts and of keys is left out."""
    a = config.attention
    _, weights = abstract_weights(config)
    widths = 2 * a.head_dim if isinstance(a, GQAConfig) else a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim
    token = sum(_met(path, leaf.get_raw_value().shape, config) for path, leaf in nnx.to_flat_state(weights))
    return Work(token, config.num_hidden_layers * config.num_attention_heads * widths)


def _met(path: tuple, shape: tuple[int, ...], config: ModelConfig) -> float:
    """Numbers of a weight that a token is multiplied with."""
    if len(shape) < 2 or path[0] == "mtp" or (path[0] == "embed" and not config.tie_word_embeddings):
        return 0
    share = config.moe.num_experts_per_tok / config.moe.n_routed_experts if "experts" in path else 1
    return math.prod(shape) * share


def shared_shape(
    work: Work, *, groups: int, group_size: int, prompt: int, completion: int, rows_of: int = 1, width_of: int = 1
) -> Shape:
    """The rows of an update that cost least, for the longest prompts and completions; 1 sample a row shares nothing.

    Args:
        work: of the model.
        groups: prompts of the update.
        group_size: samples a prompt.
        prompt: tokens at most.
        completion: tokens at most.
        rows_of: what the number of rows is a multiple of.
        width_of: what columns are a multiple of.
    """
    up = lambda number, of: -(-number // of) * of
    alone = Shape(groups * group_size, prompt - 1 + completion, 1)
    shapes = [alone]
    for parts in range(1, group_size):
        per_row = -(-group_size // parts)
        width = up(prompt - 1 + per_row * completion, width_of)
        shapes.append(Shape(up(groups * parts, rows_of), width, per_row))
    return min(shapes, key=lambda shape: work.of_rows(shape.rows, shape.width))
