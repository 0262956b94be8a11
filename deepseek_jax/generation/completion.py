"""What generation gives: completions, and what is kept of them for a trainer."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Record:
    """What generation keeps beside tokens and log-probs, for a trainer to replay.

    Source: DeepSeek-V3.2, arXiv 2512.02556 section 3.1, "Keep Routing" and "Keep Sampling Mask".

    Args:
        routes: the experts that every token went to, 2 x L x A bytes a token on the device.
        support: the tokens among which each one was drawn, V / 8 bytes a token; as many again for those that a
            repetition penalty was laid on, where there is one.
    """

    routes: bool = False
    support: bool = False


NO_RECORD = Record()


class Completion(NamedTuple):
    """One sample of C tokens (a stop token included), log-probs in nats, and whether it stopped by itself.

    The log-probs are those of softmax(logits / temperature) before top-k, top-p and penalty, the distribution that
    a trainer scores (temperature 0: of the unscaled logits). Where the support is recorded they are those of the
    distribution within it, after the penalty, which is then the one that a trainer scores.

    routes: int16 (int32 from 32,769 experts on) [tokens of the prompt + C - 1, L, A], the experts of each of L MoE
    layers that every token went to which was an input; all but the last were. support: uint32 [C, V / 32 rounded up],
    the tokens among which each one was drawn, as `ops.logprobs` has their bits; penalised: the same of those
    that the penalty was on. None where not recorded. text: the tokens decoded, special ones left out, before any stop
    text; None without a tokenizer.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finished: bool
    routes: np.ndarray | None = None
    support: np.ndarray | None = None
    penalised: np.ndarray | None = None
    text: str | None = None
