"""The covering sets of the layout tables do cover, and are small."""

from itertools import combinations

from tests.support.pairs import covering_pairs, every_combination

CHOICES = {"tensor": (1, 2, 4), "data": (1, 2), "stage": (0, 1, 2, 3), "sequence": (False, True), "bf16": (False, True)}


def legal(row: dict) -> bool:
    return (row["tensor"] > 1 or not row["sequence"]) and (row["stage"] > 0 or not row["bf16"])


def pairs(rows: list[dict]) -> set[frozenset]:
    return {frozenset(two) for row in rows for two in combinations(row.items(), 2)}


def test_every_pair_of_any_legal_combination_is_there():
    everything, chosen = every_combination(CHOICES, legal), covering_pairs(CHOICES, legal)
    assert pairs(chosen) == pairs(everything)
    assert all(row in everything for row in chosen)
    # Written out: 2 without and 4 with sequence parallelism for each of tensor x data, times 4 fp32 and 3 bf16 stages.
    assert len(everything) == (2 + 4 + 4) * 7


def test_an_illegal_pair_is_not_asked_for():
    assert (0, True) not in {(row["stage"], row["bf16"]) for row in covering_pairs(CHOICES, legal)}


def test_few_rows_and_the_same_ones_each_time():
    """Tensor x stage alone are 12 pairs, one a row; half as many again is what greed may cost."""
    chosen = covering_pairs(CHOICES, legal)
    assert 12 <= len(chosen) <= 18
    assert chosen == covering_pairs(CHOICES, legal)
