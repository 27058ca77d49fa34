"""The outer exchange of the body against numpy: the same bits, whatever the silos.

The reference keeps the whole partition in one place. `n` elements, `S` silos.
"""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_dept.common.segments import Segment
from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.federation.shares import exchange_bytes, share_size
from megatron_dept.topology.launch import Launch
from tests.federation.groups import join_groups
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


def cases(silos: int) -> list[Case]:
    """Every size and schedule that has a way to go wrong on so many silos."""
    one_each = (1,) * silos
    sizes = [1, 2, silos, 2 * silos, 3 * silos + 1, 1000, 1001]
    plain = [Case(size, rule, (one_each, one_each)) for size in sizes for rule in (FEDAVG, NESTEROV)]
    return plain + [Case(101, rule, busy_rounds(silos)) for rule in (FEDAVG, SLOW_FEDAVG, NESTEROV)]


Round = dict[str, Any]
"""What an exchange holds after a round, and the bytes it cost."""


def _exchange(launch: Launch, silos: int) -> dict[bool, list[list[Round]]]:
    """Per way of keeping momentum, case and round: what this rank holds after the outer step."""
    groups = join_groups(launch, silos)
    silo = groups.place[0]
    results: dict[bool, list[list[Round]]] = {False: [], True: []}
    for everyone, histories in results.items():
        for number, case in enumerate(cases(silos)):
            exchange = BodyExchange(groups.peers, torch.from_numpy(start(number, case.elements)), case.rule, everyone)
            history: list[Round] = []
            for round, counts in enumerate(case.rounds):
                for source in range(counts[silo]):
                    exchange.add(torch.from_numpy(local_body(number, round, silo, source, case.elements)))
                groups.ledger.take()
                if everyone and round % 2 == 0:
                    assert_prepare_changes_nothing(exchange, sum(counts))
                    groups.ledger.take()
                    mean = exchange.prepare(sum(counts))
                    sent = groups.ledger.take()
                    exchange.commit(mean)
                    assert not groups.ledger.take(), "commit must not talk"
                else:
                    exchange.finish(sum(counts))
                    sent = groups.ledger.take()
                assert not exchange.delta.any(), "a round's delta must not reach the next"
                segments = [Segment("all", 0, case.elements, 0, primary=False)]
                kept = exchange.momentum_segments(segments)
                history.append(
                    {
                        "value": exchange.value.numpy().copy(),
                        "momentum": None if exchange.momentum is None else exchange.momentum.numpy().copy(),
                        "owned": exchange.owned(segments),
                        "owned value": exchange.owned_value.numpy().copy(),
                        "owned momentum": None
                        if exchange.owned_momentum is None
                        else exchange.owned_momentum.numpy().copy(),
                        "kept": kept,
                        "sent": sent,
                    }
                )
            histories.append(history)
    return results


def assert_prepare_changes_nothing(exchange: Any, sources: int) -> None:
    """Twice the same answer, and every bit of the state as it was: a round that fails half-way can be held again."""
    tensors = [tensor for tensor in (exchange.value, exchange.delta, exchange.momentum) if tensor is not None]
    before = [tensor.clone() for tensor in tensors]
    first, second = exchange.prepare(sources), exchange.prepare(sources)
    assert (first is None) == (second is None) == (sources == 0)
    assert first is None or torch.equal(first.mean, second.mean)
    assert all(torch.equal(left, right) for left, right in zip(before, tensors, strict=True))


Exchanged = tuple[int, list[dict[bool, list[list[Round]]]]]


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{} silos".format)
def exchanged(request: pytest.FixtureRequest) -> Exchanged:
    return request.param, run_ranks(request.param, _exchange, request.param)


@pytest.mark.parametrize("everyone", [False, True], ids=["shares keep momentum", "everyone keeps momentum"])
def test_body_exchange_is_numpys_to_the_bit_on_every_silo(exchanged: Exchanged, everyone: bool) -> None:
    silos, ranks = exchanged
    for number, case in enumerate(cases(silos)):
        expected = reference(number, case)
        for silo in range(silos):
            for round, seen in enumerate(ranks[silo][everyone][number]):
                message = f"{case}, silo {silo}, round {round}"
                np.testing.assert_array_equal(seen["value"], expected[round][0], err_msg=message)
                if everyone and case.rule.momentum:
                    np.testing.assert_array_equal(seen["momentum"], expected[round][1], err_msg=message)


def test_momentum_shares_laid_end_to_end_are_the_whole_momentum(exchanged: Exchanged) -> None:
    silos, ranks = exchanged
    for number, case in enumerate(cases(silos)):
        for round, (_, momentum) in enumerate(reference(number, case)):
            shares = [ranks[silo][False][number][round]["momentum"] for silo in range(silos)]
            if case.rule.optimizer == "fedavg":
                assert shares == [None] * silos
                continue
            assert all(len(share) == share_size(case.elements, silos) for share in shares)
            np.testing.assert_array_equal(np.concatenate(shares)[: case.elements], momentum)


@pytest.mark.parametrize("everyone", [False, True], ids=["shares keep momentum", "everyone keeps momentum"])
def test_what_silos_own_is_the_whole_by_name_once(exchanged: Exchanged, everyone: bool) -> None:
    silos, ranks = exchanged
    for number, case in enumerate(cases(silos)):
        for round, (value, momentum) in enumerate(reference(number, case)):
            whole, whole_momentum = np.full(case.elements, np.nan), np.full(case.elements, np.nan)
            for silo in range(silos):
                seen = ranks[silo][everyone][number][round]
                assert seen["kept"] == ([Segment("all", 0, case.elements, 0, False)] if everyone else seen["owned"])
                for segment in seen["owned"]:
                    assert segment.name == "all" and not segment.primary, "copies stay copies"
                    place = slice(segment.start, segment.stop)
                    assert np.isnan(whole[place]).all(), "an element is owned once"
                    whole[place] = seen["owned value"][segment.place]
                    if seen["owned momentum"] is not None:
                        whole_momentum[place] = seen["owned momentum"][segment.place]
            np.testing.assert_array_equal(whole, value)
            if case.rule.momentum:
                np.testing.assert_array_equal(whole_momentum, momentum)


def test_either_way_costs_what_the_formula_says(exchanged: Exchanged) -> None:
    silos, ranks = exchanged
    for number, case in enumerate(cases(silos)):
        for silo, rank in enumerate(ranks):
            for everyone in (False, True):
                for counts, seen in zip(case.rounds, rank[everyone][number], strict=True):
                    expected = exchange_bytes(case.elements, silos, silo) if sum(counts) else 0
                    assert sum(seen["sent"].values()) == expected
                    assert set(seen["sent"]) <= {"federation/body"}


def test_the_reference_is_local_sgd_as_written_in_the_papers() -> None:
    """The reference itself, in exact arithmetic: FedAvg is the plain mean of the local bodies.

    fp32 rounds a handful of times on values of size 3: 2e-6 is some ten such roundings, a wrong mean is off by 1.
    """
    case = Case(50, FEDAVG, ((2, 1), (1, 1)))
    locals_ = [local_body(7, 1, silo, 0, 50).astype(np.float64) for silo in range(2)]
    np.testing.assert_allclose(reference(7, case)[1][0], np.mean(locals_, axis=0), rtol=0, atol=2e-6)


def _owns(launch: Launch, silos: int) -> list[tuple[int, int]]:
    groups = join_groups(launch, silos)
    owned = []
    for elements in range(1, 12):
        own = BodyExchange(groups.peers, torch.zeros(elements), FEDAVG).own
        owned.append((own.start, own.stop))
    return owned


def test_shares_cover_a_partition_once() -> None:
    owned = run_ranks(3, _owns, 3)
    for index, elements in enumerate(range(1, 12)):
        covered = [element for rank in range(3) for element in range(*owned[rank][index])]
        assert covered == list(range(elements))
