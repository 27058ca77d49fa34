"""Exchanges of the body built by a silo alone, then used among others: as if they had been built there.

What a silo is handed over changes nothing before it accepts it: a transfer that was given up may end at any time.
"""

from types import SimpleNamespace
from typing import Any

import torch

from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.federation.communicator import Alone
from megatron_dept.federation.named_exchange import NamedBodyExchange
from megatron_dept.topology.launch import Launch
from tests.federation.cuts import ELEMENTS, FEDERATIONS, SHAPES
from tests.federation.groups import join_silos, meet, over_gloo
from tests.federation.outer_reference import NESTEROV, SLOW_FEDAVG, local_body, start
from tests.support.distributed import run_ranks

RULES = (NESTEROV, SLOW_FEDAVG)
SILOS = 3


def _bodies(launch: Launch) -> dict[str, Any]:
    """Silos of one rank: two rounds of three silos, the second without silo 1, which is then given the state."""
    connect = over_gloo(meet(launch), launch.rank)
    together = join_silos(connect, "all", launch.rank, (1,) * SILOS, True)
    silo, seen = launch.rank, {}
    for number, rule in enumerate(RULES):
        for elements in (1, 7, 1000):
            first = torch.from_numpy(start(number, elements))
            alone, built = BodyExchange(Alone(), first, rule, True), BodyExchange(together.peers, first, rule, True)
            for exchange in (alone, built):
                exchange.add(torch.from_numpy(local_body(number, 0, silo, 0, elements)))
            joined = alone.among(together.peers)
            assert joined.round_bytes == built.round_bytes
            alone.commit(joined.prepare(SILOS))
            built.finish(SILOS)
            same = _same(alone, built)
            if silo == 1:
                alone.value.fill_(7)
                if alone.momentum is not None:
                    alone.momentum.fill_(7)
            kept = _copy(alone)
            handed = alone.among(together.peers).hand_over(2)
            same = same and _same(alone, kept)
            alone.accept(handed)
            seen[f"{number}-{elements}"] = (same, _same(alone, built), bool((alone.delta == 0).all()))
    return seen


def _copy(exchange: Any) -> SimpleNamespace:
    """Its state as it is now."""
    momentum = None if exchange.momentum is None else exchange.momentum.clone()
    return SimpleNamespace(value=exchange.value.clone(), momentum=momentum)


def _same(left: Any, right: Any) -> bool:
    both = zip((left.value, left.momentum), (right.value, right.momentum), strict=True)
    return all(torch.equal(a, b) if a is not None else b is None for a, b in both)


def test_a_body_exchange_among_others_is_one_built_there() -> None:
    for seen in run_ranks(SILOS, _bodies):
        assert len(seen) == 6 and set(seen.values()) == {(True, True, True)}


def _named(launch: Launch) -> dict[str, bool]:
    """Every federation of unequal silos: built by each silo alone, then among all; the last silo gives."""
    store, seen = meet(launch), {}
    for name, federation in FEDERATIONS.items():
        ranks = tuple(len(parts) for parts in federation)
        if launch.rank >= sum(ranks) or len(ranks) < 2:
            continue
        groups = join_silos(over_gloo(store, launch.rank), name, launch.rank, ranks, False)
        silo, inside = groups.place
        part = federation[silo][inside]
        for number, rule in enumerate(RULES):
            first = torch.from_numpy(part.take(start(number, ELEMENTS)))
            arguments = (first, part.segments, SHAPES, rule, silo, True)
            alone, built = NamedBodyExchange(groups.silo, *arguments), NamedBodyExchange(groups.wide, *arguments)
            for exchange in (alone, built):
                local = part.take(local_body(number, 0, silo, 0, ELEMENTS))
                exchange.add(torch.from_numpy(local))
            joined = alone.among(groups.wide)
            alone.commit(joined.prepare(len(ranks)))
            built.finish(len(ranks))
            same = _same(alone, built)
            if silo == 0:
                for segment in part.segments:
                    alone.value[segment.place] = 7
                    if alone.momentum is not None:
                        alone.momentum[segment.place] = 7
            kept = _copy(alone)
            handed = alone.among(groups.wide).hand_over(len(ranks) - 1)
            same = same and _same(alone, kept)
            alone.accept(handed)
            seen[f"{name}-{number}"] = same and _same(alone, built)
    return seen


def test_a_named_exchange_among_others_is_one_built_there() -> None:
    seen: dict[str, bool] = {}
    for of_rank in run_ranks(4, _named):
        assert all(of_rank.values()), of_rank
        seen |= of_rank
    assert seen
