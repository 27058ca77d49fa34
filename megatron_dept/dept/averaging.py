"""The mean of deltas over the sampled sources, row by row where sources hold different rows.

Shapes: `n` rows of the global table, `h` hidden, `k` rows that one source holds. fp32 sums, int32 counts.
"""

import torch
from torch import Tensor


class RowMean:
    """Accumulates sources' row deltas of a round; the mean of a row is over the sources that hold it (DEPT's TRIM).

    GLOB is the case that every source holds every row. Sums grow in the order of the calls, so equal calls give equal
    bits. Dense: one [rows, hidden] fp32 table and one int32 count per row; `mean` makes one more table. `sums` and
    `counts` are public: they are what a mid-round checkpoint saves and loads.
    """

    def __init__(self, rows: int, hidden: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(rows, hidden, dtype=torch.float32, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int32, device=device)

    @torch.no_grad()
    def add(self, indices: Tensor, deltas: Tensor) -> None:
        """Add one source's `deltas` (fp32 [k, h]) to the rows `indices` (int64 [k], unique) and count its holding."""
        assert indices.dtype == torch.int64 and deltas.dtype == torch.float32, f"{indices.dtype}, {deltas.dtype}"
        assert deltas.shape == (indices.numel(), self.sums.shape[1]), (
            f"{tuple(deltas.shape)} for {indices.numel()} rows"
        )
        assert indices.unique().numel() == indices.numel(), "a source holds a row once"
        self.sums.index_add_(0, indices, deltas)
        self.counts.index_add_(0, indices, torch.ones_like(indices, dtype=torch.int32))

    @torch.no_grad()
    def merge(self, indices: Tensor, sums: Tensor, counts: Tensor) -> None:
        """Add what several sources came to elsewhere: `sums` fp32 [k, h], `counts` int32 [k] of the rows `indices`."""
        self.sums.index_add_(0, indices, sums)
        self.counts.index_add_(0, indices, counts)

    @torch.no_grad()
    def mean(self) -> tuple[Tensor, Tensor]:
        """Mean delta fp32 [n, h], zero where no source holds the row, and `held` bool [n]; the state stays as it is."""
        return self.sums / self.counts.clamp(min=1).unsqueeze(1), self.counts > 0

    def reset(self) -> None:
        """Forget the round."""
        self.sums.zero_()
        self.counts.zero_()


@torch.no_grad()
def mean_delta(sum_of_deltas: Tensor, sources: int) -> Tensor:
    """Divide a summed delta in place by the number of sampled sources (not of silos); returns the same tensor.

    Weights are uniform: every sampled source trains equally many steps of equal batches.
    """
    assert sources > 0, "a round without sources has no mean"
    return sum_of_deltas.div_(sources)
