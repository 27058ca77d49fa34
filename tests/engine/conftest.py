"""The probes' reports, shared by all tests of engine and shards: cases of one shape run in one set of forked ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.engine.cases import EVERYTHING, FURTHER, PAIRS, THOROUGH, Case
from tests.engine.probes import DIFFERENTIAL, PROBES, probe
from tests.support.distributed import run_ranks

CASES_A_FORK = 8
"""Every engine leaves memory behind in its process."""


OTHERS = tuple(case for case in PAIRS if case not in THOROUGH)
# What shows a pair of choices is never left out.
LEFT_OUT = tuple(case for case in FURTHER if case not in PAIRS)
REST = tuple(case for case in EVERYTHING if case not in (*THOROUGH, *LEFT_OUT, *PAIRS))
TABLES = (THOROUGH, LEFT_OUT, OTHERS, REST)


@dataclass(frozen=True)
class Ran:
    """`ranks[r][name]`: what rank r returned from the probe of that name."""

    case: Case
    ranks: list[dict[str, Any]]

    def of(self, name: str) -> list[Any]:
        return [results[name] for results in self.ranks]


def _fork_of(case: Case) -> tuple[Sequence[Case], Sequence[str]]:
    """The cases that run in one set of ranks with `case`, and the probes they run."""
    table = next(table for table in TABLES if case in table)
    alike = [other for other in table if (other.data, other.tensor) == (case.data, case.tensor)]
    begin = alike.index(case) // CASES_A_FORK * CASES_A_FORK
    return alike[begin : begin + CASES_A_FORK], list(PROBES) if table in (THOROUGH, LEFT_OUT) else DIFFERENTIAL


@pytest.fixture(scope="package")
def reports() -> Callable[[Case], Ran]:
    """Runs a case's fork when it is first asked for."""
    known: dict[Case, Ran] = {}

    def report(case: Case) -> Ran:
        if case not in known:
            cases, names = _fork_of(case)
            ranks = run_ranks(case.shape.size, probe, cases, names, limit=240)
            known.update({each: Ran(each, [rank[each] for rank in ranks]) for each in cases})
        return known[case]

    return report


LONG = [pytest.param(case, marks=pytest.mark.long) for case in LEFT_OUT]


@pytest.fixture(params=[*THOROUGH, *LONG], ids=str)
def ran(request: pytest.FixtureRequest, reports: Callable[[Case], Ran]) -> Ran:
    """The cases that run every probe."""
    return reports(request.param)


@pytest.fixture(
    params=[
        *THOROUGH,
        *LONG,
        *OTHERS,
        *(pytest.param(case, marks=pytest.mark.all_layouts) for case in REST),
    ],
    ids=str,
)
def stepped(request: pytest.FixtureRequest, reports: Callable[[Case], Ran]) -> Ran:
    """Every case, for what is held against plain torch step by step."""
    return reports(request.param)
