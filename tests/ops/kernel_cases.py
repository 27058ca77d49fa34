"""Calls of the kernels' faces on random shapes, ids, dtypes and alignments, with what the reference makes of them.

Used where a kernel is run on something else than the CPU: the CUDA source under the thread shim, and a GPU. Letters are
those of megatron_dept/ops/reference.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dept.ops import reference
from megatron_dept.ops.rows import order_by_row
from megatron_dept.ops.wires import WIRES, wire_bytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = [(1, 0), (3, 1), (8, 4), (20, 0), (96, 0), (256, 0), (264, 1), (1030, 4)]
"""(hidden, offset): rows shorter and longer than a warp's accesses, with tails; divisible by a vector's length and not.
All arrays start `offset` elements past an aligned address: whole vectors, single elements, short vectors only."""
LENGTHS = [(0, 0), (1, 1), (255, 4), (256, 0), (257, 0), (1000, 1), (20_001, 0)]
"""(elements of a body, offset): tails of the int8 wire's blocks, and so many that every kernel's grid has to stride."""
SPECIAL = torch.tensor([0, -0.0, 1e-45, -1e-40, 3e-8, 2.9802323e-8, 6.1e-5, 65504, 65519.9, -65520, 3.4e38])
"""What casts and sums of little go wrong at: zeros, numbers below the smallest normal one, ends of fp16 and fp32."""
ROWS = [(*width, None) for width in WIDTHS] + [(264, 0, array) for array in range(4)]
BODIES = [(*length, None) for length in LENGTHS] + [(1000, 0, array) for array in range(5)]
"""With the one array, counted as drawn, that starts an element further on than the others."""


@dataclass(frozen=True)
class Case:
    """One call: `face(**arguments)`, tensors among them; those in `written` are changed in place."""

    name: str
    face: str
    arguments: dict[str, Any]
    written: tuple[str, ...] = ()

    def expected(self) -> tuple[dict[str, Any], Any]:
        """(arguments after the reference's call, what it returns); the case's own tensors stay as they are."""
        arguments = {key: placed(value, value.storage_offset()) if isinstance(value, Tensor) else value
                     for key, value in self.arguments.items()}  # fmt: skip
        function: Callable[..., Any] = getattr(reference, self.face)
        return arguments, function(**arguments)


def placed(tensor: Tensor, offset: int, device: str = "cpu") -> Tensor:
    """A copy that starts `offset` elements past an aligned address."""
    storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
    copy = storage[offset:].view(tensor.shape)
    copy.copy_(tensor)
    return copy


def equal_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether all bits are equal; any NaN equals any other."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not found.dtype.is_floating_point:
        return torch.equal(found, expected)
    bits = torch.int32 if found.element_size() == 4 else torch.int16
    same = found.view(bits) == expected.view(bits)
    return bool((same | (found.isnan() & expected.isnan())).all())


class Draw:
    """Random tensors, all `offset` elements past an aligned address, array number `odd` one more.

    Among normal numbers are SPECIAL ones of magnitudes up to `largest`: a huge one leaves nothing of an int8 block.
    """

    def __init__(self, seed: int, offset: int, odd: int | None, largest: float = torch.inf) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.special = SPECIAL[SPECIAL.abs() <= largest]
        self.offset, self.odd, self.drawn = offset, odd, 0

    def placed(self, tensor: Tensor, unit: int = 1) -> Tensor:
        """`tensor` as the next array; an element of its alignment is `unit` of its own."""
        offset = self.offset + (self.drawn == self.odd)
        self.drawn += 1
        return placed(tensor, unit * offset)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.placed(self.numbers(*shape).to(dtype))

    def numbers(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator)
        places = torch.rand(*shape, generator=self.generator) < 0.03
        drawn[places] = self.special[self.integers(0, len(self.special), int(places.sum()))]
        return drawn

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype)

    def garbage(self, *shape: int) -> Tensor:
        """Bytes to be written over, as the next array; wires ask for an alignment of 4 bytes."""
        return self.placed(torch.full(shape, 0xA5, dtype=torch.uint8), 4)

    def chosen(self, of: int, count: int) -> Tensor:
        """`count` of range(of), ascending."""
        return torch.randperm(of, generator=self.generator)[:count].sort().values


def trim_gather() -> Iterator[Case]:
    """Ids inside and outside the shard; no ids; an empty shard."""
    for number, (hidden, offset, odd) in enumerate(ROWS):
        for dtype in FLOATS:
            draw = Draw(number, offset, odd)
            rows, ids = (0, 3) if hidden == 3 else (50, 0) if hidden == 20 else (50, 37)
            arguments = {
                "table": draw.floats(rows, hidden),
                "ids": draw.chosen(70, ids),
                "first": 11,
                "dtype": dtype,
                "out": draw.placed(torch.full((ids, hidden), 7, dtype=dtype)),
            }
            yield Case(f"{hidden} wide, {dtype}, {offset}, {odd}", "trim_gather", arguments, ("out",))


def trim_scatter_mean() -> Iterator[Case]:
    """Rows held by one to eleven of the sources, rows held by none, counts that are not the number of holders."""
    for number, (hidden, offset, odd) in enumerate(ROWS):
        for dtype in FLOATS:
            draw = Draw(number, offset, odd)
            sources = 0 if hidden == 20 else 11
            lists = [draw.chosen(30, 3 + source) for source in range(sources)] or [torch.empty(0, dtype=torch.int64)]
            rows, starts, order = order_by_row(lists)
            momentum = hidden % 4 == 0
            arguments = {
                "table": draw.floats(40, hidden),
                "momentum": draw.floats(40, hidden) if momentum else None,
                "rows": rows,
                "starts": starts,
                "order": order,
                "deltas": draw.floats(len(order), hidden, dtype=dtype),
                "counts": starts.diff().int() + draw.integers(0, 3, len(rows), dtype=torch.int32),
                "learning_rate": 0.7,
                "mu": 0.9 if momentum else 0.0,
            }
            yield Case(
                f"{hidden} wide, {dtype}, {offset}, {odd}", "trim_scatter_mean", arguments, ("table", "momentum")
            )


def remap_lookup() -> Iterator[Case]:
    """With and without a map, positions and a vocabulary shard's start."""
    for number, (hidden, offset, odd) in enumerate(ROWS):
        for dtype in FLOATS:
            draw = Draw(number, offset, odd)
            mapped, positions, shape = number % 2 == 0, number % 4 < 2, (0, 5) if hidden == 20 else (5, 13)
            arguments = {
                "ids": draw.integers(0, 90 if mapped else 60, *shape),
                "local_of": draw.integers(-1, 60, 90, dtype=torch.int32) if mapped else None,
                "table": draw.floats(31, hidden),
                "position": draw.floats(16, hidden) if positions else None,
                "dtype": dtype,
                "start": 17,
            }
            yield Case(f"{hidden} wide, {dtype}, {offset}, {odd}", "remap_lookup", arguments)


def remap_lookup_backward() -> Iterator[Case]:
    """Few rows that occur often, so that sums are long, among rows outside the shard."""
    for number, (hidden, offset, odd) in enumerate(ROWS):
        for dtype in FLOATS:
            draw = Draw(number, offset, odd)
            shape = (0, 5) if hidden == 20 else (5, 13)
            arguments = {
                "ids": draw.integers(0, 90, *shape),
                "local_of": draw.integers(0, 7, 90, dtype=torch.int32),
                "grad": draw.floats(*shape, hidden, dtype=dtype),
                "rows": 5,
                "start": 1,
                "positions": 16 if number % 2 else 0,
            }
            yield Case(f"{hidden} wide, {dtype}, {offset}, {odd}", "remap_lookup_backward", arguments)


def body_pack() -> Iterator[Case]:
    """What is given and what is not, by turns; a block of zeros, and one too small for its inverse scale."""
    for wire in WIRES:
        for number, (n, offset, odd) in enumerate(BODIES):
            for given in range(4):
                draw = Draw(number, offset, odd, 1 if wire == "int8" else torch.inf)
                value, local, carried, residual = (draw.floats(n) for _ in range(4))
                if n == 1000:
                    for array in (value, local, carried, residual):
                        array[256:512] = 0
                        array[512:768] *= 1e-38
                arguments = {
                    "value": value,
                    "local": local if given & 1 else None,
                    "carried": carried if given & 2 else None,
                    "residual": residual if wire == "int8" and given != 1 else None,
                    "wire": wire,
                    "out": draw.garbage(wire_bytes(n, wire)),
                }
                yield Case(
                    f"{wire}, {n} elements, {offset}, {odd}, {given}", "body_pack", arguments, ("out", "residual")
                )


def received(draw: Draw, silos: int, n: int, wire: str) -> Tensor:
    """What `silos` silos packed, one row each."""
    rows = draw.garbage(silos, wire_bytes(n, wire))
    for row in rows:
        # A row of its own: the reference views bytes as numbers, which a row in the middle may be too crooked for.
        packed = torch.empty(wire_bytes(n, wire), dtype=torch.uint8)
        reference.body_pack(draw.numbers(n), None, None, None, wire, packed)
        row.copy_(packed)
    return rows


def body_mean() -> Iterator[Case]:
    """One to five silos, of whose sources not all were sampled."""
    for wire in WIRES:
        for number, (n, offset, odd) in enumerate(BODIES):
            draw = Draw(number, offset, odd, 1 if wire == "int8" else torch.inf)
            silos = 1 + number % 5
            arguments = {
                "received": received(draw, silos, n, wire),
                "sources": 3,
                "wire": wire,
                "out": draw.floats(n),
            }
            yield Case(f"{wire}, {n} elements, {offset}, {odd}, {silos} silos", "body_mean", arguments, ("out",))


def body_unpack() -> Iterator[Case]:
    """FedAvg and Nesterov, one to five silos, error feedback or none."""
    for wire in WIRES:
        for number, (n, offset, odd) in enumerate(BODIES):
            for momentum in (False, True):
                draw = Draw(number, offset, odd, 1 if wire == "int8" else torch.inf)
                silos = 1 + (number + 2 * momentum) % 5
                arguments = {
                    "received": received(draw, silos, n, wire),
                    "sources": silos + 1,
                    "value": draw.floats(n),
                    "momentum": draw.floats(n) if momentum else None,
                    "learning_rate": 0.7,
                    "mu": 0.9 if momentum else 0.0,
                    "wire": wire,
                    "back": draw.garbage(wire_bytes(n, wire)),
                    "back_residual": draw.floats(n) if wire == "int8" and number % 2 else None,
                }
                changed = ("momentum", "back", "back_residual")
                yield Case(f"{wire}, {n} elements, {offset}, {odd}, {silos} silos", "body_unpack", arguments, changed)


def body_apply() -> Iterator[Case]:
    """Masters and low-precision copies, present and absent."""
    for wire in WIRES:
        for number, (n, offset, odd) in enumerate(BODIES):
            draw = Draw(number, offset, odd, 1 if wire == "int8" else torch.inf)
            low = (None, torch.bfloat16, torch.float16)[number % 3]
            arguments = {
                "back": received(draw, 1, n, wire)[0],
                "value": draw.floats(n),
                "wire": wire,
                "master": draw.floats(n) if number % 2 else None,
                "low": None if low is None else draw.floats(n, dtype=low),
            }
            yield Case(
                f"{wire}, {n} elements, {offset}, {odd}, low {low}", "body_apply", arguments, ("value", "master", "low")
            )


KERNELS: dict[str, Callable[[], Iterator[Case]]] = {
    maker.__name__: maker
    for maker in (
        trim_gather,
        trim_scatter_mean,
        remap_lookup,
        remap_lookup_backward,
        body_pack,
        body_mean,
        body_unpack,
        body_apply,
    )
}
