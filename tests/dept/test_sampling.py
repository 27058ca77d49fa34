"""Sampling of sources is pure, without replacement and uniform; slots hold every sampled source once."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.dept.sampling import assign_slots, sample_sources

names_strategy = st.lists(st.text("abcdefgh-", min_size=1, max_size=4), min_size=1, max_size=9, unique=True)


@given(st.data(), names_strategy, st.integers(0, 2**40), st.integers(0, 10_000))
def test_a_sample_is_distinct_pure_and_in_the_order_of_names(data, names, seed, round):
    count = data.draw(st.integers(1, len(names)))
    sampled = sample_sources(seed, round, names, count)
    assert len(sampled) == len(set(sampled)) == count
    assert list(sampled) == [name for name in names if name in sampled]
    assert sampled == sample_sources(seed, round, names, count)


@given(st.data(), names_strategy, st.integers(0, 1000))
def test_which_sources_are_drawn_does_not_depend_on_their_order(data, names, seed):
    count = data.draw(st.integers(1, len(names)))
    shuffled = data.draw(st.permutations(names))
    assert set(sample_sources(seed, 3, names, count)) == set(sample_sources(seed, 3, shuffled, count))


def test_every_subset_is_as_likely_as_another():
    names, rounds = ["de", "en", "zh", "code", "math"], 4000
    subsets = Counter(sample_sources(7, round, names, 2) for round in range(rounds))
    assert set(subsets) == set(itertools.combinations(names, 2))
    expected = rounds / len(subsets)
    chi_squared = sum((seen - expected) ** 2 / expected for seen in subsets.values())
    # 9 degrees of freedom: 27.9 is the 99.9 % quantile; the seed is fixed, so the test is deterministic.
    assert chi_squared < 27.9


def test_rounds_and_seeds_draw_anew():
    names = [f"source{index}" for index in range(16)]
    assert len({sample_sources(1, round, names, 4) for round in range(20)}) > 10
    assert len({sample_sources(seed, 0, names, 4) for seed in range(20)}) > 10


@pytest.mark.parametrize("count", [0, 3, -1])
def test_an_impossible_count_is_refused(count):
    with pytest.raises(ValueError, match="sources_per_round"):
        sample_sources(0, 0, ["a", "b"], count)


def test_a_repeated_name_is_refused():
    with pytest.raises(ValueError, match="not distinct"):
        sample_sources(0, 0, ["a", "a"], 1)


@given(names_strategy, st.integers(1, 12))
def test_slots_hold_every_source_once_in_order(names, silos):
    slots = assign_slots(names, silos)
    assert len(slots) == (len(names) + silos - 1) // silos
    for slot, silo in itertools.product(range(len(slots)), range(silos)):
        place = slot * silos + silo
        assert slots[slot][silo] == (names[place] if place < len(names) else None)
    assert [name for slot in slots for name in slot if name is not None] == names


def test_no_silos_are_refused():
    with pytest.raises(ValueError, match="silos"):
        assign_slots(["a"], 0)
