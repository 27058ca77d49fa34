"""Ids to a source's rows and back; tokens outside V_k as bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.common.errors import DataError
from megatron_dept.data.remap import VocabularyMap, expand_to_bytes

VOCABULARY = 300


class ByteTokenizer:
    """Ids 0 to 255 are the bytes; 256 on are words of known text; 299 is special, of no text."""

    words = {256: b"ab", 257: b"c", 258: b"\xc3\xa9!", 299: b""}

    def byte_pieces(self, id, /):
        return np.frombuffer(self.words[id], np.uint8).astype(np.int64)


@given(st.sets(st.integers(0, VOCABULARY - 1), min_size=1), st.data())
def test_to_local_is_the_place_in_the_sorted_ids_and_to_global_its_inverse(ids, data):
    sorted_ids = sorted(ids)
    vocabulary = VocabularyMap(np.array(sorted_ids), VOCABULARY)
    given_ids = np.array(data.draw(st.lists(st.sampled_from(sorted_ids), min_size=4, max_size=4))).reshape(2, 2)
    local = vocabulary.to_local(given_ids)
    assert local.dtype == np.int64 and len(vocabulary) == len(ids)
    assert local.tolist() == [[sorted_ids.index(id) for id in row] for row in given_ids.tolist()]
    assert vocabulary.to_global(local).dtype == np.int64
    np.testing.assert_array_equal(vocabulary.to_global(local), given_ids)
    everything = np.arange(VOCABULARY)
    assert vocabulary.contains(everything).tolist() == [id in ids for id in range(VOCABULARY)]


def test_stored_dtypes_and_empty_input():
    vocabulary = VocabularyMap(np.arange(0, VOCABULARY, 3), VOCABULARY)
    assert vocabulary.to_local(np.array([297, 3], np.uint16)).tolist() == [99, 1]
    assert vocabulary.to_local(np.array([], np.int64)).shape == (0,)


def test_ids_outside_are_named():
    vocabulary = VocabularyMap(np.array([2, 5, 9]), VOCABULARY)
    with pytest.raises(DataError, match="id 6 is not among the 3 ids of the source's vocabulary"):
        vocabulary.to_local(np.array([2, 6, 7]))
    for outside in (300, -1):
        with pytest.raises(DataError, match=f"id {outside} is outside the vocabulary of 300"):
            vocabulary.to_local(np.array([2, outside]))
        with pytest.raises(DataError, match=f"id {outside} is outside the vocabulary of 300"):
            vocabulary.contains(np.array([outside]))
    for row in (3, -1):
        with pytest.raises(DataError, match=f"row {row} is outside the source's vocabulary of 3 rows"):
            vocabulary.to_global(np.array([0, row]))


@pytest.mark.parametrize("ids", [[], [3, 3], [5, 2], [-1, 2], [2, 300], [[1, 2]], [1.0, 2.0]])
def test_what_is_no_vocabulary_is_refused(ids):
    with pytest.raises(ValueError, match="ids"):
        VocabularyMap(np.array(ids), VOCABULARY)


def test_unknown_tokens_become_their_bytes():
    vocabulary = VocabularyMap(np.array([*range(256), 257, 299]), VOCABULARY)
    ids = np.array([256, 257, 7, 258, 256, 299], np.uint16)
    found, replaced = expand_to_bytes(ids, vocabulary, ByteTokenizer())
    assert found.tolist() == [97, 98, 257, 7, 0xC3, 0xA9, 0x21, 97, 98, 299]
    assert found.dtype == np.int64 and replaced == 3
    vocabulary.to_local(found)  # all of it is in V_k now


def test_known_text_is_left_as_it_is():
    vocabulary = VocabularyMap(np.arange(VOCABULARY), VOCABULARY)
    found, replaced = expand_to_bytes(np.array([256, 299], np.uint16), vocabulary, ByteTokenizer())
    assert found.tolist() == [256, 299] and found.dtype == np.int64 and replaced == 0


def test_what_has_no_bytes_is_named():
    with pytest.raises(DataError, match="id 299 is outside the source's vocabulary and stands for no text"):
        expand_to_bytes(np.array([299]), VocabularyMap(np.arange(256), VOCABULARY), ByteTokenizer())
    with pytest.raises(DataError, match="id 256 is outside .*byte tokens of its text; add all byte tokens"):
        expand_to_bytes(np.array([256]), VocabularyMap(np.arange(98), VOCABULARY), ByteTokenizer())
    with pytest.raises(DataError, match="id 300 is outside the vocabulary of 300"):
        expand_to_bytes(np.array([300]), VocabularyMap(np.arange(98), VOCABULARY), ByteTokenizer())
