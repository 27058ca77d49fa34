"""What a silo's sources have contributed to a round: the sum of value - local.

Shapes: `n` elements of the partition.
"""

import torch
from torch import Tensor


class RoundDelta:
    """fp32 [n]. Of a round's first source `local` is kept as it came: the subtraction is packing's."""

    def __init__(self, value: Tensor) -> None:
        """`value`: the body as it stood when the round began."""
        self._value = value
        self._local: Tensor | None = None
        self._sum: Tensor | None = None

    @torch.no_grad()
    def add(self, local: Tensor) -> None:
        """Add value - local; `local` is consumed, and must not be touched by others from here on.

        One rounded difference a source, so that sources added in turn here, or one by each silo, sum to the same bits.
        """
        if self._local is None and self._sum is None:
            self._local = local
            return
        self._taken().sub_(local.sub_(self._value))

    def total(self) -> Tensor:
        """The sum so far: not to be written to, zeros of a round that nobody has contributed to."""
        if self._local is None and self._sum is None:
            return torch.zeros_like(self._value)
        return self._taken()

    def load(self, total: Tensor) -> None:
        """Go on from another's sum; `total` is taken over."""
        self._local, self._sum = None, total

    def reset(self) -> None:
        """Forget the round, and give its memory back."""
        self._local = self._sum = None

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """(a, b), both fp32 [n]: the sum is a - b, or a where there is no b. They stay what they are after `reset`."""
        if self._sum is not None:
            return self._sum, None
        # Without a source: nought, without memory for it.
        return self._value, self._value if self._local is None else self._local

    @torch.no_grad()
    def _taken(self) -> Tensor:
        if self._sum is None:
            assert self._local is not None
            self._sum, self._local = torch.sub(self._value, self._local, out=self._local), None
        return self._sum
