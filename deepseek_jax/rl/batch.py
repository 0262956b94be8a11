"""Samples laid out for an update: one a row, or several packed into a row."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.generation.completion import Completion
from deepseek_jax.generation.generator import bucket


class Batch(NamedTuple):
    """Samples for an update, padded on the right. Column t speaks of the token that position t predicts.

    tokens_BT int32: prompt and completion, without the last token; targets_BT: the same one step on;
    mask_BT: true where the target belongs to the completion and counts; old_logprobs_BT: those that the ratio
    compares with, first the sampler's; ref_logprobs_BT: the reference model's (zeros until someone scores them);
    advantages_BT: of the target.

    Packed rows have segments_BT int32, from 1 the number of the sample in its row, 0 for padding, and lengths_BK int32,
    the completion tokens of each, 0 where there is none. In rows of one sample both are None.

    The others are None where nobody wants them: sampler_logprobs_BT, what the sampler said, once old_logprobs_BT is
    what the trainer says; routes_BTLA, the experts that sampling went through; support_BTW, the tokens among which each
    target was drawn, as bits; penalised_BTW, those that the repetition penalty was on; high_entropy_BT, where the
    policy term counts, if not everywhere; entropy_coef_B float32, the weight of the entropy bonus, alike in every row.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    mask_BT: np.ndarray
    old_logprobs_BT: np.ndarray
    ref_logprobs_BT: np.ndarray
    advantages_BT: np.ndarray
    segments_BT: np.ndarray | None = None
    lengths_BK: np.ndarray | None = None
    sampler_logprobs_BT: np.ndarray | None = None
    routes_BTLA: np.ndarray | None = None
    support_BTW: np.ndarray | None = None
    penalised_BTW: np.ndarray | None = None
    high_entropy_BT: np.ndarray | None = None
    entropy_coef_B: np.ndarray | None = None

    @property
    def per_row(self) -> int:
        """Samples that a row can hold."""
        return 1 if self.lengths_BK is None else self.lengths_BK.shape[1]


class PackedSlot(NamedTuple):
    """Where a sample lies: its row, its first column, and which one of the row it is, from 0."""

    row: int
    start: int
    number: int


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    advantages: np.ndarray,
    *,
    width: int | None = None,
    mask_truncated: bool = False,
) -> Batch:
    """One sample a row.

    Args:
        prompts, completions: one of each a sample.
        advantages: float32 [B], one a sample.
        width: columns; None takes the next power of two. ValueError when a sample is longer.
        mask_truncated: completions that reached the limit of their length do not count.
    """
    longest = max(_lengths(prompts, completions))
    width = bucket(longest) if width is None else width
    if longest > width:
        raise ValueError(f"width: got {width}, wanted at least {longest}, the longest prompt and completion")
    slots = [PackedSlot(row, 0, 0) for row in range(len(prompts))]
    batch = _laid_out(prompts, completions, advantages, slots, (len(prompts), width), 1, mask_truncated)
    return batch._replace(segments_BT=None, lengths_BK=None)


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    advantages: np.ndarray,
    *,
    width: int,
    per_row: int,
    rows_of: int,
    mask_truncated: bool = False,
) -> Batch:
    """Several samples a row, the longest first, each in the first row with room for it.

    Args:
        prompts, completions, advantages, mask_truncated: as for `make_batch`.
        width: columns. ValueError when a sample is longer.
        per_row: samples a row at most.
        rows_of: their number is a multiple of this, so that an update compiles for few of them; empty rows fill up.
    """
    lengths = _lengths(prompts, completions)
    if max(lengths) > width:
        raise ValueError(f"width: got {width}, wanted at least {max(lengths)}, the longest prompt and completion")
    slots = first_fit(lengths, width, per_row)
    rows = max(slot.row for slot in slots) + 1
    shape = (-(-rows // rows_of) * rows_of, width)
    return _laid_out(prompts, completions, advantages, slots, shape, per_row, mask_truncated)


def first_fit(lengths: Sequence[int], width: int, per_row: int) -> list[PackedSlot]:
    """Each sample's place, found from the longest to the shortest; of equal ones the first comes first."""
    used: list[int] = []
    held: list[int] = []
    slots: dict[int, PackedSlot] = {}
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (r for r in range(len(used)) if held[r] < per_row and used[r] + lengths[sample] <= width)
        row = next(fits, len(used))
        if row == len(used):
            used.append(0)
            held.append(0)
        slots[sample] = PackedSlot(row, used[row], held[row])
        used[row] += lengths[sample]
        held[row] += 1
    return [slots[sample] for sample in range(len(lengths))]


def rows_multiple(samples: int, parts: int) -> int:
    """What the number of packed rows is a multiple of, so that rows come in at most eight numbers.

    Each number is a compilation. `parts` is what rows are divided into, by micro-batches and the mesh.
    """
    return math.ceil(math.ceil(samples / 8) / parts) * parts


def _lengths(prompts, completions) -> list[int]:
    """Columns that each sample takes: its tokens without the last."""
    return [len(p) + len(c.tokens) - 1 for p, c in zip(prompts, completions, strict=True)]


def _laid_out(prompts, completions, advantages, slots: list[PackedSlot], shape, per_row: int, mask_truncated) -> Batch:
    batch = _empty(shape, per_row, completions[0])
    for prompt, completion, advantage, slot in zip(prompts, completions, advantages, slots, strict=True):
        text = np.concatenate([prompt, completion.tokens]).astype(np.int32)
        all_of = slice(slot.start, slot.start + len(text) - 1)
        drawn = slice(slot.start + len(prompt) - 1, slot.start + len(text) - 1)
        batch.tokens_BT[slot.row, all_of] = text[:-1]
        batch.targets_BT[slot.row, all_of] = text[1:]
        batch.segments_BT[slot.row, all_of] = slot.number + 1
        batch.lengths_BK[slot.row, slot.number] = len(completion.tokens)
        batch.mask_BT[slot.row, drawn] = completion.finished or not mask_truncated
        batch.old_logprobs_BT[slot.row, drawn] = completion.logprobs
        batch.advantages_BT[slot.row, drawn] = advantage
        if completion.routes is not None:
            batch.routes_BTLA[slot.row, all_of] = completion.routes
        if completion.support is not None:
            batch.support_BTW[slot.row, drawn] = completion.support
        if completion.penalised is not None:
            batch.penalised_BTW[slot.row, drawn] = completion.penalised
    return batch


def _empty(shape: tuple[int, int], per_row: int, like: Completion) -> Batch:
    routes, support, penalised = like.routes, like.support, like.penalised
    return Batch(
        tokens_BT=np.zeros(shape, np.int32),
        targets_BT=np.zeros(shape, np.int32),
        mask_BT=np.zeros(shape, bool),
        old_logprobs_BT=np.zeros(shape, np.float32),
        ref_logprobs_BT=np.zeros(shape, np.float32),
        advantages_BT=np.zeros(shape, np.float32),
        segments_BT=np.zeros(shape, np.int32),
        lengths_BK=np.zeros((shape[0], per_row), np.int32),
        routes_BTLA=None if routes is None else np.zeros((*shape, *routes.shape[1:]), routes.dtype),
        # where nothing was drawn every token is allowed
        support_BTW=None if support is None else np.full((*shape, support.shape[1]), 0xFFFFFFFF, np.uint32),
        penalised_BTW=None if penalised is None else np.zeros((*shape, penalised.shape[1]), np.uint32),
    )
