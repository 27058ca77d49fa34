"""What a body's elements travel as, and in how many bytes: arithmetic alone, so plans need no torch.

`ops.body` says what the bytes mean.
"""

from typing import Literal, get_args

Wire = Literal["fp32", "bf16", "int8"]
WIRES: tuple[str, ...] = get_args(Wire)
BLOCK = 256
"""Elements of an int8 wire that share one scale."""


def wire_bytes(n: int, wire: Wire) -> int:
    """Bytes of `n` elements on the wire."""
    if wire not in WIRES:
        raise ValueError(f"wire is {wire!r}; want {' or '.join(WIRES)}")
    if wire == "int8":
        return n + -n % 4 + 4 * -(-n // BLOCK)
    return n * (4 if wire == "fp32" else 2)
