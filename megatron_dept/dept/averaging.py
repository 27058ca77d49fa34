"""The mean of deltas over the sampled sources, row by row where sources hold different rows.

Shapes: `n` rows of the global table, `h` hidden, `k` rows that one source holds, `m` delta rows of several sources.
Deltas are fp32 or bf16; sums fp32, counts int32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dept.dept.outer import OuterRule, needs_momentum
from megatron_dept.dept.row_storage import RowStorage, StoredRows, block_rows
from megatron_dept.ops.rows import order_by_row, trim_scatter_mean

IN_MEMORY = RowStorage()


@dataclass(frozen=True)
class _Piece:
    """What came at once: `deltas` [m, h], one source's rows after another's, those of each by ascending row."""

    ids: tuple[Tensor, ...]
    deltas: Tensor


@dataclass(frozen=True)
class _Block:
    """What `ops.rows.trim_scatter_mean` sums for a block of the table's rows."""

    rows: Tensor
    starts: Tensor
    order: Tensor
    deltas: Tensor


class RowMean:
    """Accumulates sources' row deltas of a round; the mean of a row is over the sources that hold it (DEPT's TRIM).

    GLOB is the case that every source holds every row. A row's deltas are summed in the order of the calls, so equal
    calls give equal bits. What comes is kept as it came, and is the caller's no longer; only where that would outgrow a
    table of sums is it added up in one. So a round whose sources come at once needs no sums beside what came, and
    `step` is one pass over the rows that some source holds.
    """

    def __init__(self, rows: int, hidden: int, storage: RowStorage = IN_MEMORY) -> None:
        self.counts = torch.zeros(rows, dtype=torch.int32)
        self._hidden = hidden
        self._storage = storage
        self._at_most = storage.pending_rows(rows, hidden)
        self._pieces: list[_Piece] = []
        self._dense: StoredRows | None = None

    @torch.no_grad()
    def add(self, indices: Tensor, deltas: Tensor) -> None:
        """Add one source's `deltas` ([k, h]) of the rows `indices` (int64 [k], unique) and count its holding."""
        if len(indices) > 1 and not bool((indices[1:] > indices[:-1]).all()):
            order = torch.argsort(indices)
            indices, deltas = indices[order], deltas[order]
        self.add_all([indices], deltas)

    @torch.no_grad()
    def add_all(self, ids: Sequence[Tensor], deltas: Tensor) -> None:
        """Add several sources' `deltas` ([m, h]), one after another: of the rows `ids[i]` (int64, ascending) each."""
        self._take(ids, deltas)
        for each in ids:
            self.counts.index_add_(0, each, torch.ones_like(each, dtype=torch.int32))

    @torch.no_grad()
    def merge(self, indices: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Add what several sources came to elsewhere: `sums` [k, h], `counts` int32 [k] of the rows `indices`."""
        self._take([indices], sums)
        self.counts.index_add_(0, indices, counts)

    @torch.no_grad()
    def make_room(self) -> None:
        """While more is to come: add up what came so far, where it has outgrown a table of sums."""
        if sum(len(piece.deltas) for piece in self._pieces) > self._at_most:
            self._fold()

    @torch.no_grad()
    def step(self, rule: OuterRule, table: StoredRows, momentum: StoredRows | None) -> None:
        """`dept.outer.outer_step` on the rows of `table` [n, h] that some source holds, by their mean deltas, in place.

        A row held by none of the sampled sources keeps value and momentum bit for bit: it took no part in the round, so
        even its momentum does not decay. What was added stays as it is.
        """
        assert (momentum is not None) == needs_momentum(rule), f"momentum buffer does not fit {rule}"
        for start, stop in table.blocks():
            block = self._block(start, stop)
            if len(block.rows):
                trim_scatter_mean(
                    table.tensor,
                    momentum.tensor if momentum is not None else None,
                    block.rows,
                    block.starts,
                    block.order,
                    block.deltas,
                    self.counts[block.rows],
                    rule.learning_rate,
                    rule.momentum,
                )
            self._let_go(start, stop, table, momentum)

    @torch.no_grad()
    def sums(self, start: int, stop: int) -> Tensor:
        """Summed deltas of the rows [start, stop), fp32, zero where no source holds the row."""
        if self._dense is not None:
            return self._dense.read(start, stop)
        sums = torch.zeros(stop - start, self._hidden)
        self._add_to(sums, start, stop)
        return sums

    @torch.no_grad()
    def touched(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows int64 [k] that some source holds, ascending; their sums fp32 [k, h]; their counts int32 [k])."""
        rows = self.counts.nonzero().squeeze(1)
        sums = torch.empty(len(rows), self._hidden)
        at_once = block_rows(self._hidden)
        for start in range(0, len(self.counts), at_once):
            stop = min(start + at_once, len(self.counts))
            first, last = torch.searchsorted(rows, torch.tensor([start, stop])).tolist()
            sums[first:last] = self.sums(start, stop)[rows[first:last] - start]
        return rows, sums, self.counts[rows]

    @torch.no_grad()
    def put_back(self, start: int, sums: Tensor, counts: Tensor) -> None:
        """Go on from what `sums` and `counts` were of the rows from `start` on, in a checkpoint."""
        assert not self._pieces, "sums are put back before anything is added"
        if self._dense is None:
            self._dense = self._storage.make(len(self.counts), self._hidden)
        self._dense.write(start, sums)
        self.counts[start : start + len(sums)] = counts

    def reset(self) -> None:
        """Forget the round."""
        self._pieces = []
        self._dense = None
        self.counts.zero_()

    def _take(self, ids: Sequence[Tensor], deltas: Tensor) -> None:
        assert deltas.dtype in (torch.float32, torch.bfloat16), f"deltas {deltas.dtype}"
        assert deltas.shape == (sum(len(each) for each in ids), self._hidden), f"{tuple(deltas.shape)} for the rows"
        for each in ids:
            assert each.dtype == torch.int64, f"rows {each.dtype}"
            assert bool((each[1:] > each[:-1]).all()), "a source holds a row once, and names its rows in order"
        if not len(deltas):
            return
        self._pieces.append(_Piece(tuple(ids), deltas))
        if self._dense is not None:
            self._fold()

    def _fold(self) -> None:
        """Add up all pieces in a table of sums."""
        if self._dense is None:
            self._dense = self._storage.make(len(self.counts), self._hidden)
        for start, stop in self._dense.blocks():
            self._add_to(self._dense.tensor[start:stop], start, stop)
            self._dense.let_go(start, stop)
        self._pieces.clear()

    def _add_to(self, sums: Tensor, start: int, stop: int) -> None:
        """Add the pieces' deltas of the rows [start, stop) to these rows' `sums`, source after source."""
        for piece in self._pieces:
            for ids, place in self._places(piece, start, stop):
                sums.index_add_(0, ids - start, piece.deltas[place].float())

    def _block(self, start: int, stop: int) -> _Block:
        """What is to be summed of the rows [start, stop)."""
        if self._dense is not None:
            assert not self._pieces
            rows = self.counts[start:stop].nonzero().squeeze(1)
            return _Block(rows + start, torch.arange(len(rows) + 1), rows, self._dense.tensor[start:stop])
        found = [(piece, list(self._places(piece, start, stop))) for piece in self._pieces]
        found = [(piece, places) for piece, places in found if places]
        if not found:
            nothing = torch.empty(0, dtype=torch.int64)
            return _Block(nothing, torch.zeros(1, dtype=torch.int64), nothing, torch.empty(0, self._hidden))
        rows, starts, order = order_by_row([ids for _, places in found for ids, _ in places])
        if len(found) == 1:
            # All of it came at once: it is read where it lies.
            piece, places = found[0]
            where = torch.cat([torch.arange(place.start, place.stop) for _, place in places])
            return _Block(rows, starts, where[order], piece.deltas)
        deltas = torch.cat([piece.deltas[place] for piece, places in found for _, place in places])
        return _Block(rows, starts, order, deltas)

    @staticmethod
    def _places(piece: _Piece, start: int, stop: int) -> Iterator[tuple[Tensor, slice]]:
        """By source of a piece, which of the rows [start, stop) it holds, and where in the piece their deltas are."""
        offset, edges = 0, torch.tensor([start, stop])
        for ids in piece.ids:
            first, last = torch.searchsorted(ids, edges).tolist()
            if first < last:
                yield ids[first:last], slice(offset + first, offset + last)
            offset += len(ids)

    def _let_go(self, start: int, stop: int, *tables: StoredRows | None) -> None:
        for table in (*tables, self._dense):
            if table is not None:
                table.let_go(start, stop)


@torch.no_grad()
def mean_delta(sum_of_deltas: Tensor, sources: int) -> Tensor:
    """Divide a summed delta in place by the number of sampled sources (not of silos); returns the same tensor.

    Weights are uniform: every sampled source trains equally many steps of equal batches.
    """
    assert sources > 0, "a round without sources has no mean"
    return sum_of_deltas.div_(sources)
