"""From ids to embeddings in one pass: global id to local row, row + position, one rounding; and the way back.

Shapes: `b` batch, `s` sequence, `h` hidden, `V` global vocabulary, `v` rows of the local table, `L` positions, `u` rows
touched by a batch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dept.ops import reference
from megatron_dept.ops.arguments import FLOATS, expect, expect_dtype
from megatron_dept.ops.native import native_kernels


def remap_lookup(
    ids: Tensor,
    local_of: Tensor | None,
    table: Tensor,
    position: Tensor | None,
    dtype: torch.dtype,
    start: int = 0,
) -> Tensor:
    """Embeddings [b, s, h] in `dtype` of `ids` (int64 [b, s]): table[local_of[id] - start] + position[t], rounded once.

    `local_of` (int32 [V]) gives an id's row of the source's table; without it ids are such rows. `table` (fp32 [v, h])
    holds rows start..start+v-1, a vocabulary shard: any other row counts as zeros. `position` (fp32 [L, h], L >= s) is
    added in fp32. Differentiable in `table` and `position`. Mapped and not cast, on a CPU, it is torch's composition,
    which no kernel of ours is ahead of (`benchmarks/kernels.py`).

    Raises ValueError, naming the argument, for a wrong dtype, shape or device; IndexError for an id outside `local_of`.
    """
    _expect_lookup(ids, local_of, table, position, dtype)
    looked_up: Tensor = _Lookup.apply(ids, local_of, table, position, dtype, start)
    return looked_up


def remap_lookup_adding_gradient(
    ids: Tensor,
    local_of: Tensor | None,
    table: Tensor,
    position: Tensor | None,
    dtype: torch.dtype,
    start: int = 0,
) -> Tensor:
    """`remap_lookup` whose backward adds the rows touched to `table.grad`, a leaf's, itself: nothing of size v is made.

    For a table that the head uses too: through autograd, the look-up's gradient would be a second [v, h] of zeros and a
    few rows, added to the head's, which comes first. Where `table` has no gradient yet it gets one, dense, of zeros.
    Only `backward` fills it: `torch.autograd.grad`, and hooks on `table`, do not see the look-up's part.
    """
    if not (torch.is_grad_enabled() and table.requires_grad):
        return remap_lookup(ids, local_of, table, position, dtype, start)
    if not table.is_leaf:
        raise ValueError("table is no leaf: it has no gradient to add to")
    _expect_lookup(ids, local_of, table, position, dtype)
    # The anchor makes autograd come back here. The table must take no part in its graph, or the head's gradient would
    # wait for this backward: so it is handed over inside a tuple, where autograd does not look.
    anchor = table.new_empty(0).requires_grad_()
    looked_up: Tensor = _AddingLookup.apply(anchor, ids, local_of, (table,), position, dtype, start)
    return looked_up


def remap_lookup_backward(
    ids: Tensor, local_of: Tensor | None, grad: Tensor, rows: int, start: int, positions: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of `remap_lookup` where it is not zero: (touched, grad_rows, grad_position).

    `grad` [b, s, h] fp32, bf16 or fp16; `rows` are those of the table, v. `touched` int64 [u]: its rows that occur,
    ascending; `grad_rows` fp32 [u, h]: their gradients, summed from zero in the order of (b, s). `grad_position`
    fp32 [positions, h], summed in the order of b; None where `positions` is 0.
    """
    _expect_ids(ids, local_of, grad.device)
    expect("grad", grad, FLOATS, (*ids.shape, None), grad.device)
    if rows < 0 or 0 < positions < ids.shape[1]:
        raise ValueError(f"rows is {rows}, positions {positions} for a sequence of {ids.shape[1]}")
    _expect_known(ids, local_of)
    if not native_kernels(grad.device.type):
        return reference.remap_lookup_backward(ids, local_of, grad, rows, start, positions)
    touched, starts, order = grouped(ids if local_of is None else local_of[ids].long(), rows, start)
    grad_rows = grad.new_empty(len(touched), grad.shape[2], dtype=torch.float32)
    grad_position = grad.new_empty(positions, grad.shape[2], dtype=torch.float32) if positions else None
    torch.ops.megatron_dept.remap_backward(grad, starts, order, grad_rows, grad_position)
    return touched, grad_rows, grad_position


def grouped(local: Tensor, rows: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of the shard that occur, ascending [u]; where each one's occurrences start [u+1]; these, in order)."""
    shard = local.reshape(-1) - start
    places = ((shard >= 0) & (shard < rows)).nonzero().squeeze(1)
    ascending, order = shard[places].sort(stable=True)
    touched, held = torch.unique_consecutive(ascending, return_counts=True)
    return touched, torch.cat([held.new_zeros(1), held.cumsum(0)]), places[order]


def _expect_lookup(
    ids: Tensor, local_of: Tensor | None, table: Tensor, position: Tensor | None, dtype: torch.dtype
) -> None:
    expect("table", table, torch.float32, (None, None), table.device)
    _expect_ids(ids, local_of, table.device)
    expect_dtype("dtype", dtype)
    if position is not None:
        expect("position", position, torch.float32, (None, table.shape[1]), table.device)
        if len(position) < ids.shape[1]:
            raise ValueError(f"position has {len(position)} rows for a sequence of {ids.shape[1]}")
    _expect_known(ids, local_of)


def _expect_ids(ids: Tensor, local_of: Tensor | None, device: torch.device) -> None:
    expect("ids", ids, torch.int64, (None, None), device)
    if local_of is not None:
        expect("local_of", local_of, torch.int32, (None,), device)


def _expect_known(ids: Tensor, local_of: Tensor | None) -> None:
    """IndexError for an id outside `local_of`: python's indexing would take a negative one from the end."""
    if torch.compiler.is_compiling():
        return  # no number can be read while a graph is traced; on the CPU the operator looks itself
    if local_of is not None and ids.numel() and bool(((ids < 0) | (ids >= len(local_of))).any()):
        raise IndexError(f"ids holds an id outside 0..{len(local_of) - 1}, those that local_of maps")


def _looked_up(
    ids: Tensor, local_of: Tensor | None, table: Tensor, position: Tensor | None, dtype: torch.dtype, start: int
) -> Tensor:
    uncast = local_of is not None and dtype == torch.float32 and table.device.type == "cpu"
    if uncast or not native_kernels(table.device.type):
        return reference.remap_lookup(ids, local_of, table, position, dtype, start)
    out = table.new_empty(*ids.shape, table.shape[1], dtype=dtype)
    torch.ops.megatron_dept.remap_lookup(ids, local_of, table, position, start, out)
    return out


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        local_of: Tensor | None,
        table: Tensor,
        position: Tensor | None,
        dtype: torch.dtype,
        start: int,
    ) -> Tensor:
        ctx.save_for_backward(ids, local_of)
        ctx.rows, ctx.start, ctx.positions = len(table), start, 0 if position is None else len(position)
        return _looked_up(ids, local_of, table, position, dtype, start)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ids, local_of = ctx.saved_tensors
        grad = gradients[0].contiguous()
        touched, grad_rows, grad_position = remap_lookup_backward(
            ids, local_of, grad, ctx.rows, ctx.start, ctx.positions
        )
        grad_table = grad.new_zeros(ctx.rows, grad.shape[2], dtype=torch.float32)
        grad_table[touched] = grad_rows
        return None, None, grad_table, grad_position, None, None


class _AddingLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        ids: Tensor,
        local_of: Tensor | None,
        leaf: tuple[Tensor],
        position: Tensor | None,
        dtype: torch.dtype,
        start: int,
    ) -> Tensor:
        ctx.save_for_backward(ids, local_of)
        ctx.start, ctx.positions, ctx.leaf = start, 0 if position is None else len(position), leaf[0]
        return _looked_up(ids, local_of, leaf[0].detach(), position, dtype, start)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ids, local_of = ctx.saved_tensors
        leaf = ctx.leaf
        touched, grad_rows, grad_position = remap_lookup_backward(
            ids, local_of, gradients[0].contiguous(), len(leaf), ctx.start, ctx.positions
        )
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        # No row comes twice, so that it adds in no other order on any device.
        leaf.grad.index_add_(0, touched, grad_rows)
        return None, None, None, None, grad_position, None, None
