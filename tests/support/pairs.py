"""Few combinations of choices that together show every two choices side by side."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def every_combination(choices: Mapping[str, Sequence[Any]], legal: Callable[[Row], bool]) -> list[Row]:
    """The legal rows of the whole product, the last choice varying fastest."""
    rows = (dict(zip(choices, values, strict=True)) for values in product(*choices.values()))
    return [row for row in rows if legal(row)]


def covering_pairs(choices: Mapping[str, Sequence[Any]], legal: Callable[[Row], bool]) -> list[Row]:
    """Legal rows in which every pair of values of two choices occurs that occurs in any legal row.

    Greedy, not minimal: always the row with most pairs not seen yet, of several the first. The same on every call.
    """
    rows = every_combination(choices, legal)
    missing = set().union(*(_pairs(row) for row in rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(_pairs(row) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(row: Row) -> set[tuple[Any, ...]]:
    return {(*one, *other) for one, other in combinations(row.items(), 2)}
