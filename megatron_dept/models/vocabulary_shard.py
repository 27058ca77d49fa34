"""Which rows of a source's vocabulary a tensor rank holds: balanced, uneven, without padding.

Shapes: v the source's vocabulary, T tensor ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dept.tensor_parallel.group import TensorGroup


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's rows [start, stop) of a vocabulary of `total`, and the ranks that share it.

    `sequence_parallel`: hidden states come and go split along the sequence. `ValueError` where `total` < T.
    """

    tensor: TensorGroup
    total: int
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.total < self.tensor.size:
            raise ValueError(
                f"a vocabulary of {self.total} leaves some of {self.tensor.size} tensor ranks without a row; "
                f"use at most {self.total} tensor ranks"
            )

    @staticmethod
    def vocabulary_range(total: int, ranks: int, rank: int) -> range:
        """Rows of tensor rank `rank` of `ranks`: the first total % ranks have one row more than the others."""
        size, more = divmod(total, ranks)
        start = rank * size + min(rank, more)
        return range(start, start + size + (rank < more))

    @property
    def start(self) -> int:
        return self.vocabulary_range(self.total, self.tensor.size, self.tensor.rank).start

    @property
    def stop(self) -> int:
        return self.vocabulary_range(self.total, self.tensor.size, self.tensor.rank).stop

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the source -> (row of this rank's table, or 0 where another rank has the id; which those are: bool).

        An id outside the vocabulary becomes a row outside every rank's table, so that the look-up refuses it.
        """
        elsewhere = ((ids >= 0) & (ids < self.start)) | ((ids >= self.stop) & (ids < self.total))
        return torch.where(elsewhere, 0, ids - self.start), elsewhere
