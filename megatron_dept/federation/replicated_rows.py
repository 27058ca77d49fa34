"""A row table of which every silo has all rows: for silos that are launches of their own, and may be lost.

Rows are fetched and collected inside the silo alone (`row_table`); at a round's end the silos tell one another the sums
of the rows they have touched, and all take the same outer step. Nothing is lost with a silo, and each silo's checkpoint
is whole. The price: a touched row goes to every other silo instead of to its owner, (S - 1) times its bytes a round.
Shapes: `n` rows owned here of the silo's table, `h` hidden, `S` silos, `m` touched rows.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_dept.dept.averaging import RowMean
from megatron_dept.dept.outer import OuterRule
from megatron_dept.dept.row_storage import RowStorage
from megatron_dept.federation.communicator import Alone, Communicator
from megatron_dept.federation.exchange import Handed, accept_state
from megatron_dept.federation.ledger import Kind
from megatron_dept.federation.row_spread import RowSpread, overlap
from megatron_dept.federation.row_table import IN_MEMORY, RowTable


class ReplicatedRowTable(RowTable):
    """A `RowTable` whose rows are cut over this silo's embedding ranks alone; `others` joins it with the other silos'.

    `others`: the ranks that own rows of the same ids, by silo: peers where silos are equal, else all embedding ranks.
    """

    def __init__(
        self,
        kind: Kind,
        hidden: int,
        total_rows: int,
        others: Communicator,
        silo_of_others: Sequence[int],
        silo: int,
        embedding: Communicator,
        tensor: int,
        rule: OuterRule,
        initial_rows: Callable[[int, int], Tensor],
        storage: RowStorage = IN_MEMORY,
        wire: torch.dtype = torch.float32,
    ) -> None:
        """`silo_of_others[r]`: the silo of rank r of `others`; `silo`: this one. On a bf16 `wire` sums are rounded too,
        each silo's own as well, so that all come to the same."""
        spread = RowSpread.of_peers(total_rows, 1, embedding.size)
        super().__init__(kind, hidden, spread, Alone(), embedding, tensor, rule, initial_rows, storage, wire)
        self._storage = storage
        self._own_silo = silo
        self._join(others, silo_of_others)

    def among(self, others: Communicator, silo_of_others: Sequence[int], silo: int) -> "ReplicatedRowTable":
        """This table, its rows and sums, joined with other silos'; `commit` on either ends the round. Collective."""
        other = copy.copy(self)
        other._own_silo = silo
        other._join(others, silo_of_others)
        return other

    def _join(self, others: Communicator, silo_of_others: Sequence[int]) -> None:
        self._others = others
        self._silo_of = list(silo_of_others)
        told = others.all_gather_object((self.first, self.first + len(self.rows)))
        self._ranges = [range(*bounds) for bounds in told]

    @torch.no_grad()
    def hand_over(self, giver: int) -> Handed:
        """Rows and momentum of silo `giver`, told to all, for `accept`. Collective over silos, changes nothing."""
        own = range(self.first, self.first + len(self.rows))
        gives = self._own_silo == giver
        common = [overlap(own, other) for other in self._ranges]
        going = [
            part if gives and silo != giver else range(0) for part, silo in zip(common, self._silo_of, strict=True)
        ]
        coming = [
            part if silo == giver and not gives else range(0) for part, silo in zip(common, self._silo_of, strict=True)
        ]
        counts = [len(part) for part in going], [len(part) for part in coming]

        def told(tensor: Tensor) -> Tensor:
            send = [tensor[part.start - self.first : part.stop - self.first] for part in going if len(part)]
            packed = torch.cat(send) if send else tensor[:0]
            received = self._others.all_to_all(packed, *counts, self._kind)
            fresh, at = tensor.clone(), 0
            for part in coming:
                if len(part):
                    fresh[part.start - self.first : part.stop - self.first] = received[at : at + len(part)]
                    at += len(part)
            return fresh

        return told(self.rows), None if self.momentum is None else told(self.momentum)

    def accept(self, handed: Handed) -> None:
        """Go on from what `hand_over` returned; sends nothing."""
        accept_state((self.rows, self.momentum), handed)

    def apply(self) -> None:
        """End the round: the sums of all silos, then the outer step, the same everywhere. Collective over silos."""
        self.commit(self.prepare())

    @torch.no_grad()
    def prepare(self) -> RowMean:
        """All silos' sums of the rows owned here, in silo order. Collective; changes nothing."""
        ids, own_sums, own_counts = self.pending.touched()
        own_sums = own_sums.to(self._wire)
        given = [self._meant_for(rank, ids) for rank in range(self._others.size)]
        counts, ones = [part.stop - part.start for part in given], [1] * self._others.size
        coming = self._others.all_to_all(torch.tensor(counts), ones, ones, "control").tolist()
        theirs = self._others.all_to_all(
            _parts(ids + self.first, given).to(torch.int32), counts, coming, "control"
        ).long()
        sources = self._others.all_to_all(_parts(own_counts, given), counts, coming, "control")
        sums = self._others.all_to_all(_parts(own_sums, given), counts, coming, self._kind)
        total = RowMean(len(self.rows), self.hidden, self._storage)
        at = 0
        for rank, count in enumerate(coming):
            if rank == self._others.rank:
                total.merge(ids, own_sums, own_counts)
            part = slice(at, at + count)
            total.merge(theirs[part] - self.first, sums[part], sources[part])
            at += count
        return total

    def _meant_for(self, rank: int, ids: Tensor) -> slice:
        """Where in the touched rows `ids` those are that a rank of another silo owns too; nothing for this silo's."""
        if self._silo_of[rank] == self._own_silo:
            return slice(0, 0)
        common = overlap(range(self.first, self.first + len(self.rows)), self._ranges[rank])
        edges = torch.tensor([common.start - self.first, common.stop - self.first])
        return slice(*torch.searchsorted(ids, edges).tolist())

    def round_bytes(self) -> int:
        """Bytes of rows that this rank sends in `prepare`, as things stand: ids and counts (control) not included."""
        ids = torch.nonzero(self.pending.counts).squeeze(1)
        given = [self._meant_for(rank, ids) for rank in range(self._others.size)]
        return sum(part.stop - part.start for part in given) * self.hidden * self._wire.itemsize

    @torch.no_grad()
    def commit(self, total: RowMean) -> None:
        """End the round with what `prepare` returned; sends nothing."""
        total.step(self._rule, self.stored, self.stored_momentum)
        self.pending.reset()


def _parts(tensor: Tensor, places: Sequence[slice]) -> Tensor:
    return torch.cat([tensor[place] for place in places])
