"""Row tables of which every silo has all rows: the mean over a row's holders, and rows handed over, against numpy.

`V` rows of the table, of width `h`; each silo is some data ranks.
"""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_dept.federation.communicator import Alone
from megatron_dept.federation.replicated_rows import ReplicatedRowTable
from megatron_dept.topology.launch import Launch
from tests.federation.groups import join_silos, meet, over_gloo
from tests.federation.outer_reference import NESTEROV
from tests.support.distributed import run_ranks

HIDDEN, ROWS = 3, 11


def _rows(launch: Launch, silos: tuple[int, ...], among_peers: bool) -> dict[str, Any]:
    """Silos of data ranks: each accumulates its own ids alone; then one round among all, and silo 1 gives."""
    groups = join_silos(over_gloo(meet(launch), launch.rank), "rows", launch.rank, silos, among_peers)
    silo = groups.place[0]
    others, row_silos = groups.peers, list(range(len(silos)))
    if not among_peers:
        others, row_silos = groups.wide, [s for s, size in enumerate(silos) for _ in range(size)]
    table = ReplicatedRowTable(
        "embedding",
        HIDDEN,
        ROWS,
        Alone(),
        [silo],
        silo,
        groups.silo,
        1,
        NESTEROV,
        lambda a, b: torch.ones(b - a, HIDDEN),
    )
    ids, deltas = _turn(silo)
    table.accumulate(ids, deltas, range(len(ids)))
    joined = table.among(others, row_silos, silo)
    groups.ledger.take()
    predicted = joined.round_bytes()
    before = [tensor.clone() for tensor in _state(table)]
    joined.prepare()
    sent = sum(count for key, count in groups.ledger.take().items() if key.endswith("/embedding"))
    unchanged = all(map(torch.equal, before, _state(table)))
    table.commit(joined.prepare())
    rows, momentum = table.rows.clone(), table.momentum
    assert momentum is not None
    momentum = momentum.clone()
    if silo == 0:
        table.rows.fill_(9)
        table.momentum.fill_(9)
    kept = table.rows.clone(), table.momentum.clone()
    handed = joined.hand_over(1)
    unchanged = unchanged and torch.equal(table.rows, kept[0]) and torch.equal(table.momentum, kept[1])
    table.accept(handed)
    given = torch.equal(table.rows, rows) and torch.equal(table.momentum, momentum)
    return {"first": table.first, "rows": rows.numpy(), "bytes": (sent, predicted), "fine": (unchanged, given)}


def _state(table: ReplicatedRowTable) -> tuple[torch.Tensor, ...]:
    return table.rows, table.pending.sums(0, len(table.rows)), table.pending.counts


def _turn(silo: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A silo's ids and row deltas: row 4 is everyone's, row 10 nobody's."""
    ids = torch.tensor([[0, 4, 7], [1, 2, 4, 9], [3, 4, 5]][silo])
    return ids, (ids[:, None] + torch.arange(HIDDEN)) * 0.125 * (silo + 1)


@pytest.mark.parametrize(
    ("silos", "among_peers"), [((1, 1, 1), True), ((2, 2), True), ((1, 2), False), ((2, 1, 1), False)]
)
def test_replicated_rows_are_the_mean_over_their_holders(silos: tuple[int, ...], among_peers: bool) -> None:
    sums, counts = np.zeros((ROWS, HIDDEN), np.float32), np.zeros(ROWS, np.int64)
    for silo in range(len(silos)):
        ids, deltas = _turn(silo)
        sums[ids.numpy()] += deltas.numpy()
        counts[ids.numpy()] += 1
    mean = sums / np.maximum(counts, 1)[:, None]
    expected = 1 - NESTEROV.learning_rate * (1 + NESTEROV.momentum) * mean
    for result in run_ranks(sum(silos), _rows, silos, among_peers):
        # A row's value is of size 1, and its step is three rounded fp32 operations.
        own = expected[result["first"] : result["first"] + len(result["rows"])]
        np.testing.assert_allclose(result["rows"], own, rtol=0, atol=1e-6)
        assert result["fine"] == (True, True)
        assert result["bytes"][0] == result["bytes"][1] > 0
