"""How an engine runs: how many requests at a time, on how much memory, in what steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.distributed import all_gather_objects
from deepseek_jax.generation.scheduler import SchedulerConfig
from deepseek_jax.model.cache import abstract_cache, cache_axis
from deepseek_jax.sharding import Layout

CacheDType = Literal["auto", "bfloat16", "fp8", "int8"]
_DTYPES = {"bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
_WITHOUT_STATISTICS = 2**31  # bytes of cache where a device does not say what memory it has


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs.

    Args:
        max_num_seqs: requests that run at a time, each in a slot.
        max_model_len: most tokens of a request, prompt included; None takes the model's context.
        max_num_batched_tokens: tokens computed in a step at most; no less than a token of every slot with its drafts.
        chunk: prompt tokens of a request in a step at most; a longer prompt takes several.
        block_size: tokens of a block of the cache.
        num_blocks: of the cache, for each part of the mesh, the null block among them. None: as many as all slots can
            use, within `memory_utilization`.
        memory_utilization: share of a device's free memory for the cache.
        cache_dtype: what the cache keeps: "auto", the dtype of the weights, which is what a trainer samples with,
            "bfloat16", or "fp8" or "int8", codes with a scale a token and head (`ops.codes`).
        prefix_caching: reuse the blocks of prompts that begin alike.
        admission: "reserve" room for a request's last token when it begins, or "preempt" the youngest when room is out.
        decode_steps: tokens of a row that the device draws before it looks at the host again.
        overlap: plan and dispatch a step before the one ahead of it has come back.
        drafts: who guesses the tokens that a step verifies beside the latest: "mtp", the model's modules, or "lookup",
            what followed the last tokens when they came before; None: nobody.
        draft_tokens: how many are guessed.
        batch_sizes: numbers of rows that programs are compiled for, on each part of the mesh; None: some twenty of them
            up to `max_num_seqs`.
    """

    max_num_seqs: int = 32
    max_model_len: int | None = None
    max_num_batched_tokens: int = 1024
    chunk: int = 256
    block_size: int = 32
    num_blocks: int | None = None
    memory_utilization: float = 0.8
    cache_dtype: CacheDType = "auto"
    prefix_caching: bool = True
    admission: Literal["reserve", "preempt"] = "reserve"
    decode_steps: int = 8
    overlap: bool = True
    drafts: Literal["mtp", "lookup"] | None = None
    draft_tokens: int = 0
    batch_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        checks = {
            "block_size": (self.block_size >= 1, "at least 1 token"),
            "memory_utilization": (0 < self.memory_utilization <= 1, "more than 0, at most 1"),
            "cache_dtype": (self.cache_dtype in get_args(CacheDType), ", ".join(get_args(CacheDType))),
            "drafts": (self.drafts in (None, "mtp", "lookup"), '"mtp", "lookup" or None'),
            "draft_tokens": (
                self.draft_tokens >= 1 if self.drafts else self.draft_tokens == 0,
                "at least 1" if self.drafts else "0 without drafts",
            ),
            "batch_sizes": (self.batch_sizes is None or min(self.batch_sizes, default=0) >= 1, "sizes of at least 1"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")

    def dtype_of_cache(self, of_weights: jnp.dtype) -> jnp.dtype:
        """What the cache of a model with such weights keeps."""
        return jnp.dtype(_DTYPES.get(self.cache_dtype, of_weights))

    def of_scheduler(self, config: ModelConfig, layout: Layout, dtype: jnp.dtype) -> SchedulerConfig:
        """What the scheduler is to know; `dtype` is the weights'.

        Raises:
            ValueError: a length that the model does not have, drafts that it cannot make, slots that the mesh does not
                divide, or what `SchedulerConfig` refuses.
        """
        context = config.max_position_embeddings
        length = context if self.max_model_len is None else self.max_model_len
        if not 0 < length <= context:
            raise ValueError(f"max_model_len: got {length}, wanted 1 to {context}, the model's context")
        if self.drafts == "mtp" and not config.num_nextn_predict_layers:
            raise ValueError('drafts: got "mtp" for a model without MTP modules, wanted "lookup" or None')
        shards = layout.parts(cache_axis(config))
        slots = -(-self.max_num_seqs // shards) * shards
        return SchedulerConfig(
            max_num_seqs=slots,
            max_num_batched_tokens=max(self.max_num_batched_tokens, slots * (1 + self.draft_tokens)),
            chunk=min(self.chunk, self.max_num_batched_tokens),
            num_blocks=self.num_blocks or self._blocks(config, layout, dtype, length, slots // shards),
            block_size=self.block_size,
            max_model_len=length,
            num_shards=shards,
            prefix_caching=self.prefix_caching,
            admission=self.admission,
            decode_steps=self.decode_steps,
            draft_tokens=self.draft_tokens,
            mtp=self.drafts == "mtp",
        )

    def _blocks(self, config, layout, dtype, length: int, slots: int) -> int:
        wanted = 1 + slots * -(-(length + self.draft_tokens) // self.block_size)
        shards = layout.parts(cache_axis(config))
        of_cache = self.dtype_of_cache(dtype)
        cache = abstract_cache(config, shards, self.block_size, of_cache, layout, drafts=self.drafts == "mtp")
        held = lambda leaf: leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        block = sum(int(np.prod(held(leaf))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        device, *_ = jax.local_devices() if layout.mesh is None else layout.mesh.local_devices
        memory = device.memory_stats() or {}
        # all processes plan alike, so they have as many blocks as the one with the least memory
        free = min(all_gather_objects(memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)))
        room = int(free * self.memory_utilization) if free > 0 else _WITHOUT_STATISTICS
        return max(2, min(wanted, room // block))


def row_buckets(most: int, sizes: tuple[int, ...] | None = None) -> list[int]:
    """Numbers of rows that a decode loop is compiled for: powers of two, from 8 on with their middles between them.

    >>> row_buckets(40)
    [1, 2, 4, 8, 12, 16, 24, 32, 40]
    >>> row_buckets(40, (8, 16))
    [8, 16, 40]
    """
    if sizes is None:
        both = (n for exponent in range(most.bit_length()) for n in (1 << exponent, 3 << exponent >> 1))
        sizes = tuple(n for n in both if n not in (3, 6))
    return sorted({n for n in sizes if n < most}) + [most]


def span_buckets(
    chunk: int, tokens: int, rows: int, least: int = 16, sizes: tuple[int, ...] | None = None
) -> list[tuple[int, int]]:
    """Shapes (rows, tokens of a row) that `extend` is compiled for: powers of four within the budget of a step, and
    half of the longest, whose padding would cost most.

    >>> span_buckets(256, 1024, 32)
    [(1, 16), (4, 16), (16, 16), (32, 16), (1, 64), (4, 64), (16, 64), (1, 128), (4, 128), (8, 128), (1, 256), (4, 256)]
    """
    longest = -(-chunk // least) * least
    widths = [least]
    while widths[-1] < longest:
        widths.append(min(widths[-1] * 4, longest))
    half = -(-longest // (2 * least)) * least
    widths = sorted({*widths, half})
    by_four = tuple(4**exponent for exponent in range(16))
    of_width = lambda width: sizes if sizes is not None and width == least else by_four
    most = lambda width: max(1, min(rows, tokens // width))
    return [(size, width) for width in widths for size in row_buckets(most(width), of_width(width))]


def rows_at_once(sizes: Sequence[int], rows: int, width: int) -> int:
    """How many of so many rows a call takes: all, unless padding to the next size costs more than another call, which
    for rows of 64 tokens or more it does where more than a quarter is empty.

    >>> [rows_at_once((1, 4, 16), rows, 256) for rows in (1, 2, 3, 4, 5, 12, 20)]
    [1, 1, 4, 4, 4, 16, 16]
    >>> rows_at_once((1, 4, 16), 5, 16)
    16
    """
    enough = next((size for size in sizes if size >= rows), sizes[-1])
    if width < 64 or 3 * enough <= 4 * rows:
        return enough
    return max((size for size in sizes if size <= rows), default=enough)
