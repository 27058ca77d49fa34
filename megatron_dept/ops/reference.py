"""What every kernel computes, in plain torch: the specification that the native ones equal bit for bit, and the way
taken where they are not built.

Shapes: `n` rows of a table's shard or elements of a body's, `h` hidden, `k` ids, `m` delta rows, `S` silos, `v` rows of
a local table, `V` global vocabulary, `L` positions, `u` rows touched.

Every multiplication, addition and division is rounded by itself, in fp32; casts round to nearest even; sums have the
order that is stated. So CPU, GPU and reference give the same bits. Which NaN a NaN becomes is left open. Arguments are
those of the faces beside this file (`rows`, `remap`, `body`), which check them.
"""

import torch
from torch import Tensor

from megatron_dept.ops.wires import BLOCK

LARGEST = 127
"""The largest magnitude of an int8 element: -128 is not used, so that signs are alike."""


def divided(dividend: Tensor, divisor: float) -> Tensor:
    """dividend / divisor, rounded once: with a plain number CUDA multiplies by a rounded reciprocal instead."""
    return dividend / torch.full((), divisor, dtype=dividend.dtype, device=dividend.device)


def stepped(value: Tensor, mean: Tensor, momentum: Tensor | None, learning_rate: float, mu: float) -> Tensor:
    """The outer step's new value (`dept.outer`): FedAvg, or Nesterov with `momentum` updated in place."""
    if momentum is not None:
        momentum.mul_(mu).add_(mean)
        mean = momentum.mul(mu).add_(mean)
    return value - mean.mul(learning_rate)


def trim_gather(
    table: Tensor, ids: Tensor, first: int = 0, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """`rows.trim_gather`."""
    rows = ids - first
    inside = (rows >= 0) & (rows < len(table))
    if out is None:
        out = torch.empty(len(ids), table.shape[1], dtype=dtype, device=table.device)
    out.zero_()
    out[inside] = table[rows[inside]].to(dtype)
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
    """`rows.trim_scatter_mean`."""
    held = starts.diff()
    total = torch.zeros(len(rows), table.shape[1], device=table.device)
    for nth in range(int(held.max()) if len(rows) else 0):
        some = held > nth
        total[some] += deltas[order[starts[:-1][some] + nth]].float()
    mean = total / counts.float().unsqueeze(1)
    row_momentum = momentum[rows] if momentum is not None else None
    table[rows] = stepped(table[rows], mean, row_momentum, learning_rate, mu)
    if momentum is not None and row_momentum is not None:
        momentum[rows] = row_momentum


def remap_lookup(
    ids: Tensor,
    local_of: Tensor | None,
    table: Tensor,
    position: Tensor | None,
    dtype: torch.dtype,
    start: int = 0,
) -> Tensor:
    """`remap.remap_lookup`, without gradients."""
    local = ids if local_of is None else local_of[ids].long()
    rows = trim_gather(table, local.reshape(-1), start).view(*ids.shape, table.shape[1])
    if position is not None:
        rows += position[: ids.shape[1]]
    return rows.to(dtype)


def remap_lookup_backward(
    ids: Tensor, local_of: Tensor | None, grad: Tensor, rows: int, start: int, positions: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`remap.remap_lookup_backward`."""
    device, hidden = grad.device, grad.shape[2]
    local = (ids if local_of is None else local_of[ids].long()).reshape(-1) - start
    inside = (local >= 0) & (local < rows)
    touched, place = local[inside].unique(sorted=True, return_inverse=True)
    # On the CPU, whatever the device: index_add_ takes the occurrences in order there, and in any order on a GPU.
    grad_rows = torch.zeros(len(touched), hidden)
    grad_rows.index_add_(0, place.cpu(), grad.flatten(0, 1)[inside].float().cpu())
    grad_position = None
    if positions:
        grad_position = torch.zeros(positions, hidden, device=device)
        for sequence in grad.float():
            grad_position[: len(sequence)] += sequence
    return touched, grad_rows.to(device), grad_position


def body_pack(
    value: Tensor,
    local: Tensor | None,
    carried: Tensor | None,
    residual: Tensor | None,
    wire: str,
    out: Tensor,
) -> None:
    """`body.body_pack`."""
    delta = value if local is None else value - local
    encode(delta if carried is None else carried + delta, residual, wire, out)


def body_mean(received: Tensor, sources: int, wire: str, out: Tensor) -> None:
    """`body.body_mean`."""
    out.copy_(decode(received[0], wire, out.numel()))
    for packed in received[1:]:
        out.add_(decode(packed, wire, out.numel()))
    out.copy_(divided(out, sources))


def body_unpack(
    received: Tensor,
    sources: int,
    value: Tensor,
    momentum: Tensor | None,
    learning_rate: float,
    mu: float,
    wire: str,
    back: Tensor,
    back_residual: Tensor | None,
) -> None:
    """`body.body_unpack`."""
    mean = torch.empty_like(value)
    body_mean(received, sources, wire, mean)
    new = stepped(value, mean, momentum, learning_rate, mu)
    encode(new if wire == "fp32" else value - new, back_residual, wire, back)


def body_apply(back: Tensor, value: Tensor, wire: str, master: Tensor | None = None, low: Tensor | None = None) -> None:
    """`body.body_apply`."""
    sent = decode(back, wire, value.numel())
    value.copy_(sent if wire == "fp32" else value - sent)
    for copy in (master, low):
        if copy is not None:
            copy.copy_(value)


def encode(elements: Tensor, residual: Tensor | None, wire: str, out: Tensor) -> None:
    """fp32 [n] into the bytes of a wire; int8 adds `residual` first and leaves in it what the wire could not say.

    A block with an element that is not finite is sent as a scale of NaN: nothing of it arrives as a number.
    """
    n = elements.numel()
    if not n:
        return
    if wire == "fp32":
        out.view(torch.float32).copy_(elements)
        return
    if wire == "bf16":
        out.view(torch.bfloat16).copy_(elements)
        return
    if residual is not None:
        elements = elements + residual
    blocks = torch.nn.functional.pad(elements, (0, -n % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    scale = divided(largest, LARGEST)
    inverse = torch.where(largest == 0, 0.0, torch.full_like(largest, LARGEST) / largest)
    # A NaN comes of 0 * inf too, where 127 / largest overflows.
    quantised = (blocks * inverse.unsqueeze(1)).clamp(-LARGEST, LARGEST).round().nan_to_num(0.0)
    padded = n + -n % 4
    out[:padded] = 0
    out[:n].view(torch.int8).copy_(quantised.view(-1)[:n])
    out[padded:].view(torch.float32).copy_(scale)
    if residual is not None:
        residual.copy_((blocks - quantised * scale.unsqueeze(1)).view(-1)[:n])


def decode(packed: Tensor, wire: str, n: int) -> Tensor:
    """The fp32 [n] that `encode` made `packed` of, as far as the wire could say it."""
    if not n:
        return torch.empty(0, device=packed.device)
    if wire == "fp32":
        return packed.view(torch.float32)
    if wire == "bf16":
        return packed.view(torch.bfloat16).float()
    scale = packed[n + -n % 4 :].view(torch.float32)
    return packed[:n].view(torch.int8).float() * scale.repeat_interleave(BLOCK)[:n]
