"""Pieces of a flat partition by name: cutting one never loses, moves or renames an element."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.common.segments import Segment

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
