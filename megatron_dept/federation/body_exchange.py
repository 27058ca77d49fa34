"""The outer exchange of the body on ZeRO partitions, where all silos are cut alike.

A rank's fp32 partition of the body (`n` elements) is exchanged with the same coordinate of the other silos only:
deltas go to their owners, each of the S silos runs the outer optimizer on its 1/S share, and what comes of it goes back
to all. No rank ever holds the whole body. It goes bucket by bucket (`buckets`). Owners sum in fp32, in silo order; on
gloo that is cheaper than its reduce-scatter too, which is an all-reduce inside. Where NCCL sums fp32 on the way, three
and more silos are summed in its order.

On the wire are fp32, bf16, or int8 blocks with scales (`ops.body`). int8 has error feedback: what it could not say of a
delta or of an update is kept and added the next time. Back go fp32 new values, or packed updates, which every silo, the
owner too, applies in the same way: bodies stay equal to the bit.
"""

import copy
from functools import partial

import torch
from torch import Tensor

from megatron_dept.common.segments import Segment
from megatron_dept.dept.outer import OuterRule
from megatron_dept.federation.buckets import Apply, Pack, Ring, Settle, travel
from megatron_dept.federation.communicator import Communicator
from megatron_dept.federation.exchange import Handed, Prepared, Residual, accept_state, commit_mean, new_momentum
from megatron_dept.federation.round_delta import RoundDelta
from megatron_dept.federation.shares import Packing, Shares, exchange_bytes
from megatron_dept.ops.body import body_apply, body_mean, body_pack, body_unpack
from megatron_dept.ops.wires import Wire


class BodyExchange:
    """An `Exchange` among peers. `momentum`: fp32 [share], [n] where everyone keeps it.

    With int8 two more: `residual` fp32 [n] of this silo's deltas, `update_residual` fp32 [share] of what it owns.
    Where everyone keeps the momentum, what a mean lost goes into its owner's `residual`, so that no state depends on
    who takes part.
    """

    def __init__(
        self,
        peers: Communicator,
        partition: Tensor,
        rule: OuterRule,
        everyone_keeps_momentum: bool = False,
        packing: Packing = Packing(),  # noqa: B008  frozen
    ) -> None:
        """With `everyone_keeps_momentum` mean deltas are gathered instead of new values: equally many bytes."""
        self._rule = rule
        self._everyone = everyone_keeps_momentum
        self._packing = packing
        self.value = partition.clone()
        self._delta = RoundDelta(self.value)
        self._join(peers)
        self.momentum = new_momentum(rule, partition, partition.numel() if self._everyone else self.share)
        feedback = packing.wire == "int8" and (self._everyone or peers.size > 1)
        self.residual = torch.zeros_like(partition) if feedback else None
        self.update_residual = partition.new_zeros(self.share) if feedback and not self._everyone else None
        # A transfer that was given up may still write into its buffers: where that happens each has its own.
        self._ring = None if self._everyone else self._new_ring()

    def among(self, peers: Communicator) -> "BodyExchange":
        """This exchange, its value, delta and momentum, among other peers; `commit` on either ends the round of both.

        Only where everyone keeps the momentum.
        """
        assert self._everyone, "shares of the momentum cannot change hands"
        other = copy.copy(self)
        other._join(peers)
        return other

    def _join(self, peers: Communicator) -> None:
        self._peers = peers
        self._shares = Shares.cut(self.value.numel(), peers.size, self._packing.bucket_mb)
        # Alone, nothing travels and nothing is lost.
        self._wire: Wire = self._packing.wire if peers.size > 1 else "fp32"

    def _new_ring(self) -> Ring:
        return Ring(self._shares, self._wire, self.value.device)

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
        """Go on from what `hand_over` returned; sends nothing. What int8 still owed of earlier rounds is forgotten."""
        accept_state((self.value, self.momentum), handed)
        if self.residual is not None:
            self.residual.zero_()

    @property
    def share(self) -> int:
        """Elements of a full share."""
        return self._shares.share

    @property
    def round_bytes(self) -> int:
        """Bytes that this rank sends in `finish`."""
        return exchange_bytes(self.value.numel(), self._peers.size, self._peers.rank, self._wire)

    @property
    def own(self) -> slice:
        """Where this silo's share lies in the partition; the last shares may be cut short or empty."""
        return self._shares.of(self._peers.rank)

    @property
    def owned_value(self) -> Tensor:
        """fp32, this silo's share of the partition: a view of `value`."""
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

    def residuals(self, segments: list[Segment]) -> list[Residual]:
        """int8's: of this silo's deltas, and of the updates of its share."""
        found = []
        if self.residual is not None:
            found.append(Residual("delta", self.residual, list(segments), of_silo=True))
        if self.update_residual is not None:
            found.append(Residual("update", self.update_residual, self.owned(segments), of_silo=False))
        return found

    def adopt(self) -> None:
        """Nothing to do: a share is a view of `value`."""

    @property
    def delta(self) -> Tensor:
        """fp32 [n], the sum of (value - local) so far; read only."""
        return self._delta.total()

    def load_delta(self, total: Tensor) -> None:
        """Go on from a saved sum, fp32 [n]; `total` is taken over."""
        self._delta.load(total)

    def add(self, local: Tensor) -> None:
        """Add value - local to the round's delta; `local` (fp32 [n]) is consumed: it is kept, and written to."""
        self._delta.add(local)

    @torch.no_grad()
    def finish(self, sources: int) -> None:
        """End the round: average over the `sources` that contributed, outer step, new `value` everywhere, delta zero.

        Every silo calls it with the same count. Nobody having contributed leaves the body as it was.
        """
        if self._everyone:
            self.commit(self.prepare(sources))
            return
        if sources:
            assert self._ring is not None
            pack = partial(self._pack, *self._delta.operands(), self.residual)
            self._travel(self._ring, pack, partial(self._settle, sources), self._apply, self.value)
        self._delta.reset()

    def _travel(self, ring: Ring, pack: Pack, settle: Settle, apply: Apply, landing: Tensor) -> None:
        travel(self._peers, self._shares, self._wire, ring, pack, settle, apply, landing)

    def _pack(self, a: Tensor, b: Tensor | None, residual: Tensor | None, place: slice, out: Tensor) -> None:
        """The delta a - b (b None: a) of some elements into bytes."""
        if place.start < place.stop:
            subtracted = None if b is None else b[place]
            kept = None if residual is None else residual[place]
            if self._wire == "int8" or kept is None:
                body_pack(a[place], subtracted, None, kept, self._wire, out)
            else:
                # A silo alone: what its wire owed is paid in full.
                body_pack(a[place], subtracted, kept, None, self._wire, out)
                kept.zero_()

    def _settle(self, sources: int, place: slice, received: Tensor, back: Tensor) -> None:
        """The outer step on some elements of this silo's share; what it makes of them, for all to apply."""
        if place.start == place.stop:
            return
        of_share = slice(place.start - self.own.start, place.stop - self.own.start)
        momentum = None if self.momentum is None else self.momentum[of_share]
        residual = None if self.update_residual is None else self.update_residual[of_share]
        rate, mu = self._rule.learning_rate, self._rule.momentum
        body_unpack(received, sources, self.value[place], momentum, rate, mu, self._wire, back, residual)

    def _apply(self, place: slice, back: Tensor) -> None:
        if place.start < place.stop:
            body_apply(back, self.value[place], self._wire)

    @torch.no_grad()
    def prepare(self, sources: int) -> Prepared | None:
        """The mean delta of the partition, fp32 [n]; None where nobody contributed. Changes nothing."""
        assert self._everyone, "a round ends in two halves only where everyone keeps the momentum"
        if not sources:
            return None
        mean = torch.empty_like(self.value)
        residual = None if self.residual is None else self.residual.clone()
        pack = partial(self._pack, *self._delta.operands(), residual)

        def settle(place: slice, received: Tensor, back: Tensor) -> None:
            if place.start == place.stop:
                return
            body_mean(received, sources, self._wire, mean[place])
            if self._wire != "int8" or residual is None:
                body_pack(mean[place], None, None, None, self._wire, back)
                return
            lost = torch.zeros_like(mean[place])
            body_pack(mean[place], None, None, lost, self._wire, back)
            residual[place].add_(lost.mul_(sources))

        def apply(place: slice, back: Tensor) -> None:
            if place.start < place.stop:
                body_mean(back.view(1, -1), 1, self._wire, mean[place])

        self._travel(self._new_ring(), pack, settle, apply, mean)
        return Prepared(mean, residual)

    def commit(self, prepared: Prepared | None) -> None:
        """End the round with what `prepare` returned."""
        assert self._everyone, "a round ends in two halves only where everyone keeps the momentum"
        if prepared is not None:
            commit_mean(self._rule, self.value, self.momentum, prepared.mean)
            if self.residual is not None:
                assert prepared.residual is not None
                self.residual.copy_(prepared.residual)
        self._delta.reset()
