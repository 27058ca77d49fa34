"""One thing to measure: an operation of ours, and every torch composition known for it.

A variant is a function without arguments that returns the tensors it has written, so that all variants of a case can be
held against each other; each has state of its own. All write into buffers made beforehand: new memory of this size
costs more than the operations. Compositions are given what serves them: `out=`, pieces that stay in a cache, inductor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Variant = Callable[[], tuple[Tensor, ...]]

LEARNING_RATE, MU = 0.7, 0.9
PIECE = 1 << 16
"""Elements that a composition takes through the cache in turn."""


@dataclass(frozen=True)
class Case:
    """One operation in one form: `bytes` that must at least be read and written; ours, and the peers by name."""

    name: str
    bytes: int
    fused: Variant
    peers: dict[str, Variant]


def into(outs: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results, written where they belong: inductor makes one pass of computing and writing them."""
    for out, result in zip(outs, results, strict=True):
        out.copy_(result)
    return tuple(outs)


def by_inductor(function: Callable[..., tuple[Tensor, ...]], *arguments: object) -> Variant:
    """`function(*arguments)`, compiled for these very shapes."""
    ready = torch.compile(function, dynamic=False)
    return lambda: ready(*arguments)


def short(dtype: torch.dtype) -> str:
    """A dtype's name in a table."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
