"""Rows of an embedding table: gathered by id, and the deltas of several sources averaged back into it.

Shapes: `n` rows of the shard of a global table, `h` hidden, `k` ids, `m` delta rows, `m'` occurrences.
"""

import torch
from torch import Tensor

from megatron_dept.ops import reference
from megatron_dept.ops.arguments import FLOATS, expect, expect_dtype
from megatron_dept.ops.native import native_kernels


def trim_gather(
    table: Tensor, ids: Tensor, first: int = 0, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """Rows `ids` (int64 [k], ascending) of a shard `table` (fp32 [n, h]): [k, h] in `dtype`.

    The shard holds the global rows first..first+n-1. An id outside the shard gives a row of zeros. `out` [k, h] of
    `dtype` is filled and returned where given.
    Raises ValueError, naming the argument, for a wrong dtype, shape or device.
    """
    expect("table", table, torch.float32, (None, None), table.device)
    expect("ids", ids, torch.int64, (None,), table.device)
    expect_dtype("dtype", dtype)
    if out is not None:
        expect("out", out, dtype, (len(ids), table.shape[1]), table.device)
    if not native_kernels(table.device.type):
        return reference.trim_gather(table, ids, first, dtype, out)
    if out is None:
        out = torch.empty(len(ids), table.shape[1], dtype=dtype, device=table.device)
    torch.ops.megatron_dept.trim_gather(table, ids, first, out)
    return out


def trim_scatter_mean(
    table: Tensor,
    momentum: Tensor | None,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    deltas: Tensor,
    counts: Tensor,
    learning_rate: float,
    mu: float,
) -> None:
    """The outer step on the rows that sources hold, in place on `table` and `momentum` (fp32 [n, h] or None).

    Row rows[u] (int64 [k], unique, ascending, of the shard) takes deltas[order[j]] for j in starts[u]..starts[u+1]-1,
    in that order, summed from zero in fp32: `starts` int64 [k+1], `order` int64 [m'] of row numbers of `deltas`
    ([m, h] fp32, bf16 or fp16), see `order_by_row`. d = sum / counts[u] (int32 [k], at least 1). With momentum it is
    Nesterov's m = mu * m + d; value -= learning_rate * (mu * m + d), else FedAvg's value -= learning_rate * d.
    Rows not in `rows` keep value and momentum bit for bit.

    Raises ValueError, naming the argument, for a wrong dtype, shape or device.
    """
    device = table.device
    expect("table", table, torch.float32, (None, None), device)
    if momentum is not None:
        expect("momentum", momentum, torch.float32, table.shape, device)
    expect("rows", rows, torch.int64, (None,), device)
    expect("starts", starts, torch.int64, (len(rows) + 1,), device)
    expect("order", order, torch.int64, (None,), device)
    expect("deltas", deltas, FLOATS, (None, table.shape[1]), device)
    expect("counts", counts, torch.int32, (len(rows),), device)
    form = torch.ops.megatron_dept if native_kernels(device.type) else reference
    form.trim_scatter_mean(table, momentum, rows, starts, order, deltas, counts, learning_rate, mu)


def order_by_row(ids: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What `trim_scatter_mean` sums by: (rows, starts, order), all int64, of the sources' id lists (int64 [k_i]).

    `rows` [k] are the ids that occur, ascending; `order` [sum of k_i] lists, row after row, where each row's deltas
    stand in the concatenation of the sources', earlier sources first; those of rows[u] begin at starts[u] ([k+1]).
    """
    if not ids:
        raise ValueError("ids is empty; give one list of ids for each source")
    for each in ids:
        expect("ids", each, torch.int64, (None,), ids[0].device)
    everything = torch.cat(ids)
    order = torch.argsort(everything, stable=True)
    rows, held = torch.unique_consecutive(everything[order], return_counts=True)
    return rows, torch.cat([held.new_zeros(1), held.cumsum(0)]), order
