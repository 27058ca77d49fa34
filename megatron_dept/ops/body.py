"""The outer exchange of the body, fused: packed for the wire, averaged and stepped by its owner, applied everywhere.

Shapes: `n` elements of a partition or bucket, `S` silos. What travels are bytes, uint8 [wire_bytes(n, wire)]:

- fp32: the n elements;
- bf16: the n elements, rounded to nearest even;
- int8: n signed bytes, zeros up to a multiple of 4, then one fp32 scale for each block of 256 elements. A block's scale
  is its largest magnitude / 127, an element round(x * (127 / largest)). Error feedback: what rounding took away is kept
  in a `residual` and added the next time. A block with an element that is not finite arrives as NaN.
"""

import torch
from torch import Tensor

from megatron_dept.ops import reference
from megatron_dept.ops.arguments import LOW_PRECISION, expect
from megatron_dept.ops.native import native_kernels
from megatron_dept.ops.wires import WIRES, Wire, wire_bytes


def body_pack(
    value: Tensor,
    local: Tensor | None,
    carried: Tensor | None,
    residual: Tensor | None,
    wire: Wire,
    out: Tensor,
) -> None:
    """The delta carried + (value - local) into the bytes `out`; all fp32 [n], None where there is none.

    Without `local` the delta is `value` itself. int8 adds `residual` and leaves in it, in place, what the wire could
    not say; other wires take none.

    Raises ValueError, naming the argument, for a wrong dtype, shape, device or alignment.
    """
    size = wire_bytes(value.numel(), wire)
    _expect_elements(value, local=local, carried=carried, residual=residual)
    _expect_residual("residual", residual, wire)
    _expect_bytes("out", out, (size,), wire, value.device)
    if native_kernels(value.device.type):
        torch.ops.megatron_dept.body_pack(value, local, carried, residual, WIRES.index(wire), out)
    else:
        reference.body_pack(value, local, carried, residual, wire, out)


def body_mean(received: Tensor, sources: int, wire: Wire, out: Tensor) -> None:
    """out (fp32 [n]) = the sum of what S silos sent (uint8 [S, wire_bytes]) / sources: fp32, in silo order."""
    _expect_elements(out, "out")
    _expect_received(received, sources, out, wire)
    if native_kernels(out.device.type):
        torch.ops.megatron_dept.body_mean(received, sources, WIRES.index(wire), out)
    else:
        reference.body_mean(received, sources, wire, out)


def body_unpack(
    received: Tensor,
    sources: int,
    value: Tensor,
    momentum: Tensor | None,
    learning_rate: float,
    mu: float,
    wire: Wire,
    back: Tensor,
    back_residual: Tensor | None,
) -> None:
    """The owner's part in one pass: mean of what was received, outer step, and the bytes that go `back` to everyone.

    As `body_mean`; then `momentum` in place and the new value as in `dept.outer` (Nesterov; FedAvg where momentum is
    None). Back goes on fp32 the new value, else value - new packed as by `body_pack` with `back_residual`. `value`
    itself is not written: `body_apply` does that, the same way on every rank, so that all keep the same bits.
    """
    _expect_elements(value, momentum=momentum, back_residual=back_residual)
    _expect_residual("back_residual", back_residual, wire)
    _expect_received(received, sources, value, wire)
    _expect_bytes("back", back, (wire_bytes(value.numel(), wire),), wire, value.device)
    if native_kernels(value.device.type):
        torch.ops.megatron_dept.body_unpack(
            received, sources, value, momentum, learning_rate, mu, WIRES.index(wire), back, back_residual
        )
    else:
        reference.body_unpack(received, sources, value, momentum, learning_rate, mu, wire, back, back_residual)


def body_apply(
    back: Tensor, value: Tensor, wire: Wire, master: Tensor | None = None, low: Tensor | None = None
) -> None:
    """value (fp32 [n]) becomes what `back` says; then master = value, low = value cast (bf16, fp16), in one pass.

    fp32 on a CPU are torch's own copies, which no kernel of ours is ahead of (`benchmarks/kernels.py`).
    """
    _expect_elements(value, master=master)
    if low is not None:
        expect("low", low, LOW_PRECISION, value.shape, value.device)
    _expect_bytes("back", back, (wire_bytes(value.numel(), wire),), wire, value.device)
    copies = wire == "fp32" and value.device.type == "cpu"
    if not copies and native_kernels(value.device.type):
        torch.ops.megatron_dept.body_apply(back, value, WIRES.index(wire), master, low)
    else:
        reference.body_apply(back, value, wire, master, low)


def _expect_elements(value: Tensor, name: str = "value", **others: Tensor | None) -> None:
    expect(name, value, torch.float32, (None,), value.device)
    for other, tensor in others.items():
        if tensor is not None:
            expect(other, tensor, torch.float32, value.shape, value.device)


def _expect_residual(name: str, residual: Tensor | None, wire: Wire) -> None:
    if residual is not None and wire != "int8":
        raise ValueError(f"{name} belongs to the int8 wire; give None with {wire}")


def _expect_received(received: Tensor, sources: int, value: Tensor, wire: Wire) -> None:
    _expect_bytes("received", received, (None, wire_bytes(value.numel(), wire)), wire, value.device)
    if not len(received):
        raise ValueError("received holds no silo's bytes")
    if sources < 1:
        raise ValueError(f"sources is {sources}; want at least 1")


def _expect_bytes(name: str, packed: Tensor, shape: tuple[int | None, ...], wire: Wire, device: torch.device) -> None:
    expect(name, packed, torch.uint8, shape, device)
    unit = 2 if wire == "bf16" else 4
    # A traced tensor has no address.
    if not torch.compiler.is_compiling() and packed.data_ptr() % unit:
        raise ValueError(f"{name} starts at an address that {unit} does not divide")
