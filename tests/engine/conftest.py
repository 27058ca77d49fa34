"""One run of the probes per ZeRO stage, precision and number of ranks, shared by all tests of engine and shards."""

from dataclasses import dataclass
from typing import Any

import pytest

from tests.engine.probes import LAYOUTS, Layout, probe
from tests.support.distributed import run_ranks


@dataclass(frozen=True)
class Ran:
    """`ranks[r][name]`: what rank r returned from the probe of that name."""

    layout: Layout
    ranks: list[dict[str, Any]]

    def of(self, name: str) -> list[Any]:
        return [results[name] for results in self.ranks]


@pytest.fixture(scope="package", params=LAYOUTS, ids=str)
def ran(request: pytest.FixtureRequest) -> Ran:
    layout: Layout = request.param
    return Ran(layout, run_ranks(layout.ranks, probe, layout))
