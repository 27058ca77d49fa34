"""The blended order: against a walk from the start, resumable anywhere, in the asked proportions."""

import numpy as np
import pytest

from megatron_dept.common.errors import DataError
from megatron_dept.data import blend
from megatron_dept.data.blend import BLOCK, BlendedStream, draw_probabilities
from megatron_dept.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_dept.data.sampler import SampleStream

WEIGHTS = (1000, 200, 50)
PINNED_DRAWS = [0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0]


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Three sources whose tokens tell them apart: source k holds ids from 10000 k."""
    directory = tmp_path_factory.mktemp("blend")
    made = []
    for source, tokens in enumerate(WEIGHTS):
        with IndexedDatasetWriter(directory / str(source), 50_000) as writer:
            writer.add_document(np.arange(tokens) + 10_000 * source)
        made.append(SampleStream(IndexedDataset(directory / str(source)), 8, 1, f"source{source}"))
    return made


def test_equals_a_walk_from_the_start(streams, monkeypatch):
    monkeypatch.setattr(blend, "BLOCK", 16)  # so that 100 draws cross blocks, as they cross epochs
    stream = BlendedStream(streams, WEIGHTS, 0.5, 7)
    cursors = [0, 0, 0]
    expected, sources = [], []
    for cursor in range(100):
        source = stream.source_of(cursor)
        assert stream.cursors(cursor).tolist() == cursors
        expected.append(streams[source].sample(cursors[source]))
        sources.append(source)
        cursors[source] += 1
    assert set(sources) == {0, 1, 2}
    for size in (1, 3, 32, 100):
        fresh = BlendedStream(streams, WEIGHTS, 0.5, 7)
        batches = [fresh.batch(start, min(size, 100 - start)) for start in range(0, 100, size)]
        samples, found = (np.concatenate(part) for part in zip(*batches, strict=True))
        assert samples.dtype == found.dtype == np.int64
        np.testing.assert_array_equal(samples, expected)
        np.testing.assert_array_equal(found, sources)
    np.testing.assert_array_equal(stream.sample(57), expected[57])


def test_the_draws_are_pinned(streams):
    """A change of these numbers, by us or by a new numpy, would change what every resumed run trains on."""
    assert BlendedStream(streams, WEIGHTS, 1.0, 1234).sources_of(BLOCK - 6, 12).tolist() == PINNED_DRAWS


def test_draws_are_pure_in_seed_and_number(streams):
    one, other = (BlendedStream(streams, WEIGHTS, 1.0, seed) for seed in (3, 4))
    again = BlendedStream(streams, WEIGHTS, 1.0, np.int64(3))
    cursor = 5 * BLOCK - 100
    draws = one.sources_of(cursor, 200)
    np.testing.assert_array_equal(again.sources_of(np.int64(cursor + 90), 20), draws[90:110])
    assert not np.array_equal(other.sources_of(cursor, 200), draws)
    assert not np.array_equal(one.sources_of(0, 200), draws)


def test_a_far_cursor_is_reached_without_making_the_draws(streams, monkeypatch):
    stream = BlendedStream(streams, WEIGHTS, 1.0, 3)
    made = []
    original = BlendedStream._draws
    monkeypatch.setattr(BlendedStream, "_draws", lambda self, block: made.append(block) or original(self, block))
    far = 10**8 + 12_345
    before = stream.cursors(far)
    assert before.sum() == far
    samples, sources = stream.batch(far, 50)
    assert set(made) == {far // BLOCK}
    np.testing.assert_array_equal(stream.cursors(far + 50) - before, np.bincount(sources, minlength=3))
    assert (samples[:, 0] // 10_000 == sources).all()


@pytest.mark.parametrize(("tau", "expected"), [(0.0, [1 / 3] * 3), (1.0, [0.8, 0.16, 0.04])])
def test_probabilities(tau, expected):
    np.testing.assert_allclose(draw_probabilities(WEIGHTS, tau), expected, rtol=1e-14)  # a few roundings of float64


def test_probabilities_of_any_size_are_n_to_the_tau():
    counts = np.array([3, 10**12, 7 * 10**9])
    powers = counts.astype(np.longdouble) ** 0.3
    # 1e-13: exp(log) loses about |log n| * tau ~ 10 units in the last place.
    np.testing.assert_allclose(draw_probabilities(counts, 0.3), (powers / powers.sum()).astype(float), rtol=1e-13)
    assert np.isfinite(draw_probabilities(counts, 100.0)).all()


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_draws_follow_the_probabilities_and_are_independent(streams, tau):
    stream = BlendedStream(streams, WEIGHTS, tau, 11)
    draws = stream.sources_of(BLOCK // 2, 2 * BLOCK)
    expected = draw_probabilities(WEIGHTS, tau)
    # Pairs of neighbours (9 kinds) and singles: 5 standard deviations of a binomial share; the seed is fixed.
    for found, shares, trials in [
        (np.bincount(draws, minlength=3), expected, len(draws)),
        (np.bincount(3 * draws[::2] + draws[1::2], minlength=9), np.outer(expected, expected).ravel(), len(draws) // 2),
    ]:
        deviation = np.sqrt(shares * (1 - shares) / trials)
        assert (np.abs(found / trials - shares) < 5 * deviation).all()
    # Independent draws leave the count of a block free: its variance is the binomial's, not zero.
    counts = np.array([stream._block_counts(block)[0][0] for block in range(400)])
    variance = BLOCK * expected[0] * (1 - expected[0])
    # The variance of 400 values has a relative standard deviation of sqrt(2 / 399) = 7 %: 5 of them.
    assert abs(counts.var(ddof=1) / variance - 1) < 0.35


def test_a_source_that_cannot_be_blended_is_named(streams):
    with pytest.raises(DataError, match="source source1 has weight 0"):
        BlendedStream(streams, (1, 0, 1), 1.0, 1)
    with pytest.raises(ValueError, match="3 streams and 2 weights"):
        BlendedStream(streams, (1, 1), 1.0, 1)
    with pytest.raises(ValueError, match=r"differ in seq_length: \[8, 8, 4\]"):
        BlendedStream([*streams[:2], SampleStream(streams[2].indexed, 4, 1, "x")], WEIGHTS, 1.0, 1)
    with pytest.raises(ValueError, match="cursor -1 is negative"):
        BlendedStream(streams, WEIGHTS, 1.0, 1).batch(-1, 2)
