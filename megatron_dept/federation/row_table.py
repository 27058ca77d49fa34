"""The row table: a global [V, h] table whose rows are spread over the ranks of the federation.

Two verbs: `gather(ids)` brings the rows asked for, `accumulate(ids, deltas)` sends row deltas to their owners, which
`apply` averages per row over the sources that hold it. Only the rows asked for cross the wire.

Rows are cut first by data coordinate, then by silo: rank (silo s, data d) of S x D owns block d * S + s. So a rank
talks only to its peers (same d in other silos) about the ids of its d-range, and its silo shares what each brought.
Shapes: `k` ids asked for, ascending; `h` hidden; `n` rows owned here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dept.dept.averaging import RowMean
from megatron_dept.dept.outer import OuterRule, needs_momentum, outer_step_rows
from megatron_dept.federation.communicator import Communicator
from megatron_dept.federation.ledger import Kind


class RowTable:
    """One shared table (tokens or positions) of a federation.

    `rows`: fp32 [n, h] owned here, ids `first` to `first + n`. `momentum`: fp32 [n, h] or None.
    """

    def __init__(
        self,
        kind: Kind,
        total_rows: int,
        hidden: int,
        peers: Communicator,
        silo: Communicator,
        rule: OuterRule,
        initial_rows: Callable[[int, int], Tensor],
    ) -> None:
        """`initial_rows(start, stop)` makes the rows of that id range; `silo` joins this silo's data ranks."""
        self._kind = kind
        self._peers = peers
        self._silo = silo
        self._rule = rule
        self.total_rows = total_rows
        self.hidden = hidden
        self._block = block_size(total_rows, peers.size * silo.size)
        self.first = min((silo.rank * peers.size + peers.rank) * self._block, total_rows)
        last = min(self.first + self._block, total_rows)
        self.rows = initial_rows(self.first, last)
        self.momentum = torch.zeros_like(self.rows) if needs_momentum(rule) else None
        self.pending = RowMean(last - self.first, hidden)

    @torch.no_grad()
    def gather(self, ids: Tensor, kind: Kind | None = None) -> Tensor:
        """The rows of `ids` (int64 [k], ascending, equal on all ranks of the silo): fp32 [k, h].

        Collective over silos and silo: a silo that needs none asks for none. `kind` overrides the ledger's kind.
        """
        kind = kind or self._kind
        parts = self._cut(ids, self._silo.size, self._block * self._peers.size)
        mine = ids[parts[self._silo.rank] : parts[self._silo.rank + 1]]
        asked, asked_counts, own_counts = self._ask(mine)
        answer = self.rows[asked - self.first]
        brought = self._peers.all_to_all(answer, asked_counts, own_counts, kind)
        if self._silo.size == 1:
            return brought
        whole = self.rows.new_empty(len(ids), self.hidden)
        whole[parts[self._silo.rank] : parts[self._silo.rank + 1]] = brought
        for rank in range(self._silo.size):
            self._silo.broadcast(whole[parts[rank] : parts[rank + 1]], rank, kind)
        return whole

    @torch.no_grad()
    def accumulate(self, ids: Tensor, deltas: Tensor) -> None:
        """Send this silo's row deltas (start - end of a local phase; fp32 [k, h]) to the rows' owners.

        Collective; an idle silo, or one whose source is left out of the round, sends none.
        """
        parts = self._cut(ids, self._silo.size, self._block * self._peers.size)
        part = slice(parts[self._silo.rank], parts[self._silo.rank + 1])
        asked, asked_counts, own_counts = self._ask(ids[part])
        received = self._peers.all_to_all(deltas[part].contiguous(), own_counts, asked_counts, self._kind)
        offset = 0
        for count in asked_counts:
            if count:
                self.pending.add(asked[offset : offset + count] - self.first, received[offset : offset + count])
            offset += count

    @torch.no_grad()
    def apply(self) -> None:
        """End the round: outer step on the per-row means; rows nobody held keep value and momentum bit for bit."""
        mean, held = self.pending.mean()
        outer_step_rows(self._rule, self.rows, mean, self.momentum, held)
        self.pending.reset()

    def _ask(self, ids: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Tell each owner which of its rows are meant: (ids asked of me, how many by each peer, how many of each)."""
        edges = self._cut(ids, self._peers.size, self._block, start=self._silo.rank * self._peers.size)
        own_counts = [edges[i + 1] - edges[i] for i in range(self._peers.size)]
        if self._peers.size == 1:
            return ids, own_counts, own_counts
        ones = [1] * self._peers.size
        asked_counts = self._peers.all_to_all(torch.tensor(own_counts), ones, ones, "control").tolist()
        asked = self._peers.all_to_all(ids.to(torch.int32), own_counts, asked_counts, "control")
        return asked.to(torch.int64), asked_counts, own_counts

    @staticmethod
    def _cut(ids: Tensor, pieces: int, width: int, start: int = 0) -> list[int]:
        """Where in ascending `ids` each range [(start + i) * width, (start + i + 1) * width) begins and ends."""
        bounds = torch.arange(start, start + pieces + 1) * width
        return torch.searchsorted(ids, bounds).tolist()


def block_size(total_rows: int, owners: int) -> int:
    """Rows of one owner's block; the last blocks may be cut short or empty."""
    return -(-total_rows // owners)
