"""Samples laid out for an update: one a row, or several packed into a row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.generation.completion import Completion
from deepseek_jax.generation.generator import bucket
from deepseek_jax.rl.slots import PackedSlot, Text, first_fit, fit_shared


class Batch(NamedTuple):
    """Samples for an update, padded on the right. Column t speaks of the token that position t predicts.

    tokens_BT int32: prompt and completion, without the last token; targets_BT: the same one step on;
    mask_BT: true where the target belongs to the completion and counts; old_logprobs_BT: those that the ratio
    compares with, first the sampler's; ref_logprobs_BT: the reference model's (zeros until someone scores them);
    advantages_BT: of the target.

    Packed rows have segments_BT int32, from 1 the number of the sample in its row, 0 for padding, and lengths_BK int32,
    the completion tokens of each, 0 where there is none. In rows of one sample both are None.
    Where samples share prompts there is prompt_of_BT int32, and a prompt but for its last token is a segment with a
    number above K; see `model.decoder.Decoder`. Its targets do not count, and its advantages are 0.
    drawn_BU int32: the columns of completions, ascending, then T; None where they are nearly all.

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
    prompt_of_BT: np.ndarray | None = None
    drawn_BU: np.ndarray | None = None
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


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    advantages: np.ndarray,
    *,
    width: int | None = None,
    drawn: int | None = None,
    mask_truncated: bool = False,
) -> Batch:
    """One sample a row.

    Args:
        prompts, completions: one of each a sample.
        advantages: float32 [B], one a sample.
        width: columns; None takes the next power of two. ValueError when a sample is longer.
        drawn: tokens of a row's completions at most, where they are few of its columns; see `Batch.drawn_BU`.
        mask_truncated: completions that reached the limit of their length do not count.
    """
    longest = max(_lengths(prompts, completions))
    width = bucket(longest) if width is None else width
    if longest > width:
        raise ValueError(f"width: got {width}, wanted at least {longest}, the longest prompt and completion")
    slots = [PackedSlot(row, 0, 0) for row in range(len(prompts))]
    batch = _laid_out(prompts, completions, advantages, slots, (len(prompts), width), 1, mask_truncated)
    return _with_drawn(batch, drawn)._replace(segments_BT=None, lengths_BK=None, prompt_of_BT=None)


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    advantages: np.ndarray,
    *,
    width: int,
    per_row: int,
    rows_of: int,
    share_prompts: bool = False,
    drawn: int | None = None,
    mask_truncated: bool = False,
) -> Batch:
    """Several samples a row, the longest first, each in the first row with room for it.

    Args:
        prompts, completions, advantages, drawn, mask_truncated: as for `make_batch`.
        width: columns. ValueError when a sample is longer.
        per_row: samples a row at most.
        rows_of: their number is a multiple of this, so that an update compiles for few of them; empty rows fill up.
        share_prompts: equal prompts in a row are laid there once.
    """
    lengths = _lengths(prompts, completions)
    if max(lengths) > width:
        raise ValueError(f"width: got {width}, wanted at least {max(lengths)}, the longest prompt and completion")
    if share_prompts:
        texts = [Text(_same_prompt(p, c), len(p) - 1, len(c.tokens)) for p, c in zip(prompts, completions, strict=True)]
        slots = fit_shared(texts, width, per_row)
    else:
        slots = first_fit(lengths, width, per_row)
    rows = max(slot.row for slot in slots) + 1
    shape = (-(-rows // rows_of) * rows_of, width)
    batch = _with_drawn(_laid_out(prompts, completions, advantages, slots, shape, per_row, mask_truncated), drawn)
    return batch if share_prompts else batch._replace(prompt_of_BT=None)


def _same_prompt(prompt: Sequence[int], completion: Completion) -> bytes:
    """What is equal of samples that can share a prompt: its tokens, and the experts that they went through."""
    tokens = np.asarray(prompt, np.int32).tobytes()
    return tokens if completion.routes is None else tokens + completion.routes[: len(prompt) - 1].tobytes()


def _lengths(prompts, completions) -> list[int]:
    """Columns that each sample takes: its tokens without the last."""
    return [len(p) + len(c.tokens) - 1 for p, c in zip(prompts, completions, strict=True)]


def _laid_out(prompts, completions, advantages, slots: list[PackedSlot], shape, per_row: int, mask_truncated) -> Batch:
    batch = _empty(shape, per_row, completions[0])
    for prompt, completion, advantage, slot in zip(prompts, completions, advantages, slots, strict=True):
        text = np.concatenate([prompt, completion.tokens]).astype(np.int32)
        apart = 0 if slot.prompt is None else len(prompt) - 1  # tokens that do not lie with the sample
        end = slot.start + len(text) - 1 - apart
        _write_text(batch, text, completion, slice(apart, len(text) - 1), slot, slot.prompt)
        if slot.prompt is not None:
            _write_text(batch, text, completion, slice(0, apart), slot.prompt, None)
        drawn = slice(end - len(completion.tokens), end)
        batch.lengths_BK[slot.row, slot.number] = len(completion.tokens)
        batch.mask_BT[slot.row, drawn] = completion.finished or not mask_truncated
        batch.old_logprobs_BT[slot.row, drawn] = completion.logprobs
        batch.advantages_BT[slot.row, drawn] = advantage
        if completion.support is not None:
            batch.support_BTW[slot.row, drawn] = completion.support
        if completion.penalised is not None:
            batch.penalised_BTW[slot.row, drawn] = completion.penalised
    return batch


def _with_drawn(batch: Batch, most: int | None) -> Batch:
    """With the columns of what counts, if these are at most so many and few of all."""
    T = batch.mask_BT.shape[1]
    if most is None or most > _FEW * T:
        return batch
    drawn = np.sort(np.where(batch.mask_BT, np.arange(T, dtype=np.int32), np.int32(T)), axis=1)
    return batch._replace(drawn_BU=drawn[:, :most])


_FEW = 7 / 8  # beyond it picking columns saves less than it costs


def _write_text(batch: Batch, text, completion: Completion, part: slice, slot: PackedSlot, prompt) -> None:
    """A part of a text as a segment of its own, in the place of `slot`; it goes on from a prompt's if there is one."""
    columns = slot.row, slice(slot.start, slot.start + part.stop - part.start)
    batch.tokens_BT[columns] = text[:-1][part]
    batch.targets_BT[columns] = text[1:][part]
    batch.segments_BT[columns] = slot.number + 1
    batch.prompt_of_BT[columns] = (prompt or slot).number + 1
    if completion.routes is not None:
        batch.routes_BTLA[columns] = completion.routes[part]


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
        prompt_of_BT=np.zeros(shape, np.int32),
        routes_BTLA=None if routes is None else np.zeros((*shape, *routes.shape[1:]), routes.dtype),
        # where nothing was drawn every token is allowed
        support_BTW=None if support is None else np.full((*shape, support.shape[1]), 0xFFFFFFFF, np.uint32),
        penalised_BTW=None if penalised is None else np.zeros((*shape, penalised.shape[1]), np.uint32),
    )
