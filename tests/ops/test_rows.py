"""Rows gathered and averaged: faces and references against numpy, row after row."""

import numpy as np
import pytest
import torch

from megatron_dept.dept.outer import OuterRule, outer_step
from megatron_dept.ops import reference, rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH = pytest.mark.parametrize("module", [rows, reference])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_takes_rows_of_the_shard_and_zeros_elsewhere(module, dtype):
    table = drawn(4, 5)
    ids = torch.tensor([0, 9, 10, 11, 13, 14, 99])
    found = module.trim_gather(table, ids, 10, dtype)
    zero = torch.zeros(5)
    expected = torch.stack([zero, zero, table[0], table[1], table[3], zero, zero]).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@BOTH
def test_gather_fills_what_it_is_given(module):
    out = torch.full((2, 3), torch.nan, dtype=torch.bfloat16)
    table = drawn(4, 3)
    assert module.trim_gather(table, torch.tensor([1, 7]), out=out, dtype=torch.bfloat16) is out
    assert torch.equal(out, torch.stack([table[1], torch.zeros(3)]).bfloat16())


@pytest.mark.parametrize("k, n", [(0, 4), (1, 1), (3, 0)])
def test_gather_of_nothing_and_from_nothing(k, n):
    assert torch.equal(rows.trim_gather(drawn(n, 3), torch.arange(k) + n), torch.zeros(k, 3))


@BOTH
@pytest.mark.parametrize("mu", [None, 0.9])
def test_scatter_mean_is_the_outer_step_of_each_held_row_alone(module, mu):
    sources = [torch.tensor([1, 3, 4]), torch.tensor([0, 3]), torch.tensor([3, 4])]
    deltas = drawn(7, 6, seed=1)
    table, momentum = drawn(6, 6), None if mu is None else drawn(6, 6, seed=2)
    expected, expected_momentum = table.clone(), None if momentum is None else momentum.clone()
    rule = OuterRule("fedavg" if mu is None else "nesterov", 0.7, mu or 0.0)
    for row, holders in {0: [3], 1: [0], 3: [1, 4, 5], 4: [2, 6]}.items():
        total = torch.zeros(6)
        for holder in holders:
            total += deltas[holder]
        own = None if expected_momentum is None else expected_momentum[row]
        outer_step(rule, expected[row], total / len(holders), own)

    held, starts, order = rows.order_by_row(sources)
    module.trim_scatter_mean(table, momentum, held, starts, order, deltas, starts.diff().int(), 0.7, mu or 0.0)
    assert torch.equal(table, expected)
    if momentum is not None:
        assert torch.equal(momentum, expected_momentum)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_mean_casts_before_it_sums_and_divides_by_the_count_given(module, dtype):
    deltas = drawn(2, 4).to(dtype)
    table = torch.zeros(1, 4)
    one = torch.tensor([0])
    module.trim_scatter_mean(
        table, None, one, torch.tensor([0, 2]), torch.tensor([1, 0]), deltas, torch.tensor([3], dtype=torch.int32), 1, 0
    )
    total = deltas[1].float().numpy() + deltas[0].float().numpy()
    np.testing.assert_array_equal(table[0].numpy(), -(total / np.float32(3)))


def test_order_keeps_the_sources_order_within_a_row():
    held, starts, order = rows.order_by_row([torch.tensor([2, 5]), torch.tensor([0, 5, 7]), torch.tensor([2])])
    assert held.tolist() == [0, 2, 5, 7]
    assert starts.tolist() == [0, 1, 3, 5, 6]
    assert order.tolist() == [2, 0, 5, 1, 3, 4]
    empty = torch.empty(0, dtype=torch.int64)
    assert [each.tolist() for each in rows.order_by_row([empty, empty])] == [[], [0], []]


@pytest.mark.parametrize(
    "name, changed",
    [
        ("table", {"table": torch.zeros(3, 2, dtype=torch.float64)}),
        ("ids", {"ids": torch.zeros(2, dtype=torch.int32)}),
        ("ids", {"ids": torch.zeros(2, 1, dtype=torch.int64)}),
        ("ids", {"ids": torch.zeros(2, dtype=torch.int64, device="meta")}),
        ("ids", {"ids": torch.zeros(4, dtype=torch.int64)[::2]}),
        ("dtype", {"dtype": torch.float64}),
        ("out", {"out": torch.zeros(3, 2)}),
        ("out", {"out": torch.zeros(2, 2, dtype=torch.bfloat16)}),
    ],
)
def test_what_does_not_fit_a_gather_is_named(name, changed):
    with pytest.raises(ValueError, match=rf"^{name} "):
        rows.trim_gather(**{"table": torch.zeros(3, 2), "ids": torch.tensor([0, 1]), **changed})


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("momentum", torch.zeros(2, 2)),
        ("rows", torch.zeros(1, dtype=torch.int32)),
        ("starts", torch.zeros(1, dtype=torch.int64)),
        ("order", torch.zeros(1)),
        ("deltas", torch.zeros(1, 3)),
        ("deltas", torch.zeros(1, 2, dtype=torch.float64)),
        ("counts", torch.zeros(1, dtype=torch.int64)),
    ],
)
def test_what_does_not_fit_a_scatter_is_named(name, wrong):
    arguments = {
        "table": torch.zeros(3, 2),
        "momentum": None,
        "rows": torch.tensor([1]),
        "starts": torch.tensor([0, 1]),
        "order": torch.tensor([0]),
        "deltas": torch.zeros(1, 2),
        "counts": torch.ones(1, dtype=torch.int32),
        "learning_rate": 1.0,
        "mu": 0.0,
    }
    rows.trim_scatter_mean(**arguments)
    with pytest.raises(ValueError, match=f"^{name} "):
        rows.trim_scatter_mean(**{**arguments, name: wrong})
