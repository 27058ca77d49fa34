"""Which ranks each collective of a round touched, as the communicators recorded it: nothing leaves where it belongs.

Federation ranks 0..7: silo 0 is 0..3, silo 1 is 4..7; inside a silo pipeline or data outside, tensor inside.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dept.config.schema import RunConfig
from megatron_dept.engine import world as world_module
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.federation.ledger import Ledger, Traced
from megatron_dept.topology.launch import Launch
from tests.support.corpus import Corpus
from tests.support.distributed import run_ranks
from tests.support.runs import small_config, train_rank

SILOS = [set(range(4)), set(range(4, 8))]
ROW_KINDS = {"embedding", "position"}


def _traced(launch: Launch, config: RunConfig) -> tuple[list[Traced], list[Traced]]:
    """All collectives of a run on this rank, and those of its inner steps."""
    ledgers: list[Ledger] = []
    inner: list[Traced] = []

    class Tracing(Ledger):
        def __init__(self) -> None:
            super().__init__()
            self.trace = []
            ledgers.append(self)

    world_module.Ledger = Tracing  # type: ignore[misc]
    step: Callable[..., Any] = SiloEngine.train_step

    def traced_step(self: SiloEngine, *args: Any, **kwargs: Any) -> Any:
        trace = ledgers[0].trace
        assert trace is not None
        first = len(trace)
        result = step(self, *args, **kwargs)
        inner.extend(trace[first:])
        return result

    SiloEngine.train_step = traced_step  # type: ignore[method-assign]
    train_rank(launch, config)
    assert ledgers[0].trace is not None
    return ledgers[0].trace, inner


LAYOUTS = {
    "data 2 x tensor 2, ZeRO 3": {"silos": 2, "tensor_model_parallel_size": 2, "zero_stage": 3},
    "pipe 2 x tensor 2, sequence parallel": {
        "silos": 2,
        "pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_collectives_stay_where_they_belong(corpus: Corpus, tmp_path: Path, layout: str) -> None:
    sections = {"dept": {"variant": "trim", "n_local": 1}, "evaluation": {"interval_rounds": 1, "max_tokens": 100}}
    config = small_config(corpus, tmp_path / "run", parallel=LAYOUTS[layout], **sections)
    ranks = run_ranks(8, _traced, config)
    for rank, (every, inner) in enumerate(ranks):
        own = next(silo for silo in SILOS if rank in silo)
        assert every and inner
        for collective in every:
            assert rank in collective.members, f"{collective} on rank {rank}"
        # Within a round nothing crosses between silos: no gradient, no activation, no embedding, no question asked.
        assert [c for c in inner if not set(c.members) <= own] == []
        # The silo's own traffic is the silo's, whenever it comes.
        crossing = [c for c in every if not set(c.members) <= own]
        assert {c.kind for c in crossing} <= {"body", "control", "evaluation"} | ROW_KINDS
        assert all(c.scope == "federation" for c in crossing)
        # What crosses, but for the leaders' meetings, goes to the same coordinate of the other silo alone.
        peers = {rank % 4, rank % 4 + 4}
        for collective in crossing:
            assert set(collective.members) in ([peers, {0, 4}] if rank % 4 == 0 else [peers]), collective
        # The only embedding traffic that crosses is the exchange of rows, and the first stage alone takes part in it.
        exchanged = [c for c in crossing if c.kind in ROW_KINDS]
        assert {c.operation for c in exchanged} <= {"all_to_all"}
        assert bool(exchanged) == (rank % 4 < 2 or "pipe" not in layout)
        # The embedding's gradients are reduced over its source's silo, and so are the body's.
        assert any(c.kind == "gradient" for c in inner)
