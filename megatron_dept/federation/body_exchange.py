"""The outer exchange of the body on ZeRO partitions.

A rank's fp32 partition of the body (`n` elements) is exchanged with the same coordinate of the other silos only: the
deltas are reduce-scattered, each of the S silos runs the outer optimizer on its 1/S share, and the new values are
gathered back. No rank ever holds the whole body. The reduction is an all-to-all and a local sum in silo order: fp32
sums with one fixed order, on gloo cheaper than its reduce-scatter, which is an all-reduce inside.
"""

import torch
from torch import Tensor

from megatron_dept.dept.averaging import mean_delta
from megatron_dept.dept.outer import OuterRule, needs_momentum, outer_step
from megatron_dept.federation.communicator import Communicator


def share_size(partition: int, silos: int) -> int:
    """Elements of the share that each silo owns of a partition of `partition` elements (padded to divide)."""
    return -(-partition // silos)


class BodyExchange:
    """This rank's partition of the global body, the round's summed delta, and the outer optimizer's state.

    `value`: fp32 [n], the body as it stood when the round began. `delta`: fp32 [S * share], the sum of
    (value - local) over the sources this silo has trained in the round. `momentum`: fp32 [share] or None.
    """

    def __init__(self, peers: Communicator, partition: Tensor, rule: OuterRule) -> None:
        self._peers = peers
        self._rule = rule
        self.value = partition.clone()
        self.share = share_size(partition.numel(), peers.size)
        self.delta = partition.new_zeros(peers.size * self.share)
        self.momentum = partition.new_zeros(self.share) if needs_momentum(rule) else None

    @property
    def own(self) -> slice:
        """Where this silo's share lies in the partition; the last shares may be cut short or empty."""
        start = min(self._peers.rank * self.share, self.value.numel())
        return slice(start, min(start + self.share, self.value.numel()))

    @torch.no_grad()
    def add(self, local: Tensor) -> None:
        """Add value - local to the round's delta; `local` (fp32 [n]) is consumed: it becomes local - value.

        One rounded difference a source, so that sources added in turn here, or one by each silo, sum to the same bits.
        """
        self.delta[: self.value.numel()].sub_(local.sub_(self.value))

    @torch.no_grad()
    def finish(self, sources: int) -> None:
        """End the round: average over the `sources` that contributed, outer step, new `value` everywhere, delta zero.

        Every silo calls it with the same count. Nobody having contributed leaves the body as it was.
        """
        if not sources:
            self.delta.zero_()
            return
        silos, share = self._peers.size, self.share
        received = self._peers.all_to_all(self.delta, [share] * silos, [share] * silos, "body").view(silos, share)
        total = received[0]
        for silo in range(1, silos):
            total.add_(received[silo])
        new = self.delta.new_zeros(share)
        own = self.own
        new[: own.stop - own.start] = self.value[own]
        outer_step(self._rule, new, mean_delta(total, sources), self.momentum)
        self.value.copy_(self._peers.all_gather(new, "body")[: self.value.numel()])
        self.delta.zero_()
