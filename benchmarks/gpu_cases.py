"""The kernels as benchmark cases: inputs, the kernel, what torch would do instead, and the bytes that must move.

Shapes: `n` rows of a table or elements of a body's partition, `h` hidden, `k` ids, `S` silos, `b` batch, `s` sequence.

Bytes: every input read once, every output written once, as the kernels' contract counts them; of a table only the rows
that are touched. A case's peers compute the same, or what is named; where a peer moves other bytes it says so itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dept.ops.body import body_apply, body_mean, body_pack, body_unpack
from megatron_dept.ops.remap import grouped, remap_lookup, remap_lookup_backward
from megatron_dept.ops.rows import order_by_row, trim_gather, trim_scatter_mean
from megatron_dept.ops.wires import BLOCK, Wire, wire_bytes

RATE, MU = 0.7, 0.9
GOALS = ("trim_gather", "trim_scatter_mean", "body_pack", "body_unpack")
"""The kernels whose bandwidth has a goal."""


@dataclass(frozen=True)
class Sizes:
    """`rows` x `hidden` of a table, `ids` of it asked for; `elements` of a partition; a batch `batch` x `sequence`."""

    rows: int
    hidden: int
    ids: int
    elements: int
    batch: int
    sequence: int
    silos: int = 4


LARGE = Sizes(rows=1_000_000, hidden=768, ids=500_000, elements=1 << 28, batch=64, sequence=2048)
"""A launch moves a gigabyte or more: its overhead is far below a hundredth."""
TINY = Sizes(rows=300, hidden=24, ids=170, elements=1000, batch=2, sequence=16, silos=3)
ODD = Sizes(rows=1037, hidden=67, ids=411, elements=70_001, batch=3, sequence=19, silos=3)
"""For the memory checker: nothing divides anything."""


@dataclass(frozen=True)
class Case:
    """One kernel on one kind of input. `run(inputs)` is the kernel's face; it writes into buffers of the inputs.

    `eager`: the same in plain torch operations, which torch.compile is given too. `peers`: by name, called like `run`.
    """

    name: str
    make: Callable[[Sizes, torch.device, int], dict[str, Any]]
    run: Callable[[dict[str, Any]], object]
    eager: Callable[[dict[str, Any]], object]
    moved: Callable[[dict[str, Any]], int]
    peers: dict[str, Callable[[dict[str, Any]], object]] = field(default_factory=dict)


def cases() -> list[Case]:
    """Those with a goal first."""
    low = torch.bfloat16
    found = [_gather(low), _gather(torch.float32), _scatter(low, True), _scatter(torch.float32, True)]
    found += [_pack(wire) for wire in ("fp32", "bf16", "int8")]
    found += [_unpack(wire) for wire in ("fp32", "bf16", "int8")]
    found += [_scatter(low, False), _lookup(low), _lookup_backward(low)]
    found += [_mean(wire) for wire in ("bf16", "int8")] + [_apply(wire) for wire in ("fp32", "bf16", "int8")]
    return found


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _randn(shape: tuple[int, ...], device: torch.device, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, generator=_generator(device, seed)).mul_(scale)


def _ids(rows: int, count: int, device: torch.device, seed: int) -> Tensor:
    """Distinct ids, ascending."""
    return torch.randperm(rows, device=device, generator=_generator(device, seed))[:count].sort().values


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer to write into; what is left unwritten is found."""
    return torch.full(shape, 170 if dtype == torch.uint8 else -1e30, dtype=dtype, device=device)


def _label(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _gather(dtype: torch.dtype) -> Case:
    def make(size: Sizes, device: torch.device, seed: int) -> dict[str, Any]:
        return {
            "table": _randn((size.rows, size.hidden), device, seed),
            "ids": _ids(size.rows, size.ids, device, seed),
            "out": _poisoned((size.ids, size.hidden), dtype, device),
        }

    def index_select(x: dict[str, Any]) -> Tensor:
        return torch.index_select(x["table"], 0, x["ids"]).to(dtype)

    def fbgemm(x: dict[str, Any]) -> Tensor:
        rows: Tensor = torch.ops.fbgemm.index_select_dim0(x["table"], x["ids"])
        return rows.to(dtype)

    return Case(
        f"trim_gather to {_label(dtype)}",
        make,
        lambda x: trim_gather(x["table"], x["ids"], 0, dtype, x["out"]),
        index_select,
        lambda x: size_of(x["ids"], x["out"]) + x["out"].numel() * 4,
        {"aten index_select": index_select, "FBGEMM index_select_dim0": fbgemm},
    )


def _scatter(dtype: torch.dtype, nesterov: bool) -> Case:
    def make(size: Sizes, device: torch.device, seed: int) -> dict[str, Any]:
        lists = [_ids(size.rows, size.ids // 2, device, seed + source) for source in range(2)]
        rows, starts, order = order_by_row(lists)
        slots = torch.empty_like(order)
        slots[order] = torch.repeat_interleave(torch.arange(len(rows), device=device), starts.diff())
        return {
            "table": _randn((size.rows, size.hidden), device, seed),
            "momentum": torch.zeros(size.rows, size.hidden, device=device) if nesterov else None,
            "rows": rows,
            "starts": starts,
            "order": order,
            "deltas": _randn((len(order), size.hidden), device, seed, 1e-3).to(dtype),
            "counts": starts.diff().to(torch.int32),
            "slots": slots,
        }

    def run(x: dict[str, Any]) -> None:
        names = ("table", "momentum", "rows", "starts", "order", "deltas", "counts")
        trim_scatter_mean(*(x[name] for name in names), RATE, MU if nesterov else 0.0)

    def eager(x: dict[str, Any]) -> None:
        rows, table = x["rows"], x["table"]
        mean = torch.zeros(len(rows), table.shape[1], device=table.device)
        mean.index_add_(0, x["slots"], x["deltas"].float()).div_(x["counts"].unsqueeze(1))
        if nesterov:
            momentum = x["momentum"][rows].mul_(MU).add_(mean)
            x["momentum"].index_copy_(0, rows, momentum)
            mean = mean.add_(momentum, alpha=MU)
        table.index_copy_(0, rows, table[rows].sub_(mean, alpha=RATE))

    def index_add(x: dict[str, Any]) -> None:
        # A part of the work alone: the sum, without counts, momentum and step.
        x["table"].index_add_(0, x["rows"], x["deltas"][: len(x["rows"])].float())

    def moved(x: dict[str, Any]) -> int:
        touched = len(x["rows"]) * x["table"].shape[1] * 4
        lists = size_of(x["rows"], x["starts"], x["order"], x["counts"])
        return lists + size_of(x["deltas"]) + 2 * touched * (2 if nesterov else 1)

    rule = "Nesterov" if nesterov else "FedAvg"
    peers = {"aten index_add_ (the sum alone)": index_add}
    return Case(f"trim_scatter_mean of {_label(dtype)}, {rule}", make, run, eager, moved, peers)


def _lookup_inputs(dtype: torch.dtype) -> Callable[[Sizes, torch.device, int], dict[str, Any]]:
    def make(size: Sizes, device: torch.device, seed: int) -> dict[str, Any]:
        local = size.rows // 4
        local_of = torch.randint(0, local, (size.rows,), device=device, generator=_generator(device, seed))
        shape = (size.batch, size.sequence)
        # Squared: some ids occur far more often than others, as in text.
        drawn = torch.rand(shape, device=device, generator=_generator(device, seed)).square_().mul_(size.rows)
        ids = drawn.long().clamp_(max=size.rows - 1)
        touched, starts, order = grouped(local_of[ids], local, 0)
        return {
            "ids": ids,
            "local_of": local_of.to(torch.int32),
            "table": _randn((local, size.hidden), device, seed),
            "position": _randn((size.sequence, size.hidden), device, seed + 1),
            "grad": _randn((*shape, size.hidden), device, seed + 2).to(dtype),
            "touched": len(touched),
            "starts": starts,
            "order": order,
        }

    return make


def _lookup(dtype: torch.dtype) -> Case:
    @torch.no_grad()
    def eager(x: dict[str, Any]) -> Tensor:
        rows = F.embedding(x["local_of"][x["ids"]], x["table"])
        return (rows + x["position"][: x["ids"].shape[1]]).to(dtype)

    @torch.no_grad()
    def run(x: dict[str, Any]) -> Tensor:
        return remap_lookup(x["ids"], x["local_of"], x["table"], x["position"], dtype)

    def alone(x: dict[str, Any]) -> None:
        out = torch.empty_like(x["grad"])
        torch.ops.megatron_dept.remap_lookup(x["ids"], x["local_of"], x["table"], x["position"], 0, out)

    def moved(x: dict[str, Any]) -> int:
        lists = size_of(x["ids"]) + x["ids"].numel() * 4
        return lists + x["touched"] * x["table"].shape[1] * 4 + size_of(x["position"], x["grad"])

    # The face looks whether every id is known, which the host waits for.
    peers = {"kernel without its face": alone}
    return Case(f"remap_lookup to {_label(dtype)}", _lookup_inputs(dtype), run, eager, moved, peers)


def _lookup_backward(dtype: torch.dtype) -> Case:
    def run(x: dict[str, Any]) -> object:
        table, position = x["table"], x["position"]
        return remap_lookup_backward(x["ids"], x["local_of"], x["grad"], len(table), 0, len(position))

    def eager(x: dict[str, Any]) -> object:
        # The whole table's gradient, as torch's own embedding makes it: more bytes than the touched rows.
        local = x["local_of"][x["ids"]].long()
        dense = torch.ops.aten.embedding_dense_backward(x["grad"].float(), local, len(x["table"]), -1, False)
        return dense, x["grad"].float().sum(0)

    def alone(x: dict[str, Any]) -> None:
        grad, position = x["grad"], torch.empty_like(x["position"])
        rows = torch.empty(x["touched"], grad.shape[2], device=grad.device)
        torch.ops.megatron_dept.remap_backward(grad, x["starts"], x["order"], rows, position)

    def moved(x: dict[str, Any]) -> int:
        lists = size_of(x["ids"]) + x["ids"].numel() * 4 + x["touched"] * 8
        return lists + size_of(x["grad"], x["position"]) + x["touched"] * x["table"].shape[1] * 4

    # The face sorts the occurrences first, and how many rows they are the host must know.
    peers = {"kernel without its face": alone}
    return Case(f"remap_lookup_backward of {_label(dtype)}", _lookup_inputs(dtype), run, eager, moved, peers)


def _body_inputs(wire: Wire) -> Callable[[Sizes, torch.device, int], dict[str, Any]]:
    def make(size: Sizes, device: torch.device, seed: int) -> dict[str, Any]:
        n, silos = size.elements, size.silos
        value = _randn((n,), device, seed)
        local = value - _randn((n,), device, seed + 1, 1e-3)
        bytes_of_one = wire_bytes(n, wire)
        received = torch.empty(silos, bytes_of_one, dtype=torch.uint8, device=device)
        for row in received:
            body_pack(value, local, None, None, wire, row)
        return {
            "value": value,
            "local": local,
            "residual": torch.zeros(n, device=device) if wire == "int8" else None,
            "out": _poisoned((bytes_of_one,), torch.uint8, device),
            "received": received,
            "momentum": torch.zeros(n, device=device),
            "low": _poisoned((n,), torch.bfloat16, device),
            "master": _poisoned((n,), torch.float32, device),
            # What plain torch would keep: numbers of the wire's type, a silo a row.
            "numbers": [decoded(row, wire, n) for row in received] if wire != "int8" else None,
        }

    return make


def decoded(packed: Tensor, wire: Wire, n: int) -> Tensor:
    """Bytes of a wire as numbers: a view for fp32 and bf16, fp32 [n] for int8."""
    if wire != "int8":
        return packed.view(torch.float32 if wire == "fp32" else torch.bfloat16)
    scale = packed[n + -n % 4 :].view(torch.float32)
    return packed[:n].view(torch.int8).float() * scale.repeat_interleave(BLOCK)[:n]


def encoded(delta: Tensor, wire: Wire, out: Tensor) -> None:
    """Numbers fp32 [n] into the bytes of a wire, in plain torch operations; without error feedback."""
    n = delta.numel()
    if wire != "int8":
        decoded(out, wire, n).copy_(delta)
        return
    blocks = F.pad(delta, (0, -n % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    codes = (blocks * (127 / largest)).round_().clamp_(-127, 127).to(torch.int8)
    out[:n].view(torch.int8).copy_(codes.view(-1)[:n])
    out[n + -n % 4 :].view(torch.float32).copy_((largest / 127).view(-1))


def _pack(wire: Wire) -> Case:
    def run(x: dict[str, Any]) -> None:
        body_pack(x["value"], x["local"], None, x["residual"], wire, x["out"])

    def eager(x: dict[str, Any]) -> None:
        encoded(x["value"] - x["local"], wire, x["out"])

    def foreach(x: dict[str, Any]) -> None:
        pieces = 1 << 22
        deltas = torch._foreach_sub(list(x["value"].split(pieces)), list(x["local"].split(pieces)))
        torch._foreach_copy_(list(decoded(x["out"], wire, len(x["value"])).split(pieces)), list(deltas))

    peers = {} if wire == "int8" else {"torch foreach": foreach}
    return Case(
        f"body_pack {wire}",
        _body_inputs(wire),
        run,
        eager,
        lambda x: size_of(x["value"], x["local"], x["residual"], x["residual"], x["out"]),
        peers,
    )


def _unpack(wire: Wire) -> Case:
    def run(x: dict[str, Any]) -> None:
        silos = len(x["received"])
        body_unpack(
            x["received"], silos, x["value"], x["momentum"], RATE, MU, wire, x["out"], x["residual"]
        )  # fmt: skip

    def eager(x: dict[str, Any]) -> None:
        value, silos = x["value"], len(x["received"])
        mean = sum(decoded(row, wire, len(value)).float() for row in x["received"]) / silos
        momentum = x["momentum"].mul_(MU).add_(mean)
        step = (mean + MU * momentum) * RATE
        encoded(value - step if wire == "fp32" else step, wire, x["out"])

    def foreach(x: dict[str, Any]) -> None:
        pieces = 1 << 22
        sums = list(x["master"].split(pieces))
        torch._foreach_zero_(sums)
        for numbers in x["numbers"]:
            torch._foreach_add_(sums, list(numbers.float().split(pieces)))
        torch._foreach_div_(sums, len(x["numbers"]))
        momentum = list(x["momentum"].split(pieces))
        torch._foreach_mul_(momentum, MU)
        torch._foreach_add_(momentum, sums)
        torch._foreach_add_(sums, momentum, alpha=MU)
        torch._foreach_mul_(sums, -RATE)
        torch._foreach_add_(sums, list(x["value"].split(pieces)))
        torch._foreach_copy_(list(decoded(x["out"], wire, len(x["value"])).split(pieces)), sums)

    peers = {} if wire == "int8" else {"torch foreach": foreach}
    return Case(
        f"body_unpack {wire}",
        _body_inputs(wire),
        run,
        eager,
        lambda x: size_of(
            x["received"], x["value"], x["momentum"], x["momentum"], x["out"], x["residual"], x["residual"]
        ),
        peers,
    )


def _mean(wire: Wire) -> Case:
    def eager(x: dict[str, Any]) -> None:
        silos = len(x["received"])
        x["master"].copy_(sum(decoded(row, wire, len(x["value"])).float() for row in x["received"]) / silos)

    return Case(
        f"body_mean {wire}",
        _body_inputs(wire),
        lambda x: body_mean(x["received"], len(x["received"]), wire, x["master"]),
        eager,
        lambda x: size_of(x["received"], x["master"]),
    )


def _apply(wire: Wire) -> Case:
    def eager(x: dict[str, Any]) -> None:
        sent = decoded(x["received"][0], wire, len(x["value"]))
        x["value"].copy_(sent if wire == "fp32" else x["value"] - sent)
        x["master"].copy_(x["value"])
        x["low"].copy_(x["value"])

    def moved(x: dict[str, Any]) -> int:
        read = 0 if wire == "fp32" else size_of(x["value"])
        return size_of(x["received"][0], x["value"], x["master"], x["low"]) + read

    return Case(
        f"body_apply {wire}",
        _body_inputs(wire),
        lambda x: body_apply(x["received"][0], x["value"], wire, x["master"], x["low"]),
        eager,
        moved,
    )
