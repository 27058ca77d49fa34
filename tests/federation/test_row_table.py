"""The row table against numpy on several layouts of silos: the same bits; only rows asked for cross the wire.

The reference keeps the whole table in one place. `V` rows, `h` hidden, `S` silos of data x tensor ranks.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dept.common.seeding import generator_for
from megatron_dept.dept.outer import OuterRule
from megatron_dept.dept.row_storage import RowStorage
from megatron_dept.federation.row_spread import RowSpread, fetch_bytes, return_bytes
from megatron_dept.federation.row_table import RowTable
from megatron_dept.topology.launch import Launch
from tests.federation.groups import Groups, join_groups, join_silos, meet, over_gloo
from tests.support.distributed import run_ranks

HIDDEN = 3
FEDAVG = OuterRule("fedavg", 1.0, 0.0)
NESTEROV = OuterRule("nesterov", 0.7, 0.9)


@dataclass(frozen=True)
class Layout:
    """(data, tensor) ranks of each silo, and whether rows are asked among peers alone."""

    shapes: tuple[tuple[int, int], ...]
    among_peers: bool = True

    @property
    def ranks_of_silos(self) -> tuple[int, ...]:
        return tuple(data * tensor for data, tensor in self.shapes)

    def spread(self, rows: int) -> RowSpread:
        if self.among_peers:
            return RowSpread.of_peers(rows, len(self.shapes), self.ranks_of_silos[0])
        return RowSpread.of_all(rows, self.ranks_of_silos)

    def __str__(self) -> str:
        silos = " + ".join("{}x{}".format(*shape) for shape in self.shapes)
        return silos if self.among_peers else f"{silos} of all"


RANKS = 4
LAYOUTS = [
    Layout(((1, 1),)),
    Layout(((1, 1),) * 2),
    Layout(((2, 1),) * 2),
    Layout(((1, 1),) * 3),
    Layout(((1, 2),) * 2),
    Layout(((2, 2),)),
    Layout(((1, 3),)),
    Layout(((2, 1), (1, 1)), among_peers=False),
    Layout(((1, 1), (1, 3)), among_peers=False),
    Layout(((2, 1), (1, 2)), among_peers=False),
    Layout(((1, 1), (1, 2), (1, 1)), among_peers=False),
]

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
    """`first_tensor_rank`: it alone holds all rows of a source, as of positions; else tensor ranks share them.

    `on_disk`: tables are mapped files; `wire`: in what rows travel.
    """

    total_rows: int
    rule: OuterRule
    rounds: tuple[tuple[Slot, ...], ...]
    first_tensor_rank: bool = False
    on_disk: bool = False
    wire: torch.dtype = torch.float32

    def sent(self, rows: np.ndarray) -> np.ndarray:
        """What is left of rows that were on the wire, or would have been."""
        return torch.from_numpy(rows).to(self.wire).float().numpy()

    def needs(self, shape: tuple[int, int], rows: int) -> list[range]:
        """By rank of a silo, the positions it holds of so many ids: uneven, the first ranks have one more."""
        data, tensor = shape
        if self.first_tensor_rank:
            shares = [range(rows), *[range(0)] * (tensor - 1)]
        else:
            sizes = [rows // tensor + (rank < rows % tensor) for rank in range(tensor)]
            shares = [range(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(tensor)]
        return shares * data


def cases(silos: int) -> list[Case]:
    """Overlapping, disjoint, equal, single, no ids; idle silos; many slots; left-out sources; fewer rows than ranks; on
    disk; in bf16.
    """
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
    return [
        Case(rows, FEDAVG, rounds),
        Case(rows, NESTEROV, rounds),
        Case(2, NESTEROV, (few, few)),
        Case(rows, NESTEROV, rounds[:4], first_tensor_rank=True),
        Case(rows, NESTEROV, rounds, on_disk=True),
        Case(rows, NESTEROV, rounds, wire=torch.bfloat16),
    ]


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


def _run_case(layout: Layout, groups: Groups, number: int, case: Case) -> Report:
    silo, rank = groups.place
    table = initial(number, case.total_rows)
    made: list[tuple[int, int]] = []

    def initial_rows(start: int, stop: int) -> torch.Tensor:
        made.append((start, stop))
        return torch.from_numpy(table[start:stop].copy())

    shape = layout.shapes[silo]
    wide = groups.peers if layout.among_peers else groups.wide
    spread = layout.spread(case.total_rows)
    storage = RowStorage(Path(tempfile.gettempdir()) if case.on_disk else None)
    rows = RowTable(
        "embedding", HIDDEN, spread, wide, groups.silo, shape[1], case.rule, initial_rows, storage, case.wire
    )
    assert len(made) == bool(len(rows.rows)), "initial rows are made once"
    report = Report([], [], [], rows.first, [], [], made[0] if made else (rows.first, rows.first))
    groups.ledger.take()
    for round, slots in enumerate(case.rounds):
        for index, slot in enumerate(slots):
            turn = slot[silo]
            ids = torch.tensor(turn.ids if turn else (), dtype=torch.int64)
            need = case.needs(shape, len(ids))[rank]
            report.gathered.append(rows.gather(ids, need).numpy().copy())
            report.gather_bytes.append(groups.ledger.take())
            given = ids if turn and not turn.dropped else ids[:0]
            need = case.needs(shape, len(given))[rank]
            moved = torch.from_numpy(deltas(number, round, index, silo, len(given)))
            rows.accumulate(given, moved[need.start : need.stop], need)
            report.scatter_bytes.append(groups.ledger.take())
        rows.apply()
        assert not rows.pending.sums(0, len(rows.rows)).any() and not rows.pending.counts.any(), (
            "a round must not reach the next"
        )
        report.rows.append(rows.rows.numpy().copy())
        report.momentum.append(None if rows.momentum is None else rows.momentum.numpy().copy())
    return report


def _run(launch: Launch) -> list[list[Report]]:
    """Every layout in turn, on as many of the ranks as it has."""
    connect = over_gloo(meet(launch), launch.rank)
    results: list[list[Report]] = []
    for layout in LAYOUTS:
        results.append([])
        if launch.rank < sum(layout.ranks_of_silos):
            groups = join_silos(connect, str(layout), launch.rank, layout.ranks_of_silos, layout.among_peers)
            every = enumerate(cases(len(layout.shapes)))
            results[-1] = [_run_case(layout, groups, number, case) for number, case in every]
    return results


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
                    total[ids] += case.sent(deltas(number, round, index, silo, len(ids)))
                    holders[ids] += 1
        held = holders > 0
        mean = total[held] / holders[held, None]
        rate, mu = np.float32(case.rule.learning_rate), np.float32(case.rule.momentum)
        momentum[held] = mu * momentum[held] + mean
        update = mean + mu * momentum[held] if case.rule.momentum else mean
        table[held] -= rate * update
        history.append(Expected(table.copy(), momentum.copy()))
    return history


@pytest.fixture(scope="module")
def every() -> list[list[list[Report]]]:
    return run_ranks(RANKS, _run)


Ran = tuple[Layout, list[list[Report]]]


@pytest.fixture(params=range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def ran(request: pytest.FixtureRequest, every: list[list[list[Report]]]) -> Ran:
    layout = LAYOUTS[request.param]
    return layout, [every[rank][request.param] for rank in range(sum(layout.ranks_of_silos))]


def place(layout: Layout, rank: int) -> tuple[int, int]:
    """(silo, rank in it), counted by hand."""
    silo = 0
    while rank >= layout.ranks_of_silos[silo]:
        rank -= layout.ranks_of_silos[silo]
        silo += 1
    return silo, rank


def whole(reports: list[Report], of: Any) -> np.ndarray:
    """All ranks' pieces in the order of their ids; each id must be owned exactly once."""
    pieces = sorted((report.first, of(report)) for report in reports if len(of(report)))
    at = 0
    for first, piece in pieces:
        assert first == at, "blocks must lie end to end"
        at += len(piece)
    return np.concatenate([piece for _, piece in pieces])


def test_rows_and_momentum_are_numpys_to_the_bit(ran: Ran) -> None:
    layout, ranks = ran
    for number, case in enumerate(cases(len(layout.shapes))):
        reports = [reports[number] for reports in ranks]
        for round, expected in enumerate(reference(number, case)):
            np.testing.assert_array_equal(whole(reports, lambda r, t=round: r.rows[t]), expected.table)
            if case.rule.momentum:
                np.testing.assert_array_equal(whole(reports, lambda r, t=round: r.momentum[t]), expected.momentum)
            else:
                assert all(report.momentum[round] is None for report in reports)


def test_every_rank_gathers_its_rows_as_they_stood_at_the_rounds_start(ran: Ran) -> None:
    layout, ranks = ran
    for number, case in enumerate(cases(len(layout.shapes))):
        starts = [initial(number, case.total_rows), *(after.table for after in reference(number, case))]
        for rank, reports in enumerate(ranks):
            silo, inside = place(layout, rank)
            gathered = iter(reports[number].gathered)
            for round, slots in enumerate(case.rounds):
                for slot in slots:
                    turn = slot[silo]
                    ids = list(turn.ids) if turn else []
                    need = case.needs(layout.shapes[silo], len(ids))[inside]
                    expected = case.sent(starts[round][ids][need.start : need.stop])
                    np.testing.assert_array_equal(next(gathered), expected)


def test_a_row_held_by_none_is_unchanged_to_the_bit(ran: Ran) -> None:
    """Implied by the reference; said again by itself, because it is the promise of TRIM."""
    layout, ranks = ran
    number, case = 1, cases(len(layout.shapes))[1]
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


def by_hand(layout: Layout, case: Case, silo: int, ids: Ids) -> tuple[dict[str, int], dict[str, int]]:
    """Rows that cross to fetch and to return, by link: row by row, from who fetches, who owns and who holds it."""
    silos, sizes = len(layout.shapes), layout.ranks_of_silos
    block = -(-case.total_rows // sum(sizes))
    tensor = layout.shapes[silo][1]
    needs = case.needs(layout.shapes[silo], len(ids))
    fetched, returned = {"federation": 0, "silo": 0}, {"federation": 0, "silo": 0}
    for position, row in enumerate(ids):
        if layout.among_peers:
            fetcher, owner_silo = divmod(row // block, silos)
            owner = fetcher
        else:
            owner_silo, owner = place(layout, row // block)
            fetcher = next(e for e in range(sizes[silo]) if position < len(ids) * (e + 1) // sizes[silo])
        for rows in (fetched, returned):
            if owner_silo != silo:
                rows["federation"] += 1
            elif owner != fetcher:
                rows["silo"] += 1
        fetched["silo"] += sum(position in need for rank, need in enumerate(needs) if rank != fetcher)
        held_by = next(t for t in range(tensor) if position in needs[t])
        returned["silo"] += held_by != fetcher % tensor
    return fetched, returned


def test_only_rows_asked_are_charged_and_the_formulas_say_how_many(ran: Ran) -> None:
    """Between silos rows asked outside, once to fetch and once to return; inside what ranks hand one another."""
    layout, ranks = ran
    for number, case in enumerate(cases(len(layout.shapes))):
        spread, width = layout.spread(case.total_rows), 2 if case.wire == torch.bfloat16 else 4
        turn_number = 0
        for slots in case.rounds:
            for slot in slots:
                fetched, returned = {"federation": 0, "silo": 0}, {"federation": 0, "silo": 0}
                told, told_back = dict(fetched), dict(fetched)
                for silo, turn in enumerate(slot):
                    if turn is None:
                        continue
                    needs, ids = case.needs(layout.shapes[silo], len(turn.ids)), np.array(turn.ids, np.int64)
                    out, back = by_hand(layout, case, silo, turn.ids)
                    formula = fetch_bytes(spread, silo, ids, needs, HIDDEN, width)
                    formula_back = return_bytes(spread, silo, ids, needs, layout.shapes[silo][1], HIDDEN, width)
                    for scope in ("federation", "silo"):
                        fetched[scope] += out[scope] * HIDDEN * width
                        told[scope] += formula[scope]
                        if not turn.dropped:
                            returned[scope] += back[scope] * HIDDEN * width
                            told_back[scope] += formula_back[scope]
                assert (told, told_back) == (fetched, returned)
                gathers = [reports[number].gather_bytes[turn_number] for reports in ranks]
                scatters = [reports[number].scatter_bytes[turn_number] for reports in ranks]
                for scope in ("federation", "silo"):
                    assert sum(counts.get(f"{scope}/embedding", 0) for counts in gathers) == fetched[scope]
                    assert sum(counts.get(f"{scope}/embedding", 0) for counts in scatters) == returned[scope]
                turn_number += 1


def test_a_rank_makes_and_keeps_its_own_block_alone(ran: Ran) -> None:
    layout, ranks = ran
    for number, case in enumerate(cases(len(layout.shapes))):
        most = -(-case.total_rows // sum(layout.ranks_of_silos))
        assert sum(len(reports[number].rows[0]) for reports in ranks) == case.total_rows
        for reports in ranks:
            start, stop = reports[number].made
            assert start == reports[number].first and stop - start == len(reports[number].rows[0]) <= most


def _another_kind(launch: Launch) -> dict[str, int]:
    groups = join_groups(launch, silos=2)
    spread = RowSpread.of_peers(4, 2, 1)
    table = RowTable(
        "position", HIDDEN, spread, groups.peers, groups.silo, 1, FEDAVG, lambda a, b: torch.zeros(b - a, HIDDEN)
    )
    table.gather(torch.arange(4), range(4), "evaluation")
    taken = groups.ledger.take()
    table.gather(torch.arange(4), range(4))
    return taken | {f"then {kind}": count for kind, count in groups.ledger.take().items()}


def test_rows_fetched_to_evaluate_are_charged_as_evaluation() -> None:
    for taken in run_ranks(2, _another_kind):
        assert taken["federation/evaluation"] == taken["then federation/position"] == 2 * HIDDEN * 4
        assert "federation/position" not in taken and "federation/embedding" not in taken
