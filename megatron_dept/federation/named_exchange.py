"""The outer exchange of the body where silos are cut differently: by the names of the elements each rank holds.

Each silo sends every element of its deltas once, from the rank whose copy is primary, to the element's owner among all
W ranks of the federation. The owner sums in silo order, takes the outer step, and sends the new values to every rank
that holds the element. No rank holds the whole body: memory is O(n + S * N / W).
Shapes: `n` elements of this rank's partition, `N` of the body, `S` silos, `c` of the N elements owned here
(`named_plan` says who owns what).
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dept.common.errors import FederationError
from megatron_dept.common.segments import Segment
from megatron_dept.dept.averaging import mean_delta
from megatron_dept.dept.outer import OuterRule, outer_step
from megatron_dept.federation.communicator import Communicator
from megatron_dept.federation.exchange import Handed, Prepared, Residual, accept_state, commit_mean, new_momentum
from megatron_dept.federation.ledger import Kind
from megatron_dept.federation.named_plan import COUNT, OFFSET, START, CanonicalOrder, primary, within

Pieces = list[tuple[int, int]]
"""(first, elements) of a flat tensor, in the order in which they travel."""


class NamedBodyExchange:
    """An `Exchange` among all ranks of all silos. `delta`: fp32 [n]; `momentum`: fp32 [c], [n] where everyone keeps it.

    Elements of the partition that no segment names (padding) take no part.
    """

    def __init__(
        self,
        federation: Communicator,
        partition: Tensor,
        segments: list[Segment],
        shapes: Mapping[str, Sequence[int]],
        rule: OuterRule,
        silo: int,
        everyone_keeps_momentum: bool = False,
    ) -> None:
        """Collective. `federation`: all ranks, silo by silo; `silo`: this rank's. `segments` name the partition.

        `shapes`: whole parameters', equal everywhere. Owners are given the values they own once, charged as
        "parameter". Raises `FederationError` on every rank where a silo holds an element of the body not at all, or
        twice as primary.
        """
        self._rule = rule
        self._everyone = everyone_keeps_momentum
        self._silo, self._named, self._shapes = silo, segments, shapes
        self._order = CanonicalOrder(shapes)
        self.value = partition.clone()
        self.delta = torch.zeros_like(partition)
        self._join(federation)
        self._owned = partition.new_zeros(0 if self._everyone else len(self._share))
        self.momentum = new_momentum(rule, partition, len(partition) if self._everyone else len(self._share))
        self.adopt()

    def among(self, federation: Communicator) -> "NamedBodyExchange":
        """This exchange, its value, delta and momentum, among all ranks of other silos; `commit` on either ends both.

        Collective over them; only where everyone keeps the momentum. Errors as at construction.
        """
        assert self._everyone, "shares of the momentum cannot change hands"
        other = copy.copy(self)
        other._join(federation)
        return other

    @torch.no_grad()
    def hand_over(self, giver: int) -> Handed:
        """Value and momentum of silo `giver`, told to all, for `accept`. Collective, changes nothing.

        They go from its primary copies to owners, then to holders; padding is each one's own.
        """
        gives = [silo == giver for silo in self._silos]
        going = [pieces if gives[self._federation.rank] else [] for pieces in self._sent]
        coming = [pieces if given else [] for pieces, given in zip(self._summed, gives, strict=True)]

        def told(tensor: Tensor) -> Tensor:
            share, fresh = tensor.new_zeros(len(self._share)), tensor.clone()
            _placed(share, coming, self._swap(tensor, going, coming, "parameter"))
            self._answer(share, fresh, "parameter")
            return fresh

        return told(self.value), None if self.momentum is None else told(self.momentum)

    def accept(self, handed: Handed) -> None:
        """Go on from what `hand_over` returned; sends nothing."""
        accept_state((self.value, self.momentum), handed)

    def load_delta(self, total: Tensor) -> None:
        """Go on from a saved sum, fp32 [n]."""
        self.delta.copy_(total)

    def residuals(self, segments: list[Segment]) -> list[Residual]:
        """None: fp32 owes nothing."""
        return []

    def _join(self, federation: Communicator) -> None:
        """Learn who holds what and who owns what among these ranks. Collective."""
        self._federation = federation
        self._share = self._order.share(federation.rank, federation.size)
        holdings, self._silos = self._meet(self._silo, self._named, self._shapes)
        shares = [self._order.share(rank, federation.size) for rank in range(federation.size)]
        mine = holdings[federation.rank]
        # By owner, the pieces of this rank's partition; by holder, the pieces of this rank's share.
        self._sent = [_pieces(within(primary(mine), share)) for share in shares]
        self._held = [_pieces(within(mine, share)) for share in shares]
        self._summed = [_pieces(within(primary(table), self._share), self._share.start) for table in holdings]
        self._answered = [_pieces(within(table, self._share), self._share.start) for table in holdings]
        self._kept = within(primary(mine), self._silo_range(self._silo))

    @property
    def round_bytes(self) -> int:
        """Bytes that this rank sends in `finish`."""
        me = self._federation.rank
        pieces = (
            side[rank] for side in (self._sent, self._answered) for rank in range(self._federation.size) if rank != me
        )
        return sum(count for of_rank in pieces for _, count in of_rank) * self.value.element_size()

    @property
    def owned_value(self) -> Tensor:
        """fp32, what of the global body this rank saves: its share [c].

        Where everyone keeps the momentum, a copy of those primary elements of its partition that are its silo's part:
        silos then divide the canonical order by their numbers of ranks.
        """
        return _packed(self.value, [_pieces(self._kept)]) if self._everyone else self._owned

    @property
    def owned_momentum(self) -> Tensor | None:
        """fp32, the momentum of `owned_value`'s elements."""
        if self.momentum is None or not self._everyone:
            return self.momentum
        return _packed(self.momentum, [_pieces(self._kept)])

    def owned(self, segments: list[Segment]) -> list[Segment]:
        """Names for `owned_value`; `segments` are the ones given at construction and not read."""
        if not self._everyone:
            return self._order.segments(self._share)
        named, offset = [], 0
        for row in self._kept:
            for piece in self._order.segments(range(row[START], row[START] + row[COUNT])):
                named.append(Segment(piece.name, piece.start, piece.stop, piece.offset + offset))
            offset += int(row[COUNT])
        return named

    def momentum_segments(self, segments: list[Segment]) -> list[Segment]:
        """Names for `momentum`: of the share, or of the whole partition where everyone keeps it."""
        return list(segments) if self._everyone else self.owned(segments)

    @torch.no_grad()
    def adopt(self) -> None:
        """Take `value`, written from outside, for the global body: the first silo gives owners theirs. Collective."""
        if self._everyone:
            return
        gives = [silo == self._silos[0] for silo in self._silos]
        going = [pieces if gives[self._federation.rank] else [] for pieces in self._sent]
        coming = [pieces if given else [] for pieces, given in zip(self._summed, gives, strict=True)]
        _placed(self._owned, coming, self._swap(self.value, going, coming, "parameter"))

    @torch.no_grad()
    def add(self, local: Tensor) -> None:
        """Add value - local to the round's delta; `local` (fp32 [n]) is consumed: it becomes local - value."""
        self.delta.sub_(local.sub_(self.value))

    @torch.no_grad()
    def finish(self, sources: int) -> None:
        """End the round: average over the `sources` that contributed, outer step, new `value` everywhere, delta zero.

        Every rank calls it with the same count. Nobody having contributed leaves the body as it was.
        """
        if self._everyone:
            self.commit(self.prepare(sources))
            return
        if sources:
            outer_step(self._rule, self._owned, self._mean_share(sources), self.momentum)
            self._answer(self._owned, self.value, "body")
        self.delta.zero_()

    @torch.no_grad()
    def prepare(self, sources: int) -> Prepared | None:
        """The mean delta of the partition, fp32 [n]; None where nobody contributed. Changes nothing."""
        assert self._everyone, "a round ends in two halves only where everyone keeps the momentum"
        if not sources:
            return None
        mean = torch.zeros_like(self.value)
        self._answer(self._mean_share(sources), mean, "body")
        return Prepared(mean)

    def commit(self, prepared: Prepared | None) -> None:
        """End the round with what `prepare` returned."""
        assert self._everyone, "a round ends in two halves only where everyone keeps the momentum"
        if prepared is not None:
            commit_mean(self._rule, self.value, self.momentum, prepared.mean)
        self.delta.zero_()

    def _meet(
        self, silo: int, segments: list[Segment], shapes: Mapping[str, Sequence[int]]
    ) -> tuple[list[np.ndarray], list[int]]:
        """Tell every rank what this one holds; everyone's intervals and silos. All find the same fault, if any."""
        mine: Any
        try:
            mine = self._order.intervals(segments)
        except FederationError as error:
            mine = str(error)
        body = hashlib.sha256(repr([(name, tuple(shape)) for name, shape in shapes.items()]).encode()).hexdigest()
        told = self._federation.all_gather_object((silo, body, mine))
        silos = [told_silo for told_silo, _, _ in told]
        assert silos == sorted(silos), "the federation's ranks come silo by silo"
        for told_silo, told_body, table in told:
            if told_body != told[0][1]:
                raise FederationError(
                    f"silo {told_silo} has another body than silo {told[0][0]}; give all silos the same model section"
                )
            if isinstance(table, str):
                raise FederationError(f"silo {told_silo}: {table}; give all silos the same model section")
        holdings = [table for _, _, table in told]
        self._order.check_cover(holdings, silos)
        return holdings, silos

    def _silo_range(self, silo: int) -> range:
        """The canonical elements that a silo's ranks own together."""
        ranks = [rank for rank, of in enumerate(self._silos) if of == silo]
        parts = [self._order.share(rank, len(self._silos)) for rank in ranks]
        return range(parts[0].start, parts[-1].stop)

    def _mean_share(self, sources: int) -> Tensor:
        """The mean delta of the elements owned here, fp32 [c]: summed in silo order."""
        received = self._swap(self.delta, self._sent, self._summed, "body")
        total = self.delta.new_empty(len(self._share))
        offset = 0
        for silo, pieces in zip(self._silos, self._summed, strict=True):
            for first, count in pieces:
                part = received[offset : offset + count]
                # The ranks of a silo hold every element once between them, so the first fills what the others add to.
                if silo == self._silos[0]:
                    total[first : first + count] = part
                else:
                    total[first : first + count] += part
                offset += count
        return mean_delta(total, sources)

    def _answer(self, share: Tensor, partition: Tensor, kind: Kind) -> None:
        """Send elements of `share` [c] to all who hold them; put what comes into `partition` [n]."""
        _placed(partition, self._held, self._swap(share, self._answered, self._held, kind))

    def _swap(self, source: Tensor, sent: list[Pieces], coming: list[Pieces], kind: Kind) -> Tensor:
        """Send pieces of `source`, by rank; return what comes, end to end."""
        counts = [[sum(count for _, count in pieces) for pieces in by_rank] for by_rank in (sent, coming)]
        return self._federation.all_to_all(_packed(source, sent), counts[0], counts[1], kind)


def _pieces(table: np.ndarray, start: int | None = None) -> Pieces:
    """Intervals as pieces of the partition, or of the canonical elements from `start` on."""
    firsts = table[:, OFFSET] if start is None else table[:, START] - start
    return list(zip(firsts.tolist(), table[:, COUNT].tolist(), strict=True))


def _packed(source: Tensor, by_rank: list[Pieces]) -> Tensor:
    slices = [source[first : first + count] for pieces in by_rank for first, count in pieces]
    return torch.cat(slices) if slices else source.new_empty(0)


def _placed(target: Tensor, by_rank: list[Pieces], packed: Tensor) -> None:
    offset = 0
    for pieces in by_rank:
        for first, count in pieces:
            target[first : first + count] = packed[offset : offset + count]
            offset += count
