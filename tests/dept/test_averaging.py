"""TRIM's mean per row against numpy, and GLOB as the case that everyone holds everything."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.dept import row_storage
from megatron_dept.dept.averaging import RowMean, mean_delta
from megatron_dept.dept.outer import OuterRule
from megatron_dept.dept.row_storage import RowStorage, StoredRows


@st.composite
def rounds(draw):
    """Rows, hidden size, and for each source the rows it holds (in any order) with fp32 deltas."""
    rows, hidden = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    held = draw(st.lists(st.lists(st.integers(0, rows - 1), unique=True), max_size=5))
    return rows, hidden, [(ids, generator.standard_normal((len(ids), hidden)).astype(np.float32)) for ids in held]


def reference(rows, hidden, sources, dtype):
    """For each row, the deltas of its holders in order, summed and divided by their number; `held` beside it."""
    mean, held = np.zeros((rows, hidden), dtype), np.zeros(rows, bool)
    for row in range(rows):
        deltas = [delta[ids.index(row)].astype(dtype) for ids, delta in sources if row in ids]
        if deltas:
            total = np.zeros(hidden, dtype)
            for delta in deltas:
                total = total + delta
            mean[row], held[row] = total / dtype(len(deltas)), True
    return mean, held


def accumulate(rows, hidden, sources):
    accumulator = RowMean(rows, hidden)
    for ids, delta in sources:
        accumulator.add(torch.tensor(ids, dtype=torch.int64), torch.from_numpy(delta))
    return accumulator


def mean_of(accumulator, hidden):
    """(mean, held): 0 - mean is exact, so what a step of one whole mean leaves of zeros is the mean to the bit."""
    table = StoredRows(torch.zeros(len(accumulator.counts), hidden))
    accumulator.step(OuterRule("fedavg", 1.0, 0.0), table, None)
    return -table.tensor, accumulator.counts > 0


@given(rounds())
def test_each_row_is_the_mean_over_its_holders(case):
    rows, hidden, sources = case
    mean, held = mean_of(accumulate(rows, hidden, sources), hidden)
    expected, expected_held = reference(rows, hidden, sources, np.float32)
    assert np.array_equal(held.numpy(), expected_held)
    assert np.array_equal(mean.numpy(), expected)  # the same sums in the same order: bitwise
    exact, _ = reference(rows, hidden, sources, np.float64)
    # At most five terms of size ~5: five roundings of sums below 25, 5 x 25 x 2^-24 < 1e-5.
    np.testing.assert_allclose(mean.numpy(), exact, rtol=0, atol=1e-5)


@given(rounds())
def test_reading_the_mean_changes_nothing_and_reset_forgets(case):
    accumulator = accumulate(*case)
    first, second = mean_of(accumulator, case[1]), mean_of(accumulator, case[1])
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    accumulator.reset()
    mean, held = mean_of(accumulator, case[1])
    assert not held.any() and not mean.any()


@given(rounds())
def test_saved_sums_and_counts_continue_the_round(case):
    rows, hidden, sources = case
    half = len(sources) // 2
    saved, resumed = accumulate(rows, hidden, sources[:half]), RowMean(rows, hidden)
    for start in range(0, rows, 5):
        stop = min(start + 5, rows)
        resumed.put_back(start, saved.sums(start, stop), saved.counts[start:stop])
    for ids, delta in sources[half:]:
        resumed.add(torch.tensor(ids, dtype=torch.int64), torch.from_numpy(delta))
    assert torch.equal(mean_of(resumed, hidden)[0], mean_of(accumulate(rows, hidden, sources), hidden)[0])


@st.composite
def ways(draw):
    """How the same deltas may come: whether in memory or on disk, in blocks of how many rows, and in which groups."""
    return draw(st.booleans()), draw(st.integers(1, 5)), draw(st.lists(st.integers(0, 3), min_size=5, max_size=5))


def come(case, way, directory):
    """(mean, held, sums, touched) of sources that come in groups, each at once, before which room is made."""
    rows, hidden, sources = case
    on_disk, block, groups = way
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_storage, "BLOCK_BYTES", block * hidden * 4)
        accumulator = RowMean(rows, hidden, RowStorage(directory if on_disk else None))
        left = [(np.argsort(ids), np.sort(ids).astype(np.int64), delta) for ids, delta in sources]
        for group in (*groups, len(left)):
            some, left = left[:group], left[group:]
            accumulator.make_room()
            deltas = [torch.from_numpy(delta[order]) for order, _, delta in some]
            accumulator.add_all(
                [torch.from_numpy(ids) for _, ids, _ in some], torch.cat([torch.zeros(0, hidden), *deltas])
            )
        return *mean_of(accumulator, hidden), accumulator.sums(0, rows), accumulator.touched()


@given(rounds(), ways())
def test_however_deltas_come_the_bits_are_the_same(tmp_path_factory, case, way):
    """As pieces that came at once or apart, added up in a table of sums on the way, in blocks, in memory or on disk."""
    rows, hidden, sources = case
    directory = tmp_path_factory.getbasetemp() / "sums"
    mean, held, sums, (touched, touched_sums, counts) = come(case, way, directory)
    expected, expected_held = reference(rows, hidden, sources, np.float32)
    assert np.array_equal(mean.numpy(), expected) and np.array_equal(held.numpy(), expected_held)
    assert torch.equal(touched, held.nonzero().squeeze(1)) and torch.equal(touched_sums, sums[touched])
    total = np.zeros((rows, hidden), np.float32)
    for ids, delta in sources:
        total[ids] += delta
    assert np.array_equal(sums.numpy(), total)
    assert torch.equal(counts, torch.tensor([sum(row in ids for ids, _ in sources) for row in touched.tolist()]).int())


@given(rounds())
def test_sums_of_others_are_added_with_their_counts(case):
    """Merging two halves' sums is not the same order of summing: equal where numbers are whole."""
    rows, hidden, sources = case
    sources = [(ids, np.rint(delta * 8)) for ids, delta in sources]
    halves = [accumulate(rows, hidden, sources[half::2]).touched() for half in range(2)]
    merged = RowMean(rows, hidden)
    for ids, sums, counts in halves:
        merged.merge(ids, sums, counts)
    expected, held = mean_of(accumulate(rows, hidden, sources), hidden)
    mean, held_too = mean_of(merged, hidden)
    assert torch.equal(mean, expected) and torch.equal(held, held_too)


def test_bf16_deltas_are_summed_in_fp32():
    accumulator = RowMean(2, 1)
    for value in (256.0, 1.0, 1.0):  # 257 is no bf16 number
        accumulator.add(torch.tensor([1]), torch.tensor([[value]], dtype=torch.bfloat16))
    assert accumulator.sums(0, 2).tolist() == [[0.0], [258.0]]
    assert mean_of(accumulator, 1)[0].tolist() == [[0.0], [86.0]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_sources_that_hold_every_row_give_the_dense_mean(seed, sources):
    deltas = np.random.default_rng(seed).standard_normal((sources, 6, 3)).astype(np.float32)
    mean, held = mean_of(accumulate(6, 3, [(list(range(6)), delta) for delta in deltas]), 3)
    dense = torch.zeros(6, 3)
    for delta in deltas:
        dense += torch.from_numpy(delta)
    assert held.all()
    assert torch.equal(mean, mean_delta(dense, sources))  # TRIM with V_k = V is GLOB, bitwise


def test_a_row_whose_deltas_are_zero_is_held_all_the_same():
    # It took part in the round: its momentum must go on, where a row held by none keeps it.
    mean, held = mean_of(accumulate(3, 2, [([1], np.zeros((1, 2), np.float32))]), 2)
    assert held.tolist() == [False, True, False] and not mean.any()


def test_a_row_held_twice_by_one_source_is_a_bug():
    with pytest.raises(AssertionError, match="once"):
        RowMean(3, 1).add(torch.tensor([1, 1]), torch.ones(2, 1))


def test_deltas_of_another_shape_are_a_bug():
    with pytest.raises(AssertionError):
        RowMean(3, 2).add(torch.tensor([1]), torch.ones(1, 3))
