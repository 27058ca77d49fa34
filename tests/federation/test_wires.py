"""The outer exchange over fp32, bf16 and int8 against numpy: the same bits on every silo, with what is owed.

`n` elements, `S` silos.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dept.common.segments import Segment
from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.federation.buckets import Ring
from megatron_dept.federation.communicator import Alone
from megatron_dept.federation.ledger import Ledger
from megatron_dept.federation.shares import Packing, Shares, exchange_bytes, ring_bytes
from megatron_dept.ops.wires import BLOCK, WIRES, Wire
from megatron_dept.topology.launch import Launch
from tests.federation.groups import join_groups
from tests.federation.outer_reference import (
    FEDAVG,
    NESTEROV,
    Case,
    busy_rounds,
    local_body,
    reference,
    start,
    wired_reference,
)
from tests.support.distributed import run_ranks

ONE_BLOCK, MANY = 1e-9, 32.0
"""MB of a bucket: a block of each share, so that many are under way; and more than any partition here has."""
WAYS = [(everyone, wire) for everyone in (False, True) for wire in WIRES]


def cases(silos: int) -> list[tuple[Case, float]]:
    """With their buckets: empty shares, ragged blocks and buckets, whole ones, a partition in many and in one."""
    sizes = [1, silos + 1, BLOCK - 1, silos * BLOCK, silos * 5 * BLOCK + 17]
    found = [(Case(size, NESTEROV, busy_rounds(silos)), ONE_BLOCK) for size in sizes]
    return [*found, (found[-1][0], MANY), (Case(777, FEDAVG, busy_rounds(silos)), ONE_BLOCK)]


def _history(exchange: BodyExchange, ledger: Ledger, number: int, case: Case, silo: int) -> list[dict[str, Any]]:
    seen = []
    for round, counts in enumerate(case.rounds):
        for source in range(counts[silo]):
            exchange.add(torch.from_numpy(local_body(number, round, silo, source, case.elements)))
        ledger.take()
        exchange.finish(sum(counts))
        tensors = {
            "value": exchange.value,
            "momentum": exchange.momentum,
            "owed": exchange.residual,
            "owed updates": exchange.update_residual,
        }
        copies = {name: None if tensor is None else tensor.numpy().copy() for name, tensor in tensors.items()}
        seen.append(copies | {"sent": sum(ledger.take().values())})
    return seen


def _run(launch: Launch, silos: int) -> dict[Any, Any]:
    groups, found = join_groups(launch, silos), {}
    for everyone, wire in WAYS:
        for number, (case, bucket_mb) in enumerate(cases(silos)):
            first = torch.from_numpy(start(number, case.elements))
            exchange = BodyExchange(groups.peers, first, case.rule, everyone, Packing(wire, bucket_mb))
            found[everyone, wire, number] = _history(exchange, groups.ledger, number, case, groups.place[0])
    return found


Seen = tuple[int, list[dict[Any, Any]]]


@pytest.fixture(scope="module", params=[2, 3], ids="{} silos".format)
def seen(request: pytest.FixtureRequest) -> Seen:
    return request.param, run_ranks(request.param, _run, request.param)


@pytest.mark.parametrize(("everyone", "wire"), WAYS)
def test_every_wire_is_numpys_to_the_bit_with_what_it_owes(seen: Seen, everyone: bool, wire: Wire) -> None:
    """Several rounds, of several sources a silo, of none, of silos without one: owed is paid in all of them."""
    silos, ranks = seen
    for number, (case, _) in enumerate(cases(silos)):
        expected = wired_reference(number, case, wire, everyone)
        share = -(-case.elements // silos)
        for silo, (round, want) in itertools.product(range(silos), enumerate(expected)):
            got, message = ranks[silo][everyone, wire, number][round], f"{case}, silo {silo}, round {round}"
            own = slice(silo * share, (silo + 1) * share)
            np.testing.assert_array_equal(got["value"], want.value, err_msg=message)
            if case.rule.momentum:
                kept = got["momentum"] if everyone else got["momentum"][: len(want.momentum[own])]
                np.testing.assert_array_equal(kept, want.momentum if everyone else want.momentum[own], err_msg=message)
            if wire == "int8":
                np.testing.assert_array_equal(got["owed"], want.owed[silo], err_msg=message)
                assert got["owed"].any() == bool(want.owed[silo].any())
            if wire == "int8" and not everyone:
                owed = got["owed updates"][: len(want.owed_updates[own])]
                np.testing.assert_array_equal(owed, want.owed_updates[own], err_msg=message)


@pytest.mark.parametrize(("everyone", "wire"), WAYS)
def test_bytes_are_what_the_formula_says(seen: Seen, everyone: bool, wire: Wire) -> None:
    silos, ranks = seen
    for silo, rank in enumerate(ranks):
        for number, (case, _) in enumerate(cases(silos)):
            expected = exchange_bytes(case.elements, silos, silo, wire)
            for counts, got in zip(case.rounds, rank[everyone, wire, number], strict=True):
                assert got["sent"] == (expected if sum(counts) else 0)


def test_the_formula_by_hand() -> None:
    """1,000 elements of 3 silos: shares of 334, 334 and 332. int8: a byte each, two scales of four bytes a share."""
    assert exchange_bytes(1000, 3, 0) == 4 * (334 + 332 + 2 * 334)
    assert exchange_bytes(1000, 3, 2, "bf16") == 2 * (334 + 334 + 2 * 332)
    assert exchange_bytes(1000, 3, 2, "int8") == 2 * (336 + 8) + 2 * (332 + 8)
    assert exchange_bytes(2, 3, 2) == 4 * 2, "whoever owns nothing sends its deltas alone"
    assert exchange_bytes(5, 1, 0) == 0


def test_buffers_are_bounded_by_buckets_not_by_the_partition() -> None:
    for wire in WIRES:
        sizes = {ring_bytes(Shares.cut(partition, 4, 1.0), wire) for partition in (10**6, 10**7, 10**9)}
        assert len(sizes) == 1 and sizes.pop() <= 3 * 2 * 1_010_000
    shares = Shares.cut(1000, 2, 1.0)
    assert ring_bytes(shares, "fp32") == 2 * 2 * 4 * 500, "a small partition is one bucket"
    assert Ring(shares, "int8", torch.device("cpu"))._flat.numel() == ring_bytes(shares, "int8")


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("everyone", [False, True])
def test_alone_every_wire_is_fp32(wire: Wire, everyone: bool) -> None:
    """Nothing travels: nothing is rounded."""
    case = Case(700, NESTEROV, ((2,), (1,)))
    exchange = BodyExchange(Alone(), torch.from_numpy(start(0, 700)), NESTEROV, everyone, Packing(wire, ONE_BLOCK))
    for got, want in zip(_history(exchange, Ledger(), 0, case, 0), reference(0, case), strict=True):
        np.testing.assert_array_equal(got["value"], want[0])


def test_a_silo_left_alone_pays_what_its_wire_owed() -> None:
    """The mean then has the delta and all that was owed; a step that is not taken leaves the debt as it was."""
    exchange = BodyExchange(Alone(), torch.zeros(600), FEDAVG, True, Packing("int8"))
    assert exchange.residual is not None
    exchange.residual.fill_(0.25)
    exchange.add(torch.full((600,), -1.0))
    prepared = exchange.prepare(1)
    assert prepared is not None and bool((prepared.mean == 1.25).all()) and bool((exchange.residual == 0.25).all())
    exchange.commit(prepared)
    assert bool((exchange.value == -1.25).all()) and not exchange.residual.any()


def _summed_on_the_way(launch: Launch) -> list[bool]:
    """gloo's reduce-scatter in place of NCCL's: of two silos the order of the sum makes no difference."""
    groups, same = join_groups(launch, 2), []
    for elements in (1, 1000, 2 * BLOCK * 3, 4001):
        case, results = Case(elements, NESTEROV, busy_rounds(2)), []
        for summed in (False, True):
            groups.peers.sums_on_the_way = lambda device, summed=summed: summed  # type: ignore[method-assign,misc]
            first = torch.from_numpy(start(0, elements))
            exchange = BodyExchange(groups.peers, first, NESTEROV, False, Packing("fp32", ONE_BLOCK))
            results.append(_history(exchange, groups.ledger, 0, case, groups.place[0]))
        for left, right in zip(*results, strict=True):
            same.append(np.array_equal(left["value"], right["value"]) and left["sent"] == right["sent"])
    return same


def test_what_is_summed_on_the_way_is_the_same_of_two_silos_and_costs_the_same() -> None:
    for same in run_ranks(2, _summed_on_the_way):
        assert len(same) == 20 and all(same)


def _prepared_twice(launch: Launch, wire: Wire) -> bool:
    groups = join_groups(launch, 2)
    exchange = BodyExchange(groups.peers, torch.from_numpy(start(0, 1500)), NESTEROV, True, Packing(wire, ONE_BLOCK))
    for round in range(2):
        exchange.add(torch.from_numpy(local_body(0, round, launch.rank, 0, 1500)))
        kept = [tensor.clone() for tensor in (exchange.value, exchange.delta, exchange.residual) if tensor is not None]
        first, second = exchange.prepare(2), exchange.prepare(2)
        assert first is not None and second is not None and torch.equal(first.mean, second.mean)
        now = [tensor for tensor in (exchange.value, exchange.delta, exchange.residual) if tensor is not None]
        assert all(torch.equal(before, after) for before, after in zip(kept, now, strict=True))
        exchange.commit(second)
    return exchange.residual is None or bool(exchange.residual.any())


@pytest.mark.parametrize("wire", WIRES)
def test_prepare_changes_nothing_not_even_what_is_owed(wire: Wire) -> None:
    assert run_ranks(2, _prepared_twice, wire) == [True, True]


def test_what_is_owed_has_names() -> None:
    """A silo's deltas over its whole partition, updates of the share it owns."""
    exchange = BodyExchange(Alone(), torch.zeros(10), FEDAVG, True, Packing("int8"))
    segments = [Segment("a", 0, 4, 0), Segment("b", 0, 6, 4)]
    (owed,) = exchange.residuals(segments)
    assert owed.of_silo and owed.segments == segments and owed.tensor is exchange.residual
    assert BodyExchange(Alone(), torch.zeros(10), FEDAVG, True, Packing("bf16")).residuals(segments) == []
