"""Linear layers cut over the tensor ranks: Megatron-LM's column- and row-parallel linears (Shoeybi et al., 2019).

Shapes: b batch, s sequence, i inputs, o outputs, T tensor ranks.

A block is `enter_ranks`, column-parallel layers, what each rank computes on its own, and one row-parallel layer, which
sums over the ranks. Both weights are cut by rows of what is stored, so the row-parallel one is stored input-major.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dept.tensor_parallel.group import ALONE, TensorGroup
from megatron_dept.tensor_parallel.mappings import leave_ranks, sum_copied_rows, sum_gradients
from megatron_dept.tensor_parallel.shards import Rows, cut_by_rows, even_rows, mark, replicated


class ColumnParallelLinear(nn.Module):
    """`weight` [o, i] and `bias` [o], of which this rank holds `rows`; without them, an even share.

    The last `copied_rows` rows of a rank's part may be held by several ranks: this rank has the set number `copy` of
    `copies` different ones, and their gradients are summed over their holders. The input must have passed
    `enter_ranks`, once for all layers that read it. Values are not initialised.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        tensor: TensorGroup = ALONE,
        rows: tuple[Rows, ...] | None = None,
        copied_rows: int = 0,
        copy: int = 0,
        copies: int = 0,
    ) -> None:
        super().__init__()
        rows = even_rows(outputs, tensor) if rows is None else rows
        shard = cut_by_rows((outputs, inputs), rows)
        self.weight = mark(nn.Parameter(torch.empty(shard.local_shape)), shard)
        self.bias: nn.Parameter | None = None
        if bias:
            shard = cut_by_rows((outputs,), rows)
            self.bias = mark(nn.Parameter(torch.empty(shard.local_shape)), shard)
        if copied_rows:
            for parameter in self.parameters():
                parameter.register_hook(
                    functools.partial(sum_copied_rows, tensor=tensor, copy=copy, copies=copies, rows=copied_rows)
                )

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, i] -> this rank's outputs [b, s, o/T]."""
        return F.linear(hidden, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x @ weight, + bias: `weight` [i, o] of which this rank holds i/T rows, `bias` [o] whole.

    Values are not initialised. `ValueError` where T does not divide i.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, tensor: TensorGroup = ALONE, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self._tensor, self._sequence_parallel = tensor, sequence_parallel
        shard = cut_by_rows((inputs, outputs), even_rows(inputs, tensor))
        self.weight = mark(nn.Parameter(torch.empty(shard.local_shape)), shard)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = mark(nn.Parameter(torch.empty(outputs)), replicated((outputs,), tensor))

    def forward(self, hidden: Tensor) -> Tensor:
        """This rank's [b, s, i/T] -> [b, s, o] on every rank, or its [b, s/T, o] under sequence parallelism."""
        # The product takes the weight itself, not its transpose: of a view ZeRO 3 could not let go until the backward.
        if self._tensor.size == 1 and self.bias is not None:
            flat = hidden.reshape(-1, hidden.shape[-1])
            return torch.addmm(self.bias, flat, self.weight).view(*hidden.shape[:-1], -1)
        total = leave_ranks(hidden @ self.weight, self._tensor, self._sequence_parallel)
        if self.bias is None:
            return total
        # Under sequence parallelism each rank adds it to its own tokens only.
        (bias,) = sum_gradients(self._tensor, self.bias) if self._sequence_parallel else (self.bias,)
        return total + bias
