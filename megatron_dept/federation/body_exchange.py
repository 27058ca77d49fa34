"""The outer exchange of the body on ZeRO partitions, where all silos are cut alike.

A rank's fp32 partition of the body (`n` elements) is exchanged with the same coordinate of the other silos only: the
deltas are reduce-scattered, each of the S silos runs the outer optimizer on its 1/S share, and the new values are
gathered back. No rank ever holds the whole body. The reduction is an all-to-all and a local sum in silo order: fp32
sums with one fixed order, on gloo cheaper than its reduce-scatter, which is an all-reduce inside.
"""

import copy

import torch
from torch import Tensor

from megatron_dept.common.segments import Segment
from megatron_dept.common.sizes import FP32_BYTES
from megatron_dept.dept.averaging import mean_delta
from megatron_dept.dept.outer import OuterRule, outer_step
from megatron_dept.federation.communicator import Communicator
from megatron_dept.federation.exchange import Handed, accept_state, commit_mean, new_momentum


def share_size(partition: int, silos: int) -> int:
    """Elements of the share that each silo owns of a partition of `partition` elements (padded to divide)."""
    return -(-partition // silos)


def exchange_bytes(partition: int, silos: int) -> int:
    """Bytes a rank sends in a round for a partition of so many elements: its slices of the deltas, and its share."""
    return 2 * (silos - 1) * share_size(partition, silos) * FP32_BYTES


class BodyExchange:
    """An `Exchange` among peers. `delta`: fp32 [S * share]; `momentum`: fp32 [share], [n] where everyone keeps it."""

    def __init__(
        self, peers: Communicator, partition: Tensor, rule: OuterRule, everyone_keeps_momentum: bool = False
    ) -> None:
        """With `everyone_keeps_momentum` the mean deltas are gathered instead of the new values: equally many bytes."""
        self._peers = peers
        self._rule = rule
        self._everyone = everyone_keeps_momentum
        self.value = partition.clone()
        self.share = share_size(partition.numel(), peers.size)
        self.delta = partition.new_zeros(peers.size * self.share)
        self.momentum = new_momentum(rule, partition, partition.numel() if self._everyone else self.share)

    def among(self, peers: Communicator) -> "BodyExchange":
        """This exchange, its value, delta and momentum, among other peers; `commit` on either ends the round of both.

        Only where everyone keeps the momentum.
        """
        assert self._everyone, "shares of the momentum cannot change hands"
        other = copy.copy(self)
        other._peers, other.share = peers, share_size(self.value.numel(), peers.size)
        return other

    @torch.no_grad()
    def hand_over(self, giver: int) -> Handed:
        """Value and momentum of rank `giver` of the peers, told to all, for `accept`. Collective, changes nothing."""
        told: list[Tensor | None] = []
        for tensor in (self.value, self.momentum):
            # What comes late, when nobody waits for it any more, must not come into what is trained with.
            told.append(None if tensor is None else tensor if self._peers.rank == giver else torch.empty_like(tensor))
            if told[-1] is not None:
                self._peers.broadcast(told[-1], giver, "parameter")
        assert told[0] is not None
        return told[0], told[1]

    def accept(self, handed: Handed) -> None:
        """Go on from what `hand_over` returned; sends nothing."""
        accept_state((self.value, self.momentum), handed)

    @property
    def round_bytes(self) -> int:
        """Bytes that this rank sends in `finish`."""
        return exchange_bytes(self.value.numel(), self._peers.size)

    @property
    def own(self) -> slice:
        """Where this silo's share lies in the partition; the last shares may be cut short or empty."""
        start = min(self._peers.rank * self.share, self.value.numel())
        return slice(start, min(start + self.share, self.value.numel()))

    @property
    def owned_value(self) -> Tensor:
        """fp32, this silo's share of the partition, without padding: a view of `value`."""
        return self.value[self.own]

    @property
    def owned_momentum(self) -> Tensor | None:
        """fp32, the momentum of `owned_value`: a view."""
        if self.momentum is None:
            return None
        return self.momentum[self.own] if self._everyone else self.momentum[: self.own.stop - self.own.start]

    def owned(self, segments: list[Segment]) -> list[Segment]:
        """The pieces of the partition's `segments` in this silo's share, offsets counted from its start."""
        own = self.own
        return [piece for segment in segments if (piece := segment.within(own)) is not None]

    def momentum_segments(self, segments: list[Segment]) -> list[Segment]:
        """Names for `momentum`: of the share, or of the whole partition where everyone keeps it."""
        return list(segments) if self._everyone else self.owned(segments)

    def adopt(self) -> None:
        """Nothing to do: a share is a view of `value`."""

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
        if self._everyone:
            self.commit(self.prepare(sources))
            return
        if sources:
            new = self.delta.new_zeros(self.share)
            own = self.own
            new[: own.stop - own.start] = self.value[own]
            outer_step(self._rule, new, self._mean_share(sources), self.momentum)
            self.value.copy_(self._peers.all_gather(new, "body")[: self.value.numel()])
        self.delta.zero_()

    @torch.no_grad()
    def prepare(self, sources: int) -> Tensor | None:
        """The mean delta of the partition, fp32 [n]; None where nobody contributed. Changes nothing."""
        assert self._everyone, "a round ends in two halves only where everyone keeps the momentum"
        if not sources:
            return None
        return self._peers.all_gather(self._mean_share(sources), "body")[: self.value.numel()]

    def commit(self, mean: Tensor | None) -> None:
        """End the round with what `prepare` returned."""
        assert self._everyone, "a round ends in two halves only where everyone keeps the momentum"
        commit_mean(self._rule, self.value, self.delta, self.momentum, mean)

    def _mean_share(self, sources: int) -> Tensor:
        """The mean delta of this silo's share, fp32 [share]."""
        silos, share = self._peers.size, self.share
        # Another number of peers than the delta was padded for: see `among`.
        delta = self.delta[: self.value.numel()]
        padding = silos * share - len(delta)
        delta = torch.nn.functional.pad(delta, (0, padding)) if len(self.delta) != silos * share else self.delta
        received = self._peers.all_to_all(delta, [share] * silos, [share] * silos, "body").view(silos, share)
        # Alone, what is received is the delta itself, which must stay.
        total = received[0].clone() if silos == 1 else received[0]
        for silo in range(1, silos):
            total.add_(received[silo])
        return mean_delta(total, sources)
