"""What a round needs of an outer exchange of the body, whether silos are cut alike (`body_exchange`) or not.

`n`: elements of this rank's fp32 partition of the body. Where the exchange was built with `everyone_keeps_momentum`,
every rank runs the outer step on its whole partition, so that no state is lost with a silo, and a round may end in two
halves: `prepare` talks and changes nothing, `commit` changes and says nothing.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_dept.common.segments import Segment
from megatron_dept.dept.outer import OuterRule, needs_momentum, outer_step

Handed = tuple[Tensor, Tensor | None]
"""Another silo's state, as `hand_over` received it: values (or rows) and their momentum, fp32, shaped as one's own."""


@dataclass(frozen=True)
class Prepared:
    """A round's end that has been talked about and not taken: the mean delta fp32 [n], and the residual after it."""

    mean: Tensor
    residual: Tensor | None = None


@dataclass(frozen=True)
class Residual:
    """What a wire with error feedback still owes, fp32: `tensor`, named by `segments`.

    `of_silo`: each silo has its own, and their sum is what counts; else it is of the one global body.
    """

    name: str
    tensor: Tensor
    segments: list[Segment]
    of_silo: bool


class Exchange(Protocol):
    """This rank's partition of the global body, the round's summed delta, and the outer optimizer's state."""

    @property
    def value(self) -> Tensor:
        """fp32 [n], the body as it stood when the round began."""

    @property
    def momentum(self) -> Tensor | None:
        """fp32 of this rank's share, of the whole partition where everyone keeps it, or None."""

    @property
    def delta(self) -> Tensor:
        """fp32 [n], the sum of (value - local) over the sources this silo has trained in the round; read only."""

    def load_delta(self, total: Tensor) -> None:
        """Go on from a saved sum, fp32 [n]; `total` is taken over."""

    def residuals(self, segments: list[Segment]) -> list[Residual]:
        """What the wire owes after the rounds so far, to be saved and filled; `segments` name the partition."""

    @property
    def round_bytes(self) -> int:
        """Bytes that this rank sends in `finish`."""

    @property
    def owned_value(self) -> Tensor:
        """fp32, what of the global body this rank saves."""

    @property
    def owned_momentum(self) -> Tensor | None:
        """fp32, what of the momentum this rank saves: the elements of `owned_value`; None where there is none."""

    def owned(self, segments: list[Segment]) -> list[Segment]:
        """Names for `owned_value` and `owned_momentum`; `segments` name the partition."""

    def momentum_segments(self, segments: list[Segment]) -> list[Segment]:
        """Names for `momentum`, to load it by; `segments` name the partition."""

    def adopt(self) -> None:
        """Take `value`, written from outside, for the global body. Collective."""

    def add(self, local: Tensor) -> None:
        """Add value - local to the round's delta; `local` (fp32 [n]) is consumed."""

    def finish(self, sources: int) -> None:
        """End the round: average over the `sources` that contributed, outer step, new `value`, delta zero. Collective.

        Every rank calls it with the same count. Nobody having contributed leaves the body as it was.
        """

    def prepare(self, sources: int) -> Prepared | None:
        """The round's mean delta of this rank's partition; None of no sources. Collective, changes nothing.

        Only where everyone keeps the momentum.
        """

    def commit(self, prepared: Prepared | None) -> None:
        """End the round with what `prepare` returned: outer step, delta zero. Sends nothing."""


@torch.no_grad()
def commit_mean(rule: OuterRule, value: Tensor, momentum: Tensor | None, mean: Tensor) -> None:
    """The outer step of `Exchange.commit` on an exchange's tensors: `mean` is fp32 [n]."""
    assert momentum is None or len(momentum) == len(value), "commit is for exchanges whose ranks keep all momentum"
    outer_step(rule, value, mean, momentum)


@torch.no_grad()
def accept_state(own: Handed, handed: Handed) -> None:
    """Copy what was handed over into one's own values and momentum."""
    for tensor, given in zip(own, handed, strict=True):
        if tensor is not None and given is not None:
            tensor.copy_(given)


def new_momentum(rule: OuterRule, like: Tensor, elements: int) -> Tensor | None:
    """Zeros fp32 [elements], or None where the rule keeps none."""
    return like.new_zeros(elements) if needs_momentum(rule) else None
