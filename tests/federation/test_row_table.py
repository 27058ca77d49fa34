"""The row table against numpy on several layouts of silos x data: the same bits; only rows asked for cross the wire.

The reference keeps the whole table in one place. `V` rows, `h` hidden, `S` silos, `D` data ranks of each.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dept.common.seeding import generator_for
from megatron_dept.dept.outer import OuterRule
from megatron_dept.federation.row_table import RowTable
from megatron_dept.topology.launch import Launch
from tests.federation.groups import join_groups
from tests.support.distributed import run_ranks

HIDDEN = 3
FEDAVG = OuterRule("fedavg", 1.0, 0.0)
NESTEROV = OuterRule("nesterov", 0.7, 0.9)
LAYOUTS = [(1, 1), (2, 1), (2, 2), (3, 1)]

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """A silo's turn in a slot: the ids of its source; `dropped`: gathered, but its deltas are left out."""

    ids: Ids
    dropped: bool = False


Slot = tuple[Turn | None, ...]
"""One turn a silo; None is an idle silo."""


@dataclass(frozen=True)
class Case:
    total_rows: int
    rule: OuterRule
    rounds: tuple[tuple[Slot, ...], ...]


def cases(silos: int) -> list[Case]:
    """Overlapping, disjoint, equal, single, no ids; idle silos; many slots; left-out sources; fewer rows than ranks."""
    rows = 23
    everything = tuple(range(rows))

    def random_ids(meaning: int) -> Ids:
        generator = generator_for("ids", silos, meaning)
        return tuple(sorted(generator.choice(rows, size=generator.integers(1, rows), replace=False).tolist()))

    glob: Slot = tuple(Turn(everything) for _ in range(silos))
    disjoint: Slot = tuple(Turn(everything[silo::silos]) for silo in range(silos))
    overlapping: Slot = tuple(Turn(everything[silo * 4 : silo * 4 + 9]) for silo in range(silos))
    ragged: Slot = tuple(Turn(random_ids(silo)) for silo in range(silos))
    one_row: Slot = tuple(Turn((rows - 1,)) for _ in range(silos))
    no_ids: Slot = (Turn(()), *overlapping[1:])
    one_dropped: Slot = (*ragged[:-1], Turn(ragged[-1].ids, dropped=True))  # type: ignore[union-attr]
    last_idle: Slot = (*ragged[:-1], None) if silos > 1 else ragged
    first_idle: Slot = (None, *overlapping[1:])
    all_idle: Slot = (None,) * silos
    rounds = (
        (overlapping, last_idle),
        (disjoint,),
        (ragged, no_ids, one_row),
        (one_dropped, first_idle),
        (all_idle,),
        (one_row,),
        (glob, glob),
    )
    few = (tuple(Turn((0, 1)) for _ in range(silos)),)
    return [Case(rows, FEDAVG, rounds), Case(rows, NESTEROV, rounds), Case(2, NESTEROV, (few, few))]


def initial(case: int, rows: int) -> np.ndarray:
    return generator_for("table", case).standard_normal((rows, HIDDEN)).astype(np.float32)


def deltas(case: int, round: int, slot: int, silo: int, rows: int) -> np.ndarray:
    return generator_for("delta", case, round, slot, silo).standard_normal((rows, HIDDEN)).astype(np.float32)


@dataclass
class Report:
    """What one rank saw: each turn's gathered rows, bytes by scope, and after each round its rows and momentum."""

    gathered: list[np.ndarray]
    gather_bytes: list[dict[str, int]]
    scatter_bytes: list[dict[str, int]]
    first: int
    rows: list[np.ndarray]
    momentum: list[np.ndarray | None]
    made: tuple[int, int]


def _run_case(launch: Launch, groups: Any, number: int, case: Case) -> Report:
    silo = groups.place[0]
    table = initial(number, case.total_rows)
    made: list[tuple[int, int]] = []

    def initial_rows(start: int, stop: int) -> torch.Tensor:
        made.append((start, stop))
        return torch.from_numpy(table[start:stop].copy())

    rows = RowTable("embedding", case.total_rows, HIDDEN, groups.peers, groups.silo, case.rule, initial_rows)
    assert len(made) == 1, "initial rows are made once"
    report = Report([], [], [], rows.first, [], [], made[0])
    groups.ledger.take()
    for round, slots in enumerate(case.rounds):
        for index, slot in enumerate(slots):
            turn = slot[silo]
            ids = torch.tensor(turn.ids if turn else (), dtype=torch.int64)
            report.gathered.append(rows.gather(ids).numpy().copy())
            report.gather_bytes.append(groups.ledger.take())
            given = ids if turn and not turn.dropped else ids[:0]
            rows.accumulate(given, torch.from_numpy(deltas(number, round, index, silo, len(given))))
            report.scatter_bytes.append(groups.ledger.take())
        rows.apply()
        assert not rows.pending.sums.any() and not rows.pending.counts.any(), "a round must not reach the next"
        report.rows.append(rows.rows.numpy().copy())
        report.momentum.append(None if rows.momentum is None else rows.momentum.numpy().copy())
    return report


def _run(launch: Launch, silos: int, data: int) -> list[Report]:
    groups = join_groups(launch, silos, data)
    return [_run_case(launch, groups, number, case) for number, case in enumerate(cases(silos))]


@dataclass
class Expected:
    table: np.ndarray
    momentum: np.ndarray


def reference(number: int, case: Case) -> list[Expected]:
    """Per row: the mean of the deltas of those that hold it, then the outer step; fp32, sums by slot, then by silo."""
    table, momentum = initial(number, case.total_rows), np.zeros((case.total_rows, HIDDEN), np.float32)
    history = []
    for round, slots in enumerate(case.rounds):
        total = np.zeros_like(table)
        holders = np.zeros(case.total_rows, np.float32)
        for index, slot in enumerate(slots):
            for silo, turn in enumerate(slot):
                if turn is not None and not turn.dropped:
                    ids = list(turn.ids)
                    total[ids] += deltas(number, round, index, silo, len(ids))
                    holders[ids] += 1
        held = holders > 0
        mean = total[held] / holders[held, None]
        rate, mu = np.float32(case.rule.learning_rate), np.float32(case.rule.momentum)
        momentum[held] = mu * momentum[held] + mean
        update = mean + mu * momentum[held] if case.rule.momentum else mean
        table[held] -= rate * update
        history.append(Expected(table.copy(), momentum.copy()))
    return history


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: "{} silos x {}".format(*layout))
def ran(request: pytest.FixtureRequest) -> tuple[int, int, list[list[Report]]]:
    silos, data = request.param
    return silos, data, run_ranks(silos * data, _run, silos, data)


Ran = tuple[int, int, list[list[Report]]]


def whole(reports: list[Report], of: Any) -> np.ndarray:
    """All ranks' pieces in the order of their ids; each id must be owned exactly once."""
    pieces = sorted((report.first, of(report)) for report in reports if len(of(report)))
    at = 0
    for first, piece in pieces:
        assert first == at, "blocks must lie end to end"
        at += len(piece)
    return np.concatenate([piece for _, piece in pieces])


def test_rows_and_momentum_are_numpys_to_the_bit(ran: Ran) -> None:
    silos, _, ranks = ran
    for number, case in enumerate(cases(silos)):
        reports = [reports[number] for reports in ranks]
        for round, expected in enumerate(reference(number, case)):
            np.testing.assert_array_equal(whole(reports, lambda r, t=round: r.rows[t]), expected.table)
            if case.rule.momentum:
                np.testing.assert_array_equal(whole(reports, lambda r, t=round: r.momentum[t]), expected.momentum)
            else:
                assert all(report.momentum[round] is None for report in reports)


def test_every_data_rank_gathers_the_rows_as_they_stood_at_the_rounds_start(ran: Ran) -> None:
    silos, data, ranks = ran
    for number, case in enumerate(cases(silos)):
        starts = [initial(number, case.total_rows), *(after.table for after in reference(number, case))]
        for rank, reports in enumerate(ranks):
            gathered = iter(reports[number].gathered)
            for round, slots in enumerate(case.rounds):
                for slot in slots:
                    turn = slot[rank // data]
                    np.testing.assert_array_equal(next(gathered), starts[round][list(turn.ids) if turn else []])


def test_a_row_held_by_none_is_unchanged_to_the_bit(ran: Ran) -> None:
    """Implied by the reference; said again by itself, because it is the promise of TRIM."""
    silos, _, ranks = ran
    number, case = 1, cases(silos)[1]
    reports = [reports[number] for reports in ranks]
    before, momentum = initial(number, case.total_rows), np.zeros((case.total_rows, HIDDEN), np.float32)
    untouched = 0
    for round, slots in enumerate(case.rounds):
        held = {row for slot in slots for turn in slot if turn and not turn.dropped for row in turn.ids}
        idle = [row for row in range(case.total_rows) if row not in held]
        after, after_momentum = (
            whole(reports, lambda r, t=round: r.rows[t]),
            whole(reports, lambda r, t=round: r.momentum[t]),
        )
        np.testing.assert_array_equal(after[idle], before[idle])
        np.testing.assert_array_equal(after_momentum[idle], momentum[idle])
        assert (after[sorted(held)] != before[sorted(held)]).all()
        untouched += len(idle)
        before, momentum = after, after_momentum
    assert untouched > case.total_rows, "rounds must leave rows alone, among them rows with momentum"


def test_only_rows_asked_from_other_silos_are_charged(ran: Ran) -> None:
    """Between silos: rows asked outside x h x 4 bytes, to fetch and again to return; inside: to other data ranks."""
    silos, data, ranks = ran
    for number, case in enumerate(cases(silos)):
        block = -(-case.total_rows // (silos * data))
        turn_number = 0
        for slots in case.rounds:
            for slot in slots:
                fetched = returned = shared = 0
                for silo, turn in enumerate(slot):
                    if turn is None:
                        continue
                    outside = sum(row // block % silos != silo for row in turn.ids)
                    fetched += outside * HIDDEN * 4
                    returned += 0 if turn.dropped else outside * HIDDEN * 4
                    shared += len(turn.ids) * (data - 1) * HIDDEN * 4
                gathers = [reports[number].gather_bytes[turn_number] for reports in ranks]
                scatters = [reports[number].scatter_bytes[turn_number] for reports in ranks]
                assert sum(counts.get("federation/embedding", 0) for counts in gathers) == fetched
                assert sum(counts.get("silo/embedding", 0) for counts in gathers) == shared
                assert sum(counts.get("federation/embedding", 0) for counts in scatters) == returned
                assert sum(counts.get("silo/embedding", 0) for counts in scatters) == 0
                turn_number += 1


def test_a_rank_makes_and_keeps_its_own_block_alone(ran: Ran) -> None:
    silos, data, ranks = ran
    for number, case in enumerate(cases(silos)):
        most = -(-case.total_rows // (silos * data))
        assert sum(len(reports[number].rows[0]) for reports in ranks) == case.total_rows
        for reports in ranks:
            start, stop = reports[number].made
            assert start == reports[number].first and stop - start == len(reports[number].rows[0]) <= most


def _another_kind(launch: Launch) -> dict[str, int]:
    groups = join_groups(launch, silos=2)
    table = RowTable("position", 4, HIDDEN, groups.peers, groups.silo, FEDAVG, lambda a, b: torch.zeros(b - a, HIDDEN))
    table.gather(torch.arange(4), "evaluation")
    taken = groups.ledger.take()
    table.gather(torch.arange(4))
    return taken | {f"then {kind}": count for kind, count in groups.ledger.take().items()}


def test_rows_fetched_to_evaluate_are_charged_as_evaluation() -> None:
    for taken in run_ranks(2, _another_kind):
        assert taken["federation/evaluation"] == taken["then federation/position"] == 2 * HIDDEN * 4
        assert "federation/position" not in taken and "federation/embedding" not in taken
