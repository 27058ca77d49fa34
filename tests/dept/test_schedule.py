"""The schedules against a numpy reference that lists every step of a run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.dept.schedule import ScheduleRule, cycle_learning_rate, learning_rate

rules = st.builds(
    ScheduleRule,
    maximum=st.floats(1e-6, 10),
    minimum_ratio=st.floats(0, 1),
    warmup_steps=st.integers(0, 30),
    total_steps=st.integers(1, 120),
    kind=st.sampled_from(["cosine", "constant"]),
)
# Both sides are float64 formulas of some ten operations, each wrong by half an ulp at most: 1e-13 is hundreds of ulps
# of slack and far below any wrong formula. The cosine may cancel near its end, so it is relative to the maximum.
RELATIVE = 1e-13


def reference(rule: ScheduleRule) -> np.ndarray:
    """Rates of steps 0 .. total + 9, warm-up and tail laid end to end."""
    warmup = np.linspace(0, rule.maximum, rule.warmup_steps + 1)[1:]
    left = rule.total_steps - rule.warmup_steps
    low = rule.maximum * rule.minimum_ratio
    if rule.kind == "constant":
        tail = np.full(max(left, 0) + 10, rule.maximum)
    else:
        angle = np.arange(max(left, 0)) * np.pi / max(left, 1)
        tail = np.concatenate([low + (rule.maximum - low) * np.cos(angle / 2) ** 2, np.full(10, low)])
    return np.concatenate([warmup, tail])[: rule.total_steps + 10]


@given(rules)
def test_every_step_equals_the_reference(rule):
    rates = [learning_rate(step, rule) for step in range(rule.total_steps + 10)]
    np.testing.assert_allclose(rates, reference(rule), rtol=0, atol=RELATIVE * rule.maximum)


@given(rules)
def test_the_rate_rises_then_falls_and_stays_within_its_bounds(rule):
    rates = np.array([learning_rate(step, rule) for step in range(rule.total_steps + 10)])
    slack = RELATIVE * rule.maximum
    assert np.all(np.diff(rates[: rule.warmup_steps]) > 0)
    assert np.all(np.diff(rates[rule.warmup_steps :]) <= slack)
    assert np.all(rates > 0) or rule.minimum_ratio == 0
    assert np.all(rates <= rule.maximum + slack)


@given(rules, st.integers(1, 40))
def test_a_cycle_equals_the_reference(rule, cycle):
    steps = np.arange(100)
    ramp = np.minimum((steps + 1) / rule.warmup_steps, 1) if rule.warmup_steps else np.ones(100)
    low = rule.minimum_ratio
    wave = low + (1 - low) * np.cos((steps % cycle) / cycle * np.pi / 2) ** 2
    expected = rule.maximum * ramp * (wave if rule.kind == "cosine" else 1)
    actual = [cycle_learning_rate(int(step), cycle, rule) for step in steps]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RELATIVE * rule.maximum)


def test_the_papers_run_by_hand():
    rule = ScheduleRule(maximum=6e-4, minimum_ratio=0.1, warmup_steps=100, total_steps=5000, kind="cosine")
    assert learning_rate(0, rule) == 6e-4 / 100
    assert learning_rate(99, rule) == learning_rate(100, rule) == 6e-4
    assert learning_rate(2550, rule) == pytest.approx(0.55 * 6e-4, rel=1e-12)  # half way: the mean of both ends
    assert learning_rate(5000, rule) == learning_rate(9000, rule) == pytest.approx(6e-5, rel=1e-12)
    assert cycle_learning_rate(500, 500, rule) == cycle_learning_rate(4500, 500, rule) == 6e-4


@pytest.mark.parametrize(
    "field, value",
    [("kind", "linear"), ("maximum", -1.0), ("minimum_ratio", 1.5), ("warmup_steps", -1), ("total_steps", 0)],
)
def test_an_impossible_rule_is_refused(field, value):
    fields = {"maximum": 1.0, "minimum_ratio": 0.1, "warmup_steps": 1, "total_steps": 10, "kind": "cosine"}
    with pytest.raises(ValueError):
        ScheduleRule(**{**fields, field: value})


def test_a_cycle_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="n_local"):
        cycle_learning_rate(0, 0, ScheduleRule(1.0, 0.1, 0, 10, "cosine"))
