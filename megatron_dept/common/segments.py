"""Names for the pieces of a flat partition: what makes state independent of the layout that held it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of the flattened parameter `name` stand at `offset` of a flat partition."""

    name: str
    start: int
    stop: int
    offset: int

    @property
    def place(self) -> slice:
        """Where the segment lies in the partition."""
        return slice(self.offset, self.offset + self.stop - self.start)

    def within(self, part: slice) -> "Segment | None":
        """The piece of this segment inside partition range `part`, its offset counted from there; None if none."""
        low, high = max(self.offset, part.start), min(self.place.stop, part.stop)
        if low >= high:
            return None
        return Segment(self.name, self.start + low - self.offset, self.start + high - self.offset, low - part.start)
