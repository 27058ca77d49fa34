"""Who holds, and who owns, which elements of the body when silos are cut differently. Pure arithmetic on intervals.

The body's *canonical order* is its parameters in the order of `shapes`, flattened and laid end to end: N elements. Rank
w of all W owns elements [w * c, (w + 1) * c), c = ceil(N / W). What a rank holds is a table of intervals, int64 [m, 4]:
(canonical start, elements, offset in the rank's partition, 1 where primary), ascending.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_dept.common.errors import FederationError
from megatron_dept.common.segments import Segment
from megatron_dept.common.sizes import FP32_BYTES
from megatron_dept.federation.ledger import Scope

START, COUNT, OFFSET, PRIMARY = range(4)


class CanonicalOrder:
    """Names and numbers of the body's elements. `shapes`: whole shapes by parameter, in canonical order."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._names = list(shapes)
        self._edges = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._index = {name: index for index, name in enumerate(self._names)}
        self.elements = int(self._edges[-1])

    def intervals(self, segments: Sequence[Segment]) -> np.ndarray:
        """The intervals that segments name, neighbours joined: int64 [m, 4].

        Raises `FederationError` naming a parameter that the body has not, or that has fewer elements.
        """
        rows = np.empty((len(segments), 4), np.int64)
        for row, segment in zip(rows, segments, strict=True):
            index = self._index.get(segment.name)
            size = -1 if index is None else int(self._edges[index + 1] - self._edges[index])
            if index is None or not 0 <= segment.start <= segment.stop <= size:
                raise FederationError(
                    f"elements {segment.start} to {segment.stop} of {segment.name!r} are not in the body"
                    + ("" if index is None else f", where it has {size}")
                )
            row[:] = (
                self._edges[index] + segment.start,
                segment.stop - segment.start,
                segment.offset,
                segment.primary,
            )
        return _joined(rows[rows[:, COUNT] > 0])

    def segments(self, part: range, primary: bool = True) -> list[Segment]:
        """Names for the canonical elements `part`, offsets counted from its start."""
        first = int(np.searchsorted(self._edges, part.start, side="right")) - 1
        pieces, at = [], part.start
        for index in range(first, len(self._names)):
            low, high = int(self._edges[index]), int(self._edges[index + 1])
            stop = min(high, part.stop)
            if at >= part.stop:
                break
            if stop > at:
                pieces.append(Segment(self._names[index], at - low, stop - low, at - part.start, primary))
                at = stop
        return pieces

    def name_at(self, element: int) -> str:
        """The parameter that canonical element `element` belongs to, with its place in it."""
        index = int(np.searchsorted(self._edges, element, side="right")) - 1
        return f"element {element - int(self._edges[index])} of {self._names[index]!r}"

    def share(self, rank: int, ranks: int) -> range:
        """The canonical elements that a rank owns; the last shares may be cut short or empty."""
        size = -(-self.elements // ranks)
        first = min(rank * size, self.elements)
        return range(first, min(first + size, self.elements))

    def check_cover(self, holdings: Sequence[np.ndarray], silo_of: Sequence[int]) -> None:
        """Every element must be primary on exactly one rank of each silo; `holdings` and `silo_of` by rank.

        Raises `FederationError` naming the first element that is not, and the silo.
        """
        for silo in sorted(set(silo_of)):
            tables = [table[table[:, PRIMARY] == 1] for table, of in zip(holdings, silo_of, strict=True) if of == silo]
            rows = np.concatenate(tables)
            rows = rows[np.argsort(rows[:, START], kind="stable")]
            starts = np.append(rows[:, START], self.elements)
            stops = np.concatenate([[0], rows[:, START] + rows[:, COUNT]])
            wrong = np.flatnonzero(starts != stops)
            if len(wrong):
                start, stop = int(starts[wrong[0]]), int(stops[wrong[0]])
                fault = "is held by none" if start > stop else "is held twice as the primary copy"
                raise FederationError(
                    f"{self.name_at(min(start, stop))} {fault} of silo {silo}'s ranks; every silo needs the whole body "
                    "once: compare model, tensor and pipeline sizes of the silos"
                )


def within(table: np.ndarray, part: range) -> np.ndarray:
    """The pieces of the intervals that lie in canonical elements `part`, their offsets moved along."""
    low = np.maximum(table[:, START], part.start)
    high = np.minimum(table[:, START] + table[:, COUNT], part.stop)
    kept = low < high
    cut = table[kept].copy()
    cut[:, OFFSET] += low[kept] - cut[:, START]
    cut[:, START], cut[:, COUNT] = low[kept], (high - low)[kept]
    return cut


def primary(table: np.ndarray) -> np.ndarray:
    """The intervals that are primary."""
    return table[table[:, PRIMARY] == 1]


def named_exchange_bytes(
    order: CanonicalOrder, holdings: Sequence[np.ndarray], silo_of: Sequence[int]
) -> list[dict[Scope, int]]:
    """Bytes each rank sends in a round, by link: its primary deltas to their owners, new values to all who hold them.

    `holdings`: every rank's intervals; `silo_of`: every rank's silo.
    """
    ranks = len(holdings)
    shares = [order.share(rank, ranks) for rank in range(ranks)]
    sent: list[dict[Scope, int]] = [{"federation": 0, "silo": 0} for _ in range(ranks)]
    for holder, table in enumerate(holdings):
        for owner in _owners(table, len(shares[0])):
            if holder == owner:
                continue
            link: Scope = "silo" if silo_of[holder] == silo_of[owner] else "federation"
            held = within(table, shares[owner])
            sent[holder][link] += int(primary(held)[:, COUNT].sum()) * FP32_BYTES
            sent[owner][link] += int(held[:, COUNT].sum()) * FP32_BYTES
    return sent


def _owners(table: np.ndarray, share: int) -> list[int]:
    """The ranks that own any of these intervals, where each owns `share` elements."""
    firsts, lasts = table[:, START] // share, (table[:, START] + table[:, COUNT] - 1) // share
    return sorted({owner for first, last in zip(firsts, lasts, strict=True) for owner in range(first, last + 1)})


def _joined(rows: np.ndarray) -> np.ndarray:
    """Sorted, and joined where one interval goes on where the last ended, in both orders."""
    rows = rows[np.lexsort((rows[:, OFFSET], rows[:, START]))]
    if not len(rows):
        return rows
    ends = rows[:-1, [START, OFFSET]] + rows[:-1, [COUNT]]
    new = np.append(True, (ends != rows[1:, [START, OFFSET]]).any(1) | (rows[:-1, PRIMARY] != rows[1:, PRIMARY]))
    joined = rows[new].copy()
    joined[:, COUNT] = np.add.reduceat(rows[:, COUNT], np.flatnonzero(new))
    return joined
