"""Pieces of a flat partition by name: cutting one never loses, moves or renames an element."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.common.segments import Segment, joined_places, primary_square

segments = st.builds(
    lambda start, length, offset: Segment("w", start, start + length, offset),
    st.integers(0, 20),
    st.integers(1, 20),
    st.integers(0, 30),
)


def elements(segment: Segment, shift: int = 0) -> dict[int, int]:
    """Place in the partition -> element of the parameter."""
    places = range(segment.place.start + shift, segment.place.stop + shift)
    return dict(zip(places, range(segment.start, segment.stop), strict=True))


@given(segments, st.integers(0, 50), st.integers(0, 30))
def test_the_piece_inside_a_range_holds_exactly_what_lies_there(segment, start, length):
    part = slice(start, start + length)
    piece = segment.within(part)
    inside = {place: element for place, element in elements(segment).items() if part.start <= place < part.stop}
    assert (elements(piece, shift=part.start) if piece else {}) == inside
    assert piece is None or piece.name == "w"


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.data())
def test_adjacent_places_become_one_and_none_is_lost(lengths, data):
    """Places that lie end to end, some left out, in any order."""
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    places = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    kept = [place for place in places if data.draw(st.booleans())]
    joined = joined_places(data.draw(st.permutations(kept)))
    covered = [i for place in joined for i in range(place.start, place.stop)]
    assert covered == [i for place in kept for i in range(place.start, place.stop)]
    assert all(before.stop < after.start for before, after in zip(joined, joined[1:], strict=False))


def test_copies_and_padding_are_not_counted():
    flat = torch.tensor([3.0, 100.0, 4.0, 1000.0])
    segments = [Segment("w", 0, 1, 0), Segment("norm", 0, 1, 1, primary=False), Segment("v", 5, 6, 2)]
    assert primary_square(flat, segments) == 25.0
    assert primary_square(flat, segments[1:2]) == 0.0
