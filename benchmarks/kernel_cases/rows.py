"""Rows of a table of 50k x 768: gathered, averaged back, looked up, and the look-up's gradient; about 20k rows each."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_cases.case import LEARNING_RATE, MU, PIECE, Case, Variant, by_inductor, into, short
from megatron_dept.ops import remap, rows
from megatron_dept.ops.native import OPERATORS

TABLE, HIDDEN, ROWS, SOURCES = 50_000, 768, 20_000, 3
SEQUENCES, LENGTH = 20, 1024


def groups(device: str) -> dict[str, Callable[[], Case]]:
    """The cases, each made when it is called for, so that only one's memory is held."""
    made: dict[str, Callable[[], Case]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made[f"trim_gather {short(dtype)}"] = partial(gather, device, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        for choice in (False, True):
            made[f"trim_scatter_mean {short(dtype)} {choice}"] = partial(scatter, device, dtype, choice)
            made[f"remap_lookup {short(dtype)} {choice}"] = partial(look_up, device, dtype, choice)
        made[f"remap_backward {short(dtype)}"] = partial(look_up_backward, device, dtype)
    return dict(sorted(made.items(), key=lambda item: OPERATORS.index(item[0].split()[0])))


def gather(device: str, dtype: torch.dtype) -> Case:
    table = torch.randn(TABLE, HIDDEN, device=device)
    ids = torch.randperm(TABLE, device=device)[:ROWS].sort().values
    scratch = torch.empty(ROWS, HIDDEN, device=device)
    ours, theirs = (torch.empty(ROWS, HIDDEN, dtype=dtype, device=device) for _ in range(2))

    def fused():
        torch.ops.megatron_dept.trim_gather(table, ids, 0, ours)
        return (ours,)

    def in_pieces():
        some = PIECE // HIDDEN
        for start in range(0, ROWS, some):
            part = ids[start : start + some]
            torch.index_select(table, 0, part, out=scratch[: len(part)])
            theirs[start : start + some].copy_(scratch[: len(part)])
        return (theirs,)

    peers: dict[str, Variant] = {"index_select(out)": lambda: (torch.index_select(table, 0, ids, out=theirs),)}
    if dtype != torch.float32:
        peers = {
            "index_select(out), copy_": lambda: (theirs.copy_(torch.index_select(table, 0, ids, out=scratch)),),
            "index_select(out), copy_ in pieces": in_pieces,
            "inductor": by_inductor(lambda t, i, out: into([out], [t[i].to(dtype)]), table, ids, theirs),
        }
    moved = ROWS * HIDDEN * (4 + ours.element_size())
    return Case(f"trim_gather to {short(dtype)}", moved, fused, peers)


def scatter(device: str, dtype: torch.dtype, with_momentum: bool) -> Case:
    ids = [torch.randperm(TABLE, device=device)[:ROWS].sort().values for _ in range(SOURCES)]
    held, starts, order = rows.order_by_row(ids)
    counts, place = starts.diff().int(), torch.searchsorted(held, torch.cat(ids))
    deltas = torch.randn(SOURCES * ROWS, HIDDEN, device=device).to(dtype)
    sums = torch.empty(len(held), HIDDEN, device=device)
    first = torch.randn(TABLE, HIDDEN, device=device)

    def state() -> tuple[Tensor, Tensor | None]:
        return first.clone(), torch.zeros_like(first) if with_momentum else None

    def step(table: Tensor, momentum: Tensor | None, mean: Tensor) -> tuple[Tensor, ...]:
        if momentum is not None:
            own = momentum.index_select(0, held).mul_(MU).add_(mean)
            momentum.index_copy_(0, held, own)
            mean = own.mul_(MU).add_(mean)
        # Weight and subtraction in one pass over the rows.
        return (table.index_add_(0, held, mean, alpha=-LEARNING_RATE),)

    def fused(table, momentum):
        rows.trim_scatter_mean(table, momentum, held, starts, order, deltas, counts, LEARNING_RATE, MU)
        return (table,)

    def added(table, momentum):
        sums.zero_().index_add_(0, place, deltas.float())
        return step(table, momentum, sums.div_(counts.unsqueeze(1)))

    def source_by_source(table, momentum):
        # One source's deltas after the other's, so that no fp32 copy of all of them is made.
        sums.zero_()
        for which, part in zip(place.split(ROWS), deltas.split(ROWS), strict=True):
            sums.index_add_(0, which, part.float())
        return step(table, momentum, sums.div_(counts.unsqueeze(1)))

    def weighted_first(table, momentum):
        # Without momentum, deltas weighted beforehand go straight into the table.
        weight = (-LEARNING_RATE / counts[place]).unsqueeze(1)
        return (table.index_add_(0, torch.cat(ids), deltas * weight),)

    peers = {"index_add_, step": added, "index_add_ by source, step": source_by_source}
    if not with_momentum:
        peers["mul, index_add_"] = weighted_first
    own = {name: partial(function, *state()) for name, function in (("", fused), *peers.items())}
    moved = len(held) * HIDDEN * 4 * (4 if with_momentum else 2) + deltas.numel() * deltas.element_size()
    name = f"trim_scatter_mean of {short(dtype)}, {'Nesterov' if with_momentum else 'FedAvg'}"
    return Case(name, moved, own.pop(""), own)


def look_up(device: str, dtype: torch.dtype, mapped: bool) -> Case:
    table, position = torch.randn(TABLE, HIDDEN, device=device), torch.randn(LENGTH, HIDDEN, device=device)
    local_of = torch.randperm(TABLE, device=device).int() if mapped else None
    ids = torch.randint(0, TABLE, (SEQUENCES, LENGTH), device=device)

    ours, theirs = (torch.empty(SEQUENCES, LENGTH, HIDDEN, dtype=dtype, device=device) for _ in range(2))
    scratch = torch.empty(SEQUENCES, LENGTH, HIDDEN, device=device)

    def local() -> Tensor:
        return ids if local_of is None else local_of[ids]

    def fused():
        torch.ops.megatron_dept.remap_lookup(ids, local_of, table, position, 0, ours)
        return (ours,)

    def selected(which: Tensor, to: Tensor) -> Tensor:
        return torch.index_select(table, 0, which.reshape(-1), out=to.view(-1, HIDDEN)).view(to.shape).add_(position)

    def whole():
        if dtype == torch.float32:
            return (selected(local(), theirs),)
        return (theirs.copy_(selected(local(), scratch)),)

    def by_sequence():
        for each, to in zip(local(), theirs, strict=True):
            if dtype == torch.float32:
                selected(each, to)
            else:
                to.copy_(selected(each, scratch[0]))
        return (theirs,)

    def compiled(i, g, t, p, out):
        return into([out], [(t[i if g is None else g[i]] + p).to(dtype)])

    peers: dict[str, Variant] = {
        "embedding, +, to": lambda: ((F.embedding(local(), table) + position).to(dtype),),
        "index_select(out), add_, copy_": whole,
        "the same by sequence": by_sequence,
        "inductor": by_inductor(compiled, ids, local_of, table, position, theirs),
    }
    moved = ids.numel() * HIDDEN * (4 + torch.empty(0, dtype=dtype).element_size()) + LENGTH * HIDDEN * 4
    name = f"remap_lookup to {short(dtype)}{', ids mapped' if mapped else ''}"
    return Case(name, moved, fused, peers)


def look_up_backward(device: str, dtype: torch.dtype) -> Case:
    ids = torch.randint(0, TABLE, (SEQUENCES, LENGTH), device=device)
    grad = torch.randn(SEQUENCES, LENGTH, HIDDEN, device=device).to(dtype)

    touched = ids.unique().numel()
    ours, theirs = ([torch.empty(size, HIDDEN, device=device) for size in (touched, LENGTH)] for _ in range(2))
    scratch, full = torch.empty_like(grad, dtype=torch.float32), torch.empty(TABLE, HIDDEN, device=device)

    def fused():
        _, starts, order = remap.grouped(ids, TABLE, 0)
        torch.ops.megatron_dept.remap_backward(grad, starts, order, *ours)
        return tuple(ours)

    def wide() -> Tensor:
        return grad if dtype == torch.float32 else scratch.copy_(grad)

    def compact():
        place = ids.reshape(-1).unique(return_inverse=True)[1]
        theirs[0].zero_().index_add_(0, place, wide().view(-1, HIDDEN))
        return theirs[0], torch.sum(wide(), 0, out=theirs[1])

    def by_sequence():
        place = ids.reshape(-1).unique(return_inverse=True)[1].view(ids.shape)
        rows_, position = theirs[0].zero_(), theirs[1].zero_()
        for which, each in zip(place, grad, strict=True):
            each = each if dtype == torch.float32 else scratch[0].copy_(each)
            rows_.index_add_(0, which, each), position.add_(each)
        return rows_, position

    def dense():
        full.zero_().index_add_(0, ids.reshape(-1), wide().view(-1, HIDDEN))
        return full, torch.sum(wide(), 0, out=theirs[1])

    moved = grad.numel() * grad.element_size() + (touched + LENGTH) * HIDDEN * 4
    peers = {"unique, index_add_, sum": compact, "the same by sequence": by_sequence, "dense index_add_, sum": dense}
    return Case(f"remap_lookup_backward of {short(dtype)}", moved, fused, peers)
