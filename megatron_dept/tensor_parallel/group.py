"""What tensor-parallel layers need of a group of ranks; `federation.communicator` has the real ones.

Shapes: `n` elements of a rank's part, `T` ranks of the group.
"""

from typing import Literal, Protocol

from torch import Tensor

ActivationKind = Literal["activation"]
"""How the byte ledger calls what tensor-parallel ranks tell one another."""


class TensorGroup(Protocol):
    """The collectives of tensor-parallel layers; `rank` and `size` are within the group."""

    rank: int
    size: int

    def all_reduce_sum(self, value: Tensor, kind: ActivationKind) -> None:
        """Sum `value` over the ranks, in place."""

    def all_reduce_max(self, value: Tensor, kind: ActivationKind) -> None:
        """The largest of the ranks' `value`s by element, in place."""

    def all_gather(self, mine: Tensor, kind: ActivationKind) -> Tensor:
        """Everyone's [n] in rank order: [T * n]."""

    def reduce_scatter_sum(self, whole: Tensor, kind: ActivationKind) -> Tensor:
        """This rank's [n] of the sum over the ranks of [T * n]."""


class _Alone:
    """A group of one: nothing is sent."""

    rank = 0
    size = 1

    def all_reduce_sum(self, value: Tensor, kind: ActivationKind) -> None:
        return None

    def all_reduce_max(self, value: Tensor, kind: ActivationKind) -> None:
        return None

    def all_gather(self, mine: Tensor, kind: ActivationKind) -> Tensor:
        return mine

    def reduce_scatter_sum(self, whole: Tensor, kind: ActivationKind) -> Tensor:
        return whole


ALONE: TensorGroup = _Alone()
