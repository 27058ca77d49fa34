"""One set of forked ranks for the cases of one layout, shared by all tests of pipelines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.engine.pipeline.cases import ALL_CASES, CASES, Case
from tests.engine.pipeline.probe import probe
from tests.support.distributed import run_ranks

CASES_A_FORK = 4
"""Every engine leaves threads and connections behind in its process."""


@dataclass(frozen=True)
class Ran:
    """`ranks[r][name]`: what rank r returned from the probe of that name."""

    case: Case
    ranks: list[dict[str, Any]]

    def of(self, name: str) -> list[Any]:
        return [results[name] for results in self.ranks]


@pytest.fixture(scope="package")
def reports() -> Callable[[Case], Ran]:
    """Runs a case's fork when it is first asked for."""
    known: dict[Case, Ran] = {}

    def report(case: Case) -> Ran:
        if case not in known:
            table = CASES if case in CASES else [other for other in ALL_CASES if other not in CASES]
            alike = [other for other in table if other.shape == case.shape]
            begin = alike.index(case) // CASES_A_FORK * CASES_A_FORK
            cases = alike[begin : begin + CASES_A_FORK]
            ranks = run_ranks(case.ranks, probe, cases)
            known.update({each: Ran(each, [rank[each] for rank in ranks]) for each in cases})
        return known[case]

    return report


@pytest.fixture(
    params=[*CASES, *(pytest.param(case, marks=pytest.mark.all_layouts) for case in ALL_CASES if case not in CASES)],
    ids=str,
)
def ran(request: pytest.FixtureRequest, reports: Callable[[Case], Ran]) -> Ran:
    return reports(request.param)
