"""Held-out windows: each token but the first a target exactly once, and tokens outside V_k as their bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.common.errors import DataError
from megatron_dept.data.remap import VocabularyMap
from megatron_dept.evaluation.heldout import cut_windows, heldout_windows

WORDS = range(258, 274)
BYTES_AND_SPECIALS = range(258)
documents_strategy = st.lists(
    st.lists(st.sampled_from([*WORDS, 40, 41, 200]), max_size=12), min_size=1, max_size=6
).map(lambda documents: [[*document, 1] for document in documents])


def targets_of(text):
    return np.concatenate([window[1 : 1 + scored] for window, scored in zip(text.windows, text.scored, strict=True)])


@given(st.integers(2, 60), st.integers(1, 20))
def test_every_token_but_the_first_is_scored_once_and_follows_its_input(length, seq_length):
    stream = np.arange(100, 100 + length)
    windows, scored = cut_windows(stream, seq_length)
    assert windows.dtype == np.int64 and windows.shape == (-(-(length - 1) // seq_length), seq_length + 1)
    seen = []
    for window, count in zip(windows, scored, strict=True):
        assert np.array_equal(window[1 : count + 1], window[:count] + 1)  # each target follows its input in the stream
        assert not window[count + 1 :].any()
        seen += window[1 : count + 1].tolist()
    assert seen == stream[1:].tolist()


@given(documents_strategy, st.integers(1, 9), st.integers(1, 40))
def test_the_stream_is_the_documents_in_order_up_to_max_tokens(dataset, documents, seq_length, max_tokens):
    stream = [token for document in documents for token in document]
    if len(stream) < 2:
        return
    text = heldout_windows(dataset(documents), seq_length, max_tokens)
    assert targets_of(text).tolist() == stream[1 : max_tokens + 1]
    assert text.tokens == min(len(stream) - 1, max_tokens)
    assert text.replaced == 0
    assert heldout_windows(dataset(documents), seq_length).tokens == len(stream) - 1


@given(documents_strategy, st.sets(st.sampled_from(WORDS)), st.integers(1, 9), st.integers(1, 40))
def test_words_outside_the_vocabulary_are_spelled_by_their_bytes(
    dataset, tokenizer, documents, known, seq_length, max_tokens
):
    stream = [token for document in documents for token in document][: max_tokens + 1]
    if len(stream) < 2:
        return
    vocabulary = VocabularyMap(np.array(sorted([*BYTES_AND_SPECIALS, *known])), tokenizer.vocab_size)
    text = heldout_windows(dataset(documents), seq_length, max_tokens, vocabulary)
    expected, replaced = [], 0
    for token in stream:
        if token < 258 or token in known:
            expected.append(token)
        else:
            expected += [2 + byte for byte in tokenizer.token_bytes()[token]]
            replaced += 1
    assert vocabulary.to_global(targets_of(text)).tolist() == expected[1:]
    assert text.replaced == replaced
    assert len(text.bytes_per_token) == len(vocabulary)
    # The same text, whatever the vocabulary: all bytes but those of the piece that has nothing before it.
    whole = b"".join(tokenizer.token_bytes()[token] for token in stream)
    first = tokenizer.token_bytes()[expected[0]]
    assert text.bytes_per_token[targets_of(text)].sum() == len(whole) - len(first)


def test_specials_stand_for_no_bytes_and_words_for_their_utf_8(dataset, tokenizer):
    text = heldout_windows(dataset([[258, 259, 1]]), 4)
    assert text.bytes_per_token[[0, 1, 2, 258, 259, 260]].tolist() == [0, 0, 1, 2, len("zwölf".encode()), 6]


def test_no_document_beyond_max_tokens_is_read(dataset):
    directory = dataset([[258, 1]] * 100)
    heldout_windows(directory, 4, max_tokens=5)
    assert directory.indexed("heldout").read == {0, 1, 2}


@pytest.mark.parametrize("documents", [[], [[1]], [[], []]])
def test_a_split_with_nothing_to_score_is_refused(dataset, documents):
    with pytest.raises(DataError, match="toy.*nothing to score"):
        heldout_windows(dataset(documents), 4)


@given(st.integers(2, 40), st.integers(1, 5))
def test_shares_hold_every_window_once_and_are_equally_long(dataset, length, ranks):
    text = heldout_windows(dataset([[258 + index % 16 for index in range(length)]]), 3)
    shares = [text.share(rank, ranks) for rank in range(ranks)]
    assert len({len(share.windows) for share in shares}) == 1
    kept = [window.tolist() for share in shares for window in share.windows[share.scored > 0]]
    assert sorted(kept) == sorted(text.windows.tolist())
    assert sum(share.tokens for share in shares) == text.tokens
    assert sum(share.replaced for share in shares) == text.replaced
