"""The row table: a global [V, h] table whose rows are spread over the ranks of the federation.

Two verbs: `gather(ids, need)` brings the rows asked for; scatter-mean returns row deltas, in two halves, for a round
has several slots: `accumulate(ids, deltas, need)` sends a slot's to their owners, and at the round's end `apply`
averages them per row over the sources that hold it and steps. So whatever is gathered within a round is as it stood at
its start. Only the rows asked for cross between silos, each once: a silo's embedding ranks share the fetching
(`row_spread`) and hand one another what each needs. Bytes are rows asked x h x the wire's width.
Shapes: `k` ids of the silo's source, ascending; [a, b) the positions among them that this rank holds (its shard of the
source's vocabulary); `h` hidden; `n` rows owned here; `E` embedding ranks of the silo, `T` tensor ranks of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dept.dept.averaging import RowMean
from megatron_dept.dept.outer import OuterRule, needs_momentum
from megatron_dept.dept.row_storage import RowStorage, block_rows
from megatron_dept.federation.communicator import Communicator
from megatron_dept.federation.ledger import Kind
from megatron_dept.federation.row_spread import RowSpread, overlap
from megatron_dept.ops.rows import trim_gather

IN_MEMORY = RowStorage()


class RowTable:
    """One shared table (tokens or positions) of a federation.

    `rows`: fp32 [n, h] owned here, ids `first` to `first + n`, kept in `stored`. `momentum`: fp32 [n, h] or None.
    `pending`: the deltas of the round.
    """

    def __init__(
        self,
        kind: Kind,
        hidden: int,
        spread: RowSpread,
        wide: Communicator,
        embedding: Communicator,
        tensor: int,
        rule: OuterRule,
        initial_rows: Callable[[int, int], Tensor],
        storage: RowStorage = IN_MEMORY,
        wire: torch.dtype = torch.float32,
    ) -> None:
        """`initial_rows(start, stop)` makes the rows of that id range; it is asked for blocks of this rank's.

        `wide`: the communicator that `spread` means. `embedding`: this silo's embedding ranks, data outer, tensor
        inner; `tensor`: how many tensor ranks. `wire`: fp32, or bf16, to which rows and deltas are then rounded
        wherever they go, to this rank itself too: results do not depend on who owns what.
        """
        self._kind = kind
        self._spread = spread
        self._wide = wide
        self._embedding = embedding
        self._tensor = tensor
        self._rule = rule
        self._silo = spread.silo_of(wide.rank)
        assert wide.size == spread.wide_size() and wide.rank == spread.wide_rank(self._silo, embedding.rank)
        assert embedding.size == spread.ranks_of_silos[self._silo] and embedding.size % tensor == 0
        self.total_rows = spread.total_rows
        self.hidden = hidden
        own = spread.owned(self._silo, embedding.rank)
        self.first = own.start
        self._wire = wire
        self.stored = storage.make(len(own), hidden, lambda a, b: initial_rows(own.start + a, own.start + b))
        self.stored_momentum = storage.make(len(own), hidden) if needs_momentum(rule) else None
        self.pending = RowMean(len(own), hidden, storage)

    @property
    def rows(self) -> Tensor:
        return self.stored.tensor

    @property
    def momentum(self) -> Tensor | None:
        return None if self.stored_momentum is None else self.stored_momentum.tensor

    @torch.no_grad()
    def gather(self, ids: Tensor, need: range | slice, kind: Kind | None = None) -> Tensor:
        """The rows of `ids[need]` (`ids` int64 [k], ascending, equal on all embedding ranks): fp32 [b - a, h].

        Collective over silos and silo: a silo that needs none asks for none. `kind` overrides the ledger's kind.
        """
        kind = kind or self._kind
        # Another slot is to come: what waits for the round's end must leave room for its training.
        self.pending.make_room()
        parts = self._spread.fetch_parts(self._silo, ids.numpy())
        mine = self._part(parts, self._embedding.rank)
        asked, asked_counts, own_counts = self._ask(ids[mine.start : mine.stop])
        brought = self._wide.all_to_all(self._read(asked, asked_counts), asked_counts, own_counts, kind)
        if self._embedding.size == 1:
            return brought[need.start : need.stop].float()
        given = [overlap(mine, other) for other in self._needs(need)]
        coming = [len(overlap(self._part(parts, rank), need)) for rank in range(self._embedding.size)]
        send = torch.cat([brought[piece.start - mine.start : piece.stop - mine.start] for piece in given])
        return self._embedding.all_to_all(send, [len(piece) for piece in given], coming, kind).float()

    @torch.no_grad()
    def accumulate(self, ids: Tensor, deltas: Tensor, need: range | slice) -> None:
        """Scatter: send this silo's row deltas to the rows' owners.

        `deltas`: start - end of a local phase, fp32 [b - a, h], of the rows `ids[need]`, equal on all data ranks; they
        are the table's from then on. Collective; an idle silo, or one whose source is left out of the round, sends
        none.
        """
        deltas = deltas.to(self._wire)
        parts = self._spread.fetch_parts(self._silo, ids.numpy())
        mine = self._part(parts, self._embedding.rank)
        if self._embedding.size > 1:
            deltas = self._collect(parts, deltas, need, len(ids))
        else:
            assert len(deltas) == len(ids), f"{len(deltas)} rows held of {len(ids)}"
        asked, asked_counts, own_counts = self._ask(ids[mine.start : mine.stop])
        received = self._wide.all_to_all(deltas.contiguous(), own_counts, asked_counts, self._kind)
        self.pending.add_all((asked - self.first).split(asked_counts), received)

    @torch.no_grad()
    def apply(self) -> None:
        """Mean: end the round with the outer step on the per-row means of what was accumulated.

        Rows nobody held keep value and momentum bit for bit.
        """
        self.pending.step(self._rule, self.stored, self.stored_momentum)
        self.pending.reset()

    def _read(self, asked: Tensor, counts: list[int]) -> Tensor:
        """Rows `asked` of those owned here, by ascending id for each who asks, in the wire's precision."""
        read = torch.empty(len(asked), self.hidden, dtype=self._wire)
        offset = 0
        for count in counts:
            for at in range(offset, offset + count, block_rows(self.hidden)):
                part = slice(at, min(at + block_rows(self.hidden), offset + count))
                trim_gather(self.rows, asked[part], self.first, self._wire, out=read[part])
                self.stored.let_go(int(asked[part.start]) - self.first, int(asked[part.stop - 1]) - self.first + 1)
            offset += count
        return read

    def _collect(self, parts: list[int], deltas: Tensor, need: range | slice, count: int) -> Tensor:
        """The deltas of what this rank fetches, from the tensor ranks of its own data rank: each row moves once."""
        mine = self._part(parts, self._embedding.rank)
        first = self._embedding.rank // self._tensor * self._tensor
        neighbours = range(first, first + self._tensor)
        needs = self._needs(need)
        held = 0
        for rank in neighbours:
            other = needs[rank]
            if other.start < other.stop:
                assert other.start == held, f"tensor ranks hold {needs[first : first + self._tensor]} of {count} rows"
                held = other.stop
        assert held == count, f"tensor ranks hold {held} of {count} rows"
        send_counts, receive_counts, pieces = [0] * self._embedding.size, [0] * self._embedding.size, []
        for rank in neighbours:
            piece = overlap(self._part(parts, rank), need)
            send_counts[rank] = len(piece)
            pieces.append(deltas[piece.start - need.start : piece.stop - need.start])
            receive_counts[rank] = len(overlap(mine, needs[rank]))
        return self._embedding.all_to_all(torch.cat(pieces), send_counts, receive_counts, self._kind)

    def _needs(self, need: range | slice) -> list[range]:
        """What every embedding rank of the silo holds."""
        told = self._embedding.all_gather(torch.tensor([need.start, need.stop]), "control").view(-1, 2).tolist()
        return [range(start, stop) for start, stop in told]

    def _ask(self, ids: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Tell each owner which of its rows are meant: (ids asked of me, how many by each rank, how many of each)."""
        edges = self._spread.owner_parts(self._embedding.rank, ids.numpy())
        own_counts = [edges[i + 1] - edges[i] for i in range(self._wide.size)]
        if self._wide.size == 1:
            return ids, own_counts, own_counts
        ones = [1] * self._wide.size
        asked_counts = self._wide.all_to_all(torch.tensor(own_counts), ones, ones, "control").tolist()
        asked = self._wide.all_to_all(ids.to(torch.int32), own_counts, asked_counts, "control")
        return asked.to(torch.int64), asked_counts, own_counts

    @staticmethod
    def _part(parts: list[int], rank: int) -> range:
        return range(parts[rank], parts[rank + 1])
