"""A small body cut over the ranks of a silo in every way that silos differ: whole, flat halves, tensor shards, stages.

Shapes: `N` elements of the body, `n` of a rank's partition.
"""

import math
from dataclasses import dataclass

import numpy as np

from megatron_dept.common.segments import Segment

SHAPES: dict[str, tuple[int, ...]] = {"a": (4, 3), "norm": (5,), "kv": (2, 7), "scalar": (1,), "w": (11, 3)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
ELEMENTS = sum(SIZES.values())
PADDING = 9.0
"""What stands where a partition holds no element of the body; nothing may change it."""

Piece = tuple[str, int, int] | tuple[str, int, int, bool]
"""(name, start, stop) and False where it is a copy."""


@dataclass(frozen=True)
class Part:
    """What a rank holds: segments of a partition of n elements."""

    segments: list[Segment]
    size: int

    def take(self, whole: np.ndarray) -> np.ndarray:
        """This rank's partition of a whole body [N] in the order of `SHAPES`, fp32 [n]."""
        flat = np.full(self.size, PADDING, np.float32)
        for segment in self.segments:
            flat[segment.place] = whole[canonical(segment)]
        return flat


def canonical(segment: Segment) -> slice:
    """Where a segment lies in the whole body."""
    first = 0
    for name, size in SIZES.items():
        if name == segment.name:
            return slice(first + segment.start, first + segment.stop)
        first += size
    raise AssertionError(segment.name)


def laid(pieces: list[Piece], padding: int = 0, gap: int = 0) -> Part:
    """Pieces laid end to end in a partition, `gap` elements of padding between them and `padding` at its end."""
    segments, offset = [], 0
    for name, start, stop, *copy in pieces:
        segments.append(Segment(name, start, stop, offset, primary=not copy))
        offset += stop - start + gap
    return Part(segments, offset + padding)


WHOLE = [laid([(name, 0, size) for name, size in SIZES.items()])]
BACKWARD = [laid([(name, 0, size) for name, size in reversed(SIZES.items())], padding=3)]
HALVES = [
    laid([("a", 0, 12), ("norm", 0, 5), ("kv", 0, 14), ("scalar", 0, 1), ("w", 0, 2)]),
    laid([("w", 2, 33)], padding=3),
]
TENSOR = [
    laid([("w", 0, 12), ("scalar", 0, 1, False), ("kv", 0, 7), ("norm", 0, 5), ("a", 0, 3)], gap=1),
    laid([("a", 3, 6), ("norm", 0, 5, False), ("kv", 0, 7, False), ("scalar", 0, 1), ("w", 12, 24)]),
    laid([("a", 6, 12), ("norm", 0, 5, False), ("kv", 7, 14), ("w", 24, 33)], padding=2),
]
"""By rows; the norm on all, the first row of kv on two, the scalar's primary copy on the second."""
STAGES = [laid([("w", 0, 33), ("scalar", 0, 1)]), laid([("a", 0, 12), ("norm", 0, 5), ("kv", 0, 14)])]
"""The first rank holds what stands last."""
IDLE = [laid([], padding=2), *BACKWARD]
"""A rank that holds nothing of the body."""

FEDERATIONS: dict[str, list[list[Part]]] = {
    "alone": [BACKWARD],
    "halves + whole": [HALVES, WHOLE],
    "whole + tensor": [WHOLE, TENSOR],
    "halves + halves": [HALVES, HALVES],
    "whole + backward + stages": [WHOLE, BACKWARD, STAGES],
    "idle + stages": [IDLE, STAGES],
}
