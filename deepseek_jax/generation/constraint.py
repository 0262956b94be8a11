"""What a completion's next token may be, where a grammar says it: on the host, token by token."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class ConstraintError(ValueError):
    """A grammar has no token with which it could go on."""


class Constraint(Protocol):
    """A grammar, and where a completion stands in it. The thought that a prompt opens is before its beginning."""

    def mask(self) -> np.ndarray:
        """Bits of the tokens that may come next, uint32 [V / 32], rounded up, as in `ops.logprobs`.

        Raises:
            ConstraintError: there is none.
        """

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that were drawn.

        Raises:
            ConstraintError: the grammar does not have them there.
        """
