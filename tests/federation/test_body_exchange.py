"""The outer exchange of the body against numpy: the same bits, whatever the silos.

The reference keeps the whole partition in one place. `n` elements, `S` silos.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dept.common.seeding import generator_for
from megatron_dept.dept.outer import OuterRule
from megatron_dept.federation.body_exchange import BodyExchange, share_size
from megatron_dept.topology.launch import Launch
from tests.federation.groups import join_groups
from tests.support.distributed import run_ranks

FEDAVG = OuterRule("fedavg", 1.0, 0.0)
SLOW_FEDAVG = OuterRule("fedavg", 0.3, 0.0)
NESTEROV = OuterRule("nesterov", 0.7, 0.9)


@dataclass(frozen=True)
class Case:
    """`rounds[t][s]`: sources that silo s trains and contributes in round t."""

    elements: int
    rule: OuterRule
    rounds: tuple[tuple[int, ...], ...]


def cases(silos: int) -> list[Case]:
    """Every size and schedule that has a way to go wrong on so many silos."""
    one_each = (1,) * silos
    several = tuple(2 + silo % 2 for silo in range(silos))
    one_dropped = (*one_each[:-1], 0)
    nobody = (0,) * silos
    sizes = [1, 2, silos, 2 * silos, 3 * silos + 1, 1000, 1001]
    plain = [Case(size, rule, (one_each, one_each)) for size in sizes for rule in (FEDAVG, NESTEROV)]
    return plain + [
        Case(101, rule, (several, one_each, nobody, one_dropped, several)) for rule in (FEDAVG, SLOW_FEDAVG, NESTEROV)
    ]


def start(case: int, elements: int) -> np.ndarray:
    return generator_for("global", case).standard_normal(elements).astype(np.float32)


def local_body(case: int, round: int, silo: int, source: int, elements: int) -> np.ndarray:
    """What a local phase ends with: nothing that depends on where it began, so a wrong start cannot hide."""
    return generator_for("local", case, round, silo, source).standard_normal(elements).astype(np.float32)


def _exchange(launch: Launch, silos: int) -> list[list[tuple[np.ndarray, np.ndarray | None]]]:
    """Per case and round: the partition and this silo's share of the momentum after the outer step."""
    groups = join_groups(launch, silos)
    silo = groups.place[0]
    results = []
    for number, case in enumerate(cases(silos)):
        exchange = BodyExchange(groups.peers, torch.from_numpy(start(number, case.elements)), case.rule)
        history = []
        for round, counts in enumerate(case.rounds):
            for source in range(counts[silo]):
                exchange.add(torch.from_numpy(local_body(number, round, silo, source, case.elements)))
            exchange.finish(sum(counts))
            momentum = None if exchange.momentum is None else exchange.momentum.numpy().copy()
            assert not exchange.delta.any(), "a round's delta must not reach the next"
            history.append((exchange.value.numpy().copy(), momentum))
        results.append(history)
    return results


def reference(number: int, case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """FedAvg and Nesterov (torch.optim.SGD's) in numpy, fp32 with one rounding an operation, sums in silo order."""
    value = start(number, case.elements)
    momentum = np.zeros_like(value)
    history = []
    for round, counts in enumerate(case.rounds):
        per_silo = []
        for silo, count in enumerate(counts):
            delta = np.zeros_like(value)
            for source in range(count):
                delta -= local_body(number, round, silo, source, case.elements) - value
            per_silo.append(delta)
        if sum(counts):
            total = per_silo[0]
            for delta in per_silo[1:]:
                total = total + delta
            mean = total / np.float32(sum(counts))
            rate, mu = np.float32(case.rule.learning_rate), np.float32(case.rule.momentum)
            momentum = mu * momentum + mean
            update = mean + mu * momentum if case.rule.momentum else mean
            value = value - rate * update
        history.append((value, momentum))
    return history


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{} silos".format)
def exchanged(request: pytest.FixtureRequest) -> tuple[int, list[Any]]:
    return request.param, run_ranks(request.param, _exchange, request.param)


def test_body_exchange_is_numpys_to_the_bit_on_every_silo(exchanged: tuple[int, list[Any]]) -> None:
    silos, ranks = exchanged
    for number, case in enumerate(cases(silos)):
        expected = reference(number, case)
        for silo in range(silos):
            for round, (value, _) in enumerate(ranks[silo][number]):
                np.testing.assert_array_equal(value, expected[round][0], err_msg=f"{case}, silo {silo}, round {round}")


def test_momentum_shares_laid_end_to_end_are_the_whole_momentum(exchanged: tuple[int, list[Any]]) -> None:
    silos, ranks = exchanged
    for number, case in enumerate(cases(silos)):
        for round, (_, momentum) in enumerate(reference(number, case)):
            shares = [ranks[silo][number][round][1] for silo in range(silos)]
            if case.rule.optimizer == "fedavg":
                assert shares == [None] * silos
                continue
            assert all(len(share) == share_size(case.elements, silos) for share in shares)
            np.testing.assert_array_equal(np.concatenate(shares)[: case.elements], momentum)


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
