"""Who owns which rows of a row table, and who of a silo fetches which: arithmetic alone, so bytes can be foretold.

A silo's E *embedding ranks* (data x tensor ranks of its first pipeline stage, rank e = data * T + tensor) hold and
fetch its rows. Equal silos: embedding rank e asks its peers alone (same e in the other silos) about the ids of its
range. Unequal ones: the embedding ranks of all silos ask one another.
Shapes: `V` rows of the table, `S` silos, `k` ascending ids that a source holds, `W` embedding ranks of all silos.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dept.common.sizes import FP32_BYTES
from megatron_dept.federation.ledger import Scope


def block_size(total_rows: int, owners: int) -> int:
    """Rows of one owner's block; the last blocks may be cut short or empty."""
    return -(-total_rows // owners)


@dataclass(frozen=True)
class RowSpread:
    """A table's rows over `ranks_of_silos[s]` embedding ranks of each silo s; `among_peers`: see `of_peers`.

    The *wide* communicator is the one that owners are asked over: the peers', or all embedding ranks' silo by silo.
    """

    total_rows: int
    ranks_of_silos: tuple[int, ...]
    among_peers: bool

    @classmethod
    def of_peers(cls, total_rows: int, silos: int, ranks_per_silo: int) -> "RowSpread":
        """Equal silos: block e * S + s belongs to embedding rank e of silo s, who fetches from its peers alone."""
        return cls(total_rows, (ranks_per_silo,) * silos, True)

    @classmethod
    def of_all(cls, total_rows: int, ranks_of_silos: tuple[int, ...]) -> "RowSpread":
        """Silos of any sizes: block i belongs to embedding rank i of the federation; all ask all."""
        return cls(total_rows, ranks_of_silos, False)

    @property
    def silos(self) -> int:
        return len(self.ranks_of_silos)

    @property
    def block(self) -> int:
        """Rows of one owner's block."""
        return block_size(self.total_rows, sum(self.ranks_of_silos))

    def wide_rank(self, silo: int, rank: int) -> int:
        """The rank of a silo's embedding rank in the wide communicator."""
        return silo if self.among_peers else sum(self.ranks_of_silos[:silo]) + rank

    def wide_size(self) -> int:
        """Ranks of the wide communicator."""
        return self.silos if self.among_peers else sum(self.ranks_of_silos)

    def silo_of(self, wide_rank: int) -> int:
        """The silo that a rank of the wide communicator belongs to."""
        if self.among_peers:
            return wide_rank
        return int(np.searchsorted(np.cumsum(self.ranks_of_silos), wide_rank, side="right"))

    def near(self, silo: int) -> tuple[int, ...]:
        """Ranks of the wide communicator that belong to `silo`; one rank alone where peers are asked."""
        return tuple(rank for rank in range(self.wide_size()) if self.silo_of(rank) == silo)

    def owned(self, silo: int, rank: int) -> range:
        """Ids of the block that a silo's embedding rank owns; may be cut short or empty."""
        block = rank * self.silos + silo if self.among_peers else self.wide_rank(silo, rank)
        first = min(block * self.block, self.total_rows)
        return range(first, min(first + self.block, self.total_rows))

    def fetch_parts(self, silo: int, ids: np.ndarray) -> list[int]:
        """Positions in `ids` (int64 [k], ascending) between which each embedding rank of the silo fetches: E + 1."""
        ranks = self.ranks_of_silos[silo]
        if not self.among_peers:
            return [len(ids) * rank // ranks for rank in range(ranks + 1)]
        return np.searchsorted(ids, np.arange(ranks + 1) * self.silos * self.block).tolist()

    def owner_parts(self, rank: int, ids: np.ndarray) -> list[int]:
        """Positions in what embedding rank `rank` fetches between which each rank of the wide communicator owns."""
        first = rank * self.silos if self.among_peers else 0
        return np.searchsorted(ids, (first + np.arange(self.wide_size() + 1)) * self.block).tolist()


Needs = Sequence[range | slice]
"""By embedding rank of a silo, the positions of a source's ids whose rows it holds."""


def fetch_bytes(
    spread: RowSpread, silo: int, ids: np.ndarray, needs: Needs, hidden: int, width: int = FP32_BYTES
) -> dict[Scope, int]:
    """Bytes of rows that all ranks send when `silo` gathers `ids`, by link; ids and counts (control) not included.

    `width`: bytes of a value on the wire.
    """
    asked = _asked_rows(spread, silo, ids)
    parts = spread.fetch_parts(silo, ids)
    for rank in range(len(parts) - 1):
        brought = range(parts[rank], parts[rank + 1])
        asked["silo"] += sum(len(overlap(brought, need)) for other, need in enumerate(needs) if other != rank)
    return {scope: rows * hidden * width for scope, rows in asked.items()}


def return_bytes(
    spread: RowSpread, silo: int, ids: np.ndarray, needs: Needs, tensor: int, hidden: int, width: int = FP32_BYTES
) -> dict[Scope, int]:
    """Bytes of row deltas that all ranks send when `silo` accumulates `ids`, by link; control not included.

    `tensor`: the silo's tensor ranks, which between them hold each row once. `width`: as of `fetch_bytes`.
    """
    returned = _asked_rows(spread, silo, ids)
    parts = spread.fetch_parts(silo, ids)
    for rank in range(len(parts) - 1):
        mine, first = range(parts[rank], parts[rank + 1]), rank // tensor * tensor
        neighbours = (other for other in range(first, first + tensor) if other != rank)
        returned["silo"] += sum(len(overlap(mine, needs[other])) for other in neighbours)
    return {scope: rows * hidden * width for scope, rows in returned.items()}


def _asked_rows(spread: RowSpread, silo: int, ids: np.ndarray) -> dict[Scope, int]:
    """Rows that cross between fetching ranks and owners, either way."""
    rows: dict[Scope, int] = {"federation": 0, "silo": 0}
    parts = spread.fetch_parts(silo, ids)
    for rank in range(len(parts) - 1):
        edges = spread.owner_parts(rank, ids[parts[rank] : parts[rank + 1]])
        for owner in range(spread.wide_size()):
            if owner != spread.wide_rank(silo, rank):
                link: Scope = "silo" if spread.silo_of(owner) == silo else "federation"
                rows[link] += edges[owner + 1] - edges[owner]
    return rows


def overlap(left: range, right: range | slice) -> range:
    """The positions that two ranges share; empty ranges share none."""
    start, stop = max(left.start, right.start), min(left.stop, right.stop)
    return range(start, max(start, stop))
