"""The outer optimizers against numpy: bit for bit in fp32, within rounding in float64, and against torch's own SGD."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dept.dept import outer
from megatron_dept.dept.averaging import RowMean
from megatron_dept.dept.outer import OuterRule, needs_momentum, outer_step
from megatron_dept.dept.row_storage import StoredRows

FEDAVG = OuterRule("fedavg", 1.0, 0.0)
DILOCO = OuterRule("nesterov", 0.7, 0.9)
rules = st.one_of(
    st.just(FEDAVG),
    st.just(DILOCO),
    st.builds(OuterRule, st.just("fedavg"), st.floats(0.01, 2), st.just(0.0)),
    st.builds(OuterRule, st.just("nesterov"), st.floats(0.01, 2), st.floats(0, 0.99)),
)
seeds = st.integers(0, 2**32 - 1)


def reference(rule, value, deltas, momentum, dtype):
    """Several outer steps in numpy, every operation in `dtype`; returns value and momentum."""
    value, momentum = value.astype(dtype), momentum.astype(dtype)
    rate, decay = dtype(rule.learning_rate), dtype(rule.momentum)
    for delta in deltas.astype(dtype):
        if rule.optimizer == "fedavg" or rule.momentum == 0:
            value = value - rate * delta
        else:
            momentum = decay * momentum + delta
            value = value - rate * (delta + decay * momentum)
    return value, momentum


def outer_step_rows(rule, table, delta, momentum, held):
    """The outer step on the rows of `table` that `held` marks: one source that holds them has come with its delta."""
    mean, ids = RowMean(*table.shape), held.nonzero().squeeze(1)
    mean.add(ids, delta[ids])
    mean.step(rule, StoredRows(table), None if momentum is None else StoredRows(momentum))


def random_round(seed, shape, steps):
    """Standard normal value, deltas and momentum, fp32."""
    generator = np.random.default_rng(seed)
    make = lambda *shape: generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    return make(*shape), make(steps, *shape), make(*shape)


def buffer_of(rule, momentum):
    return torch.from_numpy(momentum.copy()) if needs_momentum(rule) else None


@given(rules, seeds, st.integers(0, 300), st.integers(1, 4))
def test_flat_steps_equal_numpy(rule, seed, elements, steps):
    start, deltas, start_momentum = random_round(seed, (elements,), steps)
    value, momentum = torch.from_numpy(start.copy()), buffer_of(rule, start_momentum)
    for delta in deltas:
        kept = delta.copy()
        outer_step(rule, value, torch.from_numpy(delta), momentum)
        assert np.array_equal(delta, kept), "the delta is only read"
    expected, expected_momentum = reference(rule, start, deltas, start_momentum, np.float32)
    assert np.array_equal(value.numpy(), expected)  # the same roundings in the same order: bitwise
    if momentum is not None:
        assert np.array_equal(momentum.numpy(), expected_momentum)
    exact, _ = reference(rule, start, deltas, start_momentum, np.float64)
    # A step rounds five times. The terms are at most ~lr (1 + mu) |m| < 2 * 2 * 20 (normal draws, four steps), and
    # 4 steps x 5 roundings x 2^-24 x 80 is 1e-4; a wrong formula is wrong in the first digit.
    np.testing.assert_allclose(value.numpy(), exact, rtol=0, atol=1e-4)


def test_fedavg_with_rate_one_is_the_mean_of_the_locals():
    value = torch.tensor([1.0, -2.0, 4.0])
    locals_ = torch.tensor([[0.5, -1.0, 4.0], [1.5, -1.0, 2.0]])
    outer_step(FEDAVG, value, (value - locals_).mean(0), None)
    assert value.tolist() == [1.0, -1.0, 3.0]  # exact: all are small dyadic numbers


@given(seeds, st.integers(1, 100))
def test_nesterov_is_torch_sgd(seed, elements):
    start, deltas, _ = random_round(seed, (elements,), 5)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    sgd = torch.optim.SGD([parameter], lr=DILOCO.learning_rate, momentum=DILOCO.momentum, nesterov=True)
    value, momentum = torch.from_numpy(start.copy()), torch.zeros(elements)
    for delta in deltas:
        parameter.grad = torch.from_numpy(delta)
        sgd.step()
        outer_step(DILOCO, value, torch.from_numpy(delta), momentum)
    # torch may fuse multiply and add: a last bit a step, of numbers below ~40 here: 5 x 40 x 2^-23 < 3e-5.
    torch.testing.assert_close(value, parameter.detach(), rtol=0, atol=3e-5)


@settings(max_examples=30)
@given(rules, seeds, st.integers(1, 200), st.data())
def test_shares_cut_anywhere_give_the_bits_of_the_whole(rule, seed, elements, data):
    start, deltas, start_momentum = random_round(seed, (elements,), 1)
    cut = data.draw(st.integers(0, elements))
    whole, parts = torch.from_numpy(start.copy()), torch.from_numpy(start.copy())
    whole_momentum, parts_momentum = buffer_of(rule, start_momentum), buffer_of(rule, start_momentum)
    delta = torch.from_numpy(deltas[0])
    outer_step(rule, whole, delta, whole_momentum)
    for part in (slice(0, cut), slice(cut, None)):
        outer_step(rule, parts[part], delta[part], None if parts_momentum is None else parts_momentum[part])
    assert torch.equal(whole, parts)


@given(rules, seeds, st.integers(1, 20), st.integers(1, 9), st.data())
def test_rows_equal_numpy_and_absent_rows_keep_every_bit(rule, seed, rows, hidden, data):
    start, deltas, start_momentum = random_round(seed, (rows, hidden), 1)
    held = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    start[~held, 0], start_momentum[~held, 0] = -0.0, np.nan  # bits that arithmetic would not leave alone
    deltas[0][~held] = np.inf  # and whatever stands in an absent row's delta is not looked at
    table, momentum = torch.from_numpy(start.copy()), buffer_of(rule, start_momentum)
    outer_step_rows(rule, table, torch.from_numpy(deltas[0]), momentum, torch.from_numpy(held))
    expected, expected_momentum = reference(rule, start[held], deltas[:, held], start_momentum[held], np.float32)
    assert np.array_equal(table.numpy()[held], expected)
    assert table.numpy()[~held].tobytes() == start[~held].tobytes()
    if momentum is not None:
        assert np.array_equal(momentum.numpy()[held], expected_momentum)
        assert momentum.numpy()[~held].tobytes() == start_momentum[~held].tobytes()


@given(rules, seeds)
def test_all_rows_held_is_the_flat_step(rule, seed):
    start, deltas, start_momentum = random_round(seed, (7, 5), 1)
    flat, table = torch.from_numpy(start.copy()), torch.from_numpy(start.copy())
    flat_momentum, table_momentum = buffer_of(rule, start_momentum), buffer_of(rule, start_momentum)
    outer_step(rule, flat, torch.from_numpy(deltas[0]), flat_momentum)
    outer_step_rows(rule, table, torch.from_numpy(deltas[0]), table_momentum, torch.ones(7, dtype=torch.bool))
    assert torch.equal(flat, table)


@pytest.mark.parametrize("rule", [DILOCO, OuterRule("fedavg", 0.5, 0.0)])
def test_working_in_blocks_changes_nothing(rule, monkeypatch):
    start, deltas, start_momentum = random_round(1, (50, 3), 1)
    held = torch.arange(50) % 3 != 0
    results = []
    for scratch in (outer.SCRATCH_ELEMENTS, 7):
        monkeypatch.setattr(outer, "SCRATCH_ELEMENTS", scratch)
        table, momentum = torch.from_numpy(start.copy()), buffer_of(rule, start_momentum)
        outer_step_rows(rule, table, torch.from_numpy(deltas[0]), momentum, held)
        outer_step(rule, table, torch.from_numpy(deltas[0]), momentum)
        results.append(table)
    assert torch.equal(*results)


def test_only_nesterov_with_momentum_needs_a_buffer():
    assert needs_momentum(DILOCO)
    assert not needs_momentum(FEDAVG)
    assert not needs_momentum(OuterRule("nesterov", 0.7, 0.0))


@pytest.mark.parametrize(
    "fields", [("adam", 1.0, 0.0), ("fedavg", 1.0, 0.9), ("nesterov", 0.0, 0.9), ("nesterov", 0.7, 1.0)]
)
def test_an_impossible_rule_is_refused(fields):
    with pytest.raises(ValueError):
        OuterRule(*fields)


def test_a_missing_momentum_buffer_is_a_bug():
    with pytest.raises(AssertionError):
        outer_step(DILOCO, torch.zeros(3), torch.zeros(3), None)
