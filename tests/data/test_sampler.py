"""The sampling order: against a plain concatenation, and pure in (seed, name, epoch)."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dept.common.errors import DataError
from megatron_dept.common.seeding import generator_for
from megatron_dept.data import sampler
from megatron_dept.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_dept.data.sampler import SampleStream

VOCABULARY = 60_000
PINNED_ORDER = [89, 68, 18, 6, 50]


def dataset(directory, sizes, name="train"):
    """Documents whose tokens are all different, so that a sample shows where each token came from."""
    ends = np.cumsum(sizes)
    with IndexedDatasetWriter(directory / name, VOCABULARY) as writer:
        for end, size in zip(ends, sizes, strict=True):
            writer.add_document(np.arange(end - size, end))
    return IndexedDataset(directory / name)


def concatenated(indexed, seq_length, seed, name, epoch):
    """All samples of an epoch in order, by laying out the whole epoch."""
    order = generator_for(seed, "documents", name, epoch).permutation(len(indexed))
    tokens = np.concatenate([indexed.document(document) for document in order.tolist()]).astype(np.int64)
    samples = (len(tokens) - 1) // seq_length
    windows = np.stack([tokens[i * seq_length : (i + 1) * seq_length + 1] for i in range(samples)])
    return windows[generator_for(seed, "samples", name, epoch).permutation(samples)]


@pytest.fixture
def stream(tmp_path):
    """101 tokens, seq_length 7: 14 samples an epoch, the last two tokens dropped."""
    return SampleStream(dataset(tmp_path, [30, 1, 0, 25, 3, 40, 2]), 7, 1234, "de")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 1),
    st.integers(0, 2**32),
    st.data(),
)
def test_equals_a_plain_concatenation(tmp_path, sizes, seed, data):
    indexed = dataset(tmp_path, sizes)
    seq_length = data.draw(st.integers(1, sum(sizes) - 1))
    stream = SampleStream(indexed, seq_length, seed, "source")
    expected = np.concatenate([concatenated(indexed, seq_length, seed, "source", epoch) for epoch in range(3)])
    assert stream.samples_per_epoch * 3 == len(expected)
    found = stream.batch(0, len(expected))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


def test_the_order_is_pinned(stream):
    """A change of these numbers, by us or by a new numpy, would change what every resumed run trains on."""
    assert stream.samples_per_epoch == 14
    assert [stream.sample(cursor)[0] for cursor in (0, 1, 13, 14, 1400)] == PINNED_ORDER


def test_batches_ranks_and_resumption_see_one_order(stream):
    whole = stream.batch(0, 60)
    for size in (1, 4, 7, 15):
        parts = [stream.batch(start, min(size, 60 - start)) for start in range(0, 60, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    # Two ranks of micro-batch 3, in lockstep over steps of 6.
    ranks = [SampleStream(stream.indexed, 7, 1234, "de") for _ in range(2)]
    interleaved = [rank.batch(step + 3 * number, 3) for step in range(0, 60, 6) for number, rank in enumerate(ranks)]
    np.testing.assert_array_equal(np.concatenate(interleaved), whole)
    # Any cursor at once, in any order of asking, from a fresh stream or a used one.
    for cursor in (59, 3, 28, 0, 13, 14):
        fresh = SampleStream(stream.indexed, 7, 1234, "de")
        np.testing.assert_array_equal(fresh.sample(cursor), whole[cursor])
        np.testing.assert_array_equal(stream.sample(cursor), whole[cursor])


def test_numpy_numbers_give_the_same_order(stream):
    same = SampleStream(stream.indexed, np.int64(7), np.int64(1234), "de")
    np.testing.assert_array_equal(same.batch(np.int64(30), 5), stream.batch(30, 5))


def test_an_epoch_trains_every_token_once(stream):
    for epoch in range(3):
        targets = stream.batch(14 * epoch, 14)[:, 1:].ravel()
        assert len(np.unique(targets)) == len(targets) == 98


def test_seed_name_and_epoch_each_change_the_order(stream):
    first = stream.batch(0, 14)
    others = [
        SampleStream(stream.indexed, 7, 1235, "de").batch(0, 14),
        SampleStream(stream.indexed, 7, 1234, "fr").batch(0, 14),
        stream.batch(14, 14),
    ]
    for other in others:
        assert not np.array_equal(other, first)


def test_one_epoch_is_kept_and_built_once(stream, monkeypatch):
    built = []
    original = sampler.build_sample_index

    def counting(*arguments):
        built.append(stream._epoch)
        return original(*arguments)

    monkeypatch.setattr(sampler, "build_sample_index", counting)
    for cursor in range(42):
        stream.sample(cursor)
    # Three epochs, three builds, and each time the one before was already given up.
    assert built == [None, None, None]
    assert stream._epoch.number == 2


def test_too_few_tokens_for_one_sample(tmp_path):
    indexed = dataset(tmp_path, [3, 4])
    np.testing.assert_array_equal(np.sort(SampleStream(indexed, 6, 1, "sw").sample(5)), np.arange(7))
    with pytest.raises(DataError, match=r"source sw: .*train has 7 tokens, too few .*seq_length 7 \+ 1; add text"):
        SampleStream(indexed, 7, 1, "sw")


def test_bad_arguments(stream):
    with pytest.raises(ValueError, match="cursor -1 is negative"):
        stream.sample(-1)
    with pytest.raises(ValueError, match="seq_length must be positive, not 0"):
        SampleStream(stream.indexed, 0, 1, "de")
    assert stream.batch(5, 0).shape == (0, 8)
