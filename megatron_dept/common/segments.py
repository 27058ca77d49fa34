"""Names for the pieces of a flat partition: what makes state independent of the layout that held it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of the flattened parameter `name` stand at `offset` of a flat partition.

    `primary`: of the ranks of a silo that hold copies of them, this one counts and saves them.
    """

    name: str
    start: int
    stop: int
    offset: int
    primary: bool = True

    @property
    def place(self) -> slice:
        """Where the segment lies in the partition."""
        return slice(self.offset, self.offset + self.stop - self.start)

    def within(self, part: slice) -> "Segment | None":
        """The piece of this segment inside partition range `part`, its offset counted from there; None if none."""
        low, high = max(self.offset, part.start), min(self.place.stop, part.stop)
        if low >= high:
            return None
        start = self.start - self.offset
        return Segment(self.name, start + low, start + high, low - part.start, self.primary)


def joined_places(places: Iterable[slice]) -> list[slice]:
    """Places in ascending order, adjacent ones as one."""
    joined: list[slice] = []
    for place in sorted(places, key=lambda place: place.start):
        if joined and joined[-1].stop == place.start:
            joined[-1] = slice(joined[-1].start, place.stop)
        else:
            joined.append(place)
    return joined


def primary_square(flat: Tensor, segments: Iterable[Segment]) -> float:
    """Sum of squares of what this rank counts of a flat partition [n], in double precision."""
    parts = [flat[place] for place in joined_places(segment.place for segment in segments if segment.primary)]
    if not parts:
        return 0.0
    return float(torch.stack(torch._foreach_norm(parts)).double().square().sum())
