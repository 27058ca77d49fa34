"""The learning rate as a pure function of the sequential step.

One warm-up and one cosine run over all sequential steps of a run and continue across rounds (DEPT's recipe); the
embeddings of active forgetting follow a cosine per cycle. Steps count from 0 and are those of one silo.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleRule:
    """Shape of the schedule; ValueError where a field is impossible."""

    maximum: float
    """eta_max, reached at the last step of warm-up."""
    minimum_ratio: float
    """The cosine ends at minimum_ratio * maximum."""
    warmup_steps: int
    total_steps: int
    """Sequential steps of the whole run, warm-up included."""
    kind: Literal["cosine", "constant"]

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "constant"):
            raise ValueError(f"schedule {self.kind!r} is not known; choose cosine or constant")
        if self.maximum < 0 or not 0 <= self.minimum_ratio <= 1:
            raise ValueError(f"learning rate {self.maximum} and ratio {self.minimum_ratio}: want >= 0 and within 0..1")
        if self.warmup_steps < 0 or self.total_steps < 1:
            raise ValueError(f"warmup_steps {self.warmup_steps}, total_steps {self.total_steps}: want >= 0 and >= 1")


def learning_rate(step: int, rule: ScheduleRule) -> float:
    """Rate of sequential step `step` (from 0): warm-up to the maximum, then cosine or constant.

    During warm-up maximum * (step + 1) / warmup_steps, so the first step already moves; then half a cosine that
    starts at the maximum and would meet the minimum at `total_steps`, beyond which the minimum holds.
    """
    _check_step(step)
    if step < rule.warmup_steps:
        return rule.maximum * (step + 1) / rule.warmup_steps
    if rule.kind == "constant":
        return rule.maximum
    remaining = rule.total_steps - rule.warmup_steps
    progress = min(1.0, (step - rule.warmup_steps) / remaining) if remaining > 0 else 1.0
    return rule.maximum * _cosine_factor(progress, rule.minimum_ratio)


def cycle_learning_rate(step: int, cycle_steps: int, rule: ScheduleRule) -> float:
    """Rate of ACT's embeddings at sequential step `step`: the cosine starts anew every `cycle_steps` steps.

    Warm-up happens once, over the run's first `warmup_steps` steps, as a ramp on top of the cycle's cosine (the body's
    recipe; the paper prints none for the embeddings). Of the rule, `total_steps` has no part in it.
    """
    _check_step(step)
    if cycle_steps < 1:
        raise ValueError(f"cycle_steps {cycle_steps} is not positive; set n_local to at least 1")
    ramp = min(1.0, (step + 1) / rule.warmup_steps) if rule.warmup_steps else 1.0
    factor = 1.0 if rule.kind == "constant" else _cosine_factor(step % cycle_steps / cycle_steps, rule.minimum_ratio)
    return rule.maximum * ramp * factor


def _cosine_factor(progress: float, minimum_ratio: float) -> float:
    """Half a cosine from 1 at progress 0 to `minimum_ratio` at progress 1."""
    return minimum_ratio + (1 - minimum_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _check_step(step: int) -> None:
    assert step >= 0, f"step {step}: steps count from 0"
