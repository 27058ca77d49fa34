"""The exchange by names among silos cut differently, against numpy: the same bits, each element once, no whole body."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dept.common.errors import FederationError
from megatron_dept.common.segments import Segment
from megatron_dept.dept.outer import OuterRule
from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.federation.exchange import Exchange
from megatron_dept.federation.named_exchange import NamedBodyExchange
from megatron_dept.federation.named_plan import CanonicalOrder, named_exchange_bytes
from megatron_dept.topology.launch import Launch
from tests.federation.cuts import ELEMENTS, FEDERATIONS, SHAPES, Part, canonical
from tests.federation.groups import Connect, Groups, join_silos, meet, over_gloo
from tests.federation.outer_reference import (
    FEDAVG,
    NESTEROV,
    SLOW_FEDAVG,
    Case,
    busy_rounds,
    local_body,
    reference,
    start,
)
from tests.support.distributed import run_ranks

RULES = (FEDAVG, SLOW_FEDAVG, NESTEROV)
RANKS = 4


def cases(silos: int) -> list[Case]:
    return [Case(ELEMENTS, rule, busy_rounds(silos)) for rule in RULES]


class LargestMade(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def _seen(exchange: Exchange, segments: list[Segment]) -> dict[str, Any]:
    def copied(tensor: torch.Tensor | None) -> np.ndarray | None:
        return None if tensor is None else tensor.numpy().copy()

    return {
        "value": copied(exchange.value),
        "momentum": copied(exchange.momentum),
        "owned": exchange.owned(segments),
        "owned value": copied(exchange.owned_value),
        "owned momentum": copied(exchange.owned_momentum),
        "kept": exchange.momentum_segments(segments),
    }


def _add_round(exchange: Exchange, part: Part, number: int, case: Case, round: int, silo: int) -> None:
    for source in range(case.rounds[round][silo]):
        local = part.take(local_body(number, round, silo, source, case.elements))
        exchange.add(torch.from_numpy(local))


def _history(
    groups: Groups, part: Part, number: int, case: Case, build: Callable[..., Exchange], everyone: bool
) -> list[dict[str, Any]]:
    """What a rank holds after each round; from the third on in an exchange made of the first's state."""
    silo = groups.place[0]
    exchange = build(torch.from_numpy(part.take(start(number, case.elements))), case.rule, everyone)
    founding = groups.ledger.take()
    history = []
    for round, counts in enumerate(case.rounds):
        if round == 2:
            old, exchange = exchange, build(torch.zeros(part.size), case.rule, everyone)
            exchange.value.copy_(old.value)
            if exchange.momentum is not None and old.momentum is not None:
                exchange.momentum.copy_(old.momentum)
            exchange.adopt()
        _add_round(exchange, part, number, case, round, silo)
        groups.ledger.take()
        groups.ledger.trace = []
        with LargestMade() as largest:
            if everyone and round % 2 == 0:
                before = exchange.delta.clone(), exchange.value.clone()
                mean = exchange.prepare(sum(counts))
                again = exchange.prepare(sum(counts))
                assert (mean is None) == (again is None) and (mean is None or torch.equal(mean.mean, again.mean))
                assert torch.equal(before[0], exchange.delta) and torch.equal(before[1], exchange.value)
                sent = {key: count // 2 for key, count in groups.ledger.take().items()}
                exchange.commit(mean)
                assert not groups.ledger.take(), "commit must not talk"
            else:
                exchange.finish(sum(counts))
                sent = groups.ledger.take()
        assert not exchange.delta.any(), "a round's delta must not reach the next"
        extra = {"sent": sent, "founding": founding, "largest": largest.elements, "trace": groups.ledger.trace}
        groups.ledger.trace = None
        history.append(_seen(exchange, part.segments) | extra)
    return history


def _run(launch: Launch) -> dict[str, Any]:
    """Every federation in turn, on as many of the ranks as it has: by federation, (everyone, case) and round."""
    connect = over_gloo(meet(launch), launch.rank)
    results: dict[str, Any] = {}
    for name, silos in FEDERATIONS.items():
        sizes = tuple(len(parts) for parts in silos)
        if launch.rank >= sum(sizes):
            continue
        groups = join_silos(connect, name, launch.rank, sizes, among_peers=False)
        silo, inside = groups.place
        part = silos[silo][inside]

        def by_name(
            partition: torch.Tensor,
            rule: OuterRule,
            everyone: bool,
            groups: Groups = groups,
            part: Part = part,
            silo: int = silo,
        ) -> Exchange:
            return NamedBodyExchange(groups.wide, partition, part.segments, SHAPES, rule, silo, everyone)

        results[name] = {
            (everyone, number): _history(groups, part, number, case, by_name, everyone)
            for everyone in (False, True)
            for number, case in enumerate(cases(len(silos)))
        }
        if name == "halves + halves":
            equal = join_silos(connect, f"{name} of peers", launch.rank, sizes, among_peers=True)

            def among_peers(
                partition: torch.Tensor, rule: OuterRule, everyone: bool, equal: Groups = equal
            ) -> Exchange:
                return BodyExchange(equal.peers, partition, rule, everyone)

            case = cases(2)[2]
            results["peers"] = _history(equal, part, 2, case, among_peers, False)
    results["faults"] = _faults(launch, connect)
    return results


FAULTS: dict[str, tuple[Callable[[list[Segment]], list[Segment]], str]] = {
    "missing": (lambda own: [s for s in own if s.name != "norm"], "element 0 of 'norm' is held by none of silo 1's"),
    "end missing": (
        lambda own: [dataclasses.replace(s, stop=s.stop - 2) if s.name == "w" else s for s in own],
        "element 31 of 'w' is held by none of silo 1's",
    ),
    "copy only": (
        lambda own: [dataclasses.replace(s, primary=s.name != "kv") for s in own],
        "element 0 of 'kv' is held by none of silo 1's",
    ),
    "twice": (
        lambda own: [*own, Segment("kv", 3, 5, 0)],
        "element 3 of 'kv' is held twice as the primary copy of silo 1's",
    ),
    "unknown": (lambda own: [*own, Segment("bias", 0, 4, 0)], "silo 1: elements 0 to 4 of 'bias' are not in the body"),
    "too long": (
        lambda own: [*own, Segment("a", 8, 13, 0)],
        "elements 8 to 13 of 'a' are not in the body, where it has 12",
    ),
    "other body": (lambda own: own, "silo 1 has another body than silo 0"),
}


def _faults(launch: Launch, connect: Connect) -> dict[str, str]:
    """What rank 1, alone in silo 1, does wrong, and what each of two ranks then says."""
    if launch.rank > 1:
        return {}
    groups = join_silos(connect, "faults", launch.rank, (1, 1), among_peers=False)
    part = FEDERATIONS["whole + tensor"][0][0]
    said = {}
    for name, (spoil, _) in FAULTS.items():
        segments = spoil(part.segments) if launch.rank else part.segments
        shapes = SHAPES | {"a": (3, 4)} if launch.rank and name == "other body" else SHAPES
        try:
            NamedBodyExchange(groups.wide, torch.zeros(part.size), segments, shapes, FEDAVG, launch.rank)
            said[name] = "nothing"
        except FederationError as error:
            said[name] = str(error)
    return said


@pytest.fixture(scope="module")
def ran() -> list[dict[str, Any]]:
    return run_ranks(RANKS, _run)


EVERYONE = pytest.mark.parametrize("everyone", [False, True], ids=["owners keep momentum", "everyone keeps momentum"])
FEDERATION = pytest.mark.parametrize("name", FEDERATIONS)


def ranks_of(name: str) -> list[tuple[int, int, Part]]:
    """(rank, silo, part) of a federation's ranks."""
    parts = [(silo, part) for silo, parts in enumerate(FEDERATIONS[name]) for part in parts]
    return [(rank, silo, part) for rank, (silo, part) in enumerate(parts)]


@EVERYONE
@FEDERATION
def test_every_rank_has_numpys_bits_copies_and_padding_too(
    ran: list[dict[str, Any]], name: str, everyone: bool
) -> None:
    for number, case in enumerate(cases(len(FEDERATIONS[name]))):
        for round, (value, momentum) in enumerate(reference(number, case)):
            for rank, _, part in ranks_of(name):
                seen = ran[rank][name][everyone, number][round]
                np.testing.assert_array_equal(seen["value"], part.take(value), err_msg=f"{case}, {rank}, {round}")
                if everyone and case.rule.momentum:
                    held = part.take(momentum)
                    for segment in part.segments:
                        np.testing.assert_array_equal(seen["momentum"][segment.place], held[segment.place])


@EVERYONE
@FEDERATION
def test_what_ranks_own_is_the_whole_body_by_name_once(ran: list[dict[str, Any]], name: str, everyone: bool) -> None:
    for number, case in enumerate(cases(len(FEDERATIONS[name]))):
        for round, (value, momentum) in enumerate(reference(number, case)):
            whole, whole_momentum = np.full(ELEMENTS, np.nan), np.full(ELEMENTS, np.nan)
            for rank, _, part in ranks_of(name):
                seen = ran[rank][name][everyone, number][round]
                assert seen["kept"] == (part.segments if everyone else seen["owned"])
                assert (seen["momentum"] is None) == (case.rule.momentum == 0)
                for segment in seen["owned"]:
                    assert segment.primary and np.isnan(whole[canonical(segment)]).all(), "an element is owned once"
                    whole[canonical(segment)] = seen["owned value"][segment.place]
                    if seen["owned momentum"] is not None:
                        whole_momentum[canonical(segment)] = seen["owned momentum"][segment.place]
            np.testing.assert_array_equal(whole, value)
            if case.rule.momentum:
                np.testing.assert_array_equal(whole_momentum, momentum)


def test_equal_silos_get_the_bits_of_the_exchange_among_peers(ran: list[dict[str, Any]]) -> None:
    for rank in range(4):
        for by_name, among_peers in zip(ran[rank]["halves + halves"][False, 2], ran[rank]["peers"], strict=True):
            assert by_name["value"].tobytes() == among_peers["value"].tobytes()


def moved_by_hand(name: str) -> list[dict[str, int]]:
    """Bytes each rank sends in a round, element by element."""
    ranks = ranks_of(name)
    share = -(-ELEMENTS // len(ranks))
    sent = [{"federation": 0, "silo": 0} for _ in ranks]
    for holder, silo, part in ranks:
        for segment in part.segments:
            place = canonical(segment)
            for element in range(place.start, place.stop):
                owner = element // share
                if owner == holder:
                    continue
                link = "silo" if ranks[owner][1] == silo else "federation"
                sent[owner][link] += 4
                sent[holder][link] += 4 if segment.primary else 0
    return sent


@EVERYONE
@FEDERATION
def test_each_element_travels_once_to_its_owner_and_back_to_its_holders(
    ran: list[dict[str, Any]], name: str, everyone: bool
) -> None:
    order = CanonicalOrder(SHAPES)
    ranks = ranks_of(name)
    by_hand = moved_by_hand(name)
    holdings = [order.intervals(part.segments) for _, _, part in ranks]
    assert named_exchange_bytes(order, holdings, [silo for _, silo, _ in ranks]) == by_hand
    for number, case in enumerate(cases(len(FEDERATIONS[name]))):
        for rank, expected in enumerate(by_hand):
            for counts, seen in zip(case.rounds, ran[rank][name][everyone, number], strict=True):
                for scope in ("federation", "silo"):
                    assert seen["sent"].get(f"{scope}/body", 0) == (expected[scope] if sum(counts) else 0)
                assert {key for key, count in seen["sent"].items() if count} <= {"federation/body", "silo/body"}
                assert {key.split("/")[1] for key in seen["founding"]} <= {"control", "parameter"}


def test_collectives_of_a_round_are_traced_with_the_ranks_they_join(ran: list[dict[str, Any]]) -> None:
    for rank in range(4):
        for counts, seen in zip(busy_rounds(2), ran[rank]["whole + tensor"][False, 0], strict=True):
            traced = [(t.scope, t.kind, t.operation, t.members) for t in seen["trace"]]
            one = ("federation", "body", "all_to_all", (0, 1, 2, 3))
            assert traced == ([one, one] if sum(counts) else [])


def test_no_rank_makes_the_whole_body(ran: list[dict[str, Any]]) -> None:
    """Of 4 ranks in 2 silos an owner receives 2 shares and sends what is held of one; a partition is what it is."""
    share = -(-ELEMENTS // 4)
    for name in ("whole + tensor", "halves + halves"):
        held = [0] * 4
        for _, _, part in ranks_of(name):
            for segment in part.segments:
                for element in range(*canonical(segment).indices(ELEMENTS)):
                    held[element // share] += 1
        for rank, _, part in ranks_of(name):
            allowed = max(part.size, 2 * share, held[rank])
            assert allowed < ELEMENTS or part.size >= ELEMENTS
            for everyone in (False, True):
                for seen in ran[rank][name][everyone, 2]:
                    assert 0 < seen["largest"] <= allowed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_silo_without_the_whole_body_is_named_on_every_rank(ran: list[dict[str, Any]], fault: str) -> None:
    for rank in range(2):
        assert FAULTS[fault][1] in ran[rank]["faults"][fault]
        assert "\n" not in ran[rank]["faults"][fault]
