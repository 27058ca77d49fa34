"""The outer optimizer: turns the averaged delta of a round into the next global value, in place.

delta = global - local is a pseudo-gradient (DiLoCo, arXiv 2311.08105). Shapes: flat [elements], fp32, on one
device. Shared embedding rows take the same step, by those that some source holds (`dept.averaging`).

Every multiplication and addition is rounded by itself (no fused multiply-add), so an element's result does not depend
on where in a tensor it stands: shares of the body cut anywhere, or the whole, give the same bits.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SCRATCH_ELEMENTS = 1 << 20
"""Elements worked on at once: bounds the scratch memory at a few of these, whatever the model's size."""


@dataclass(frozen=True)
class OuterRule:
    """FedAvg (value -= lr * delta) or Nesterov momentum as in DiLoCo; ValueError where a field is impossible."""

    optimizer: Literal["fedavg", "nesterov"]
    learning_rate: float
    momentum: float

    def __post_init__(self) -> None:
        if self.optimizer not in ("fedavg", "nesterov"):
            raise ValueError(f"outer optimizer {self.optimizer!r} is not known; choose fedavg or nesterov")
        if self.optimizer == "fedavg" and self.momentum:
            raise ValueError(f"outer momentum {self.momentum} needs the outer optimizer nesterov")
        if self.learning_rate <= 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"outer learning_rate {self.learning_rate} and momentum {self.momentum}: want > 0 and within [0, 1)"
            )


def needs_momentum(rule: OuterRule) -> bool:
    """Whether the rule keeps a momentum buffer; Nesterov with momentum 0 is FedAvg and keeps none."""
    return rule.optimizer == "nesterov" and rule.momentum != 0


@torch.no_grad()
def outer_step(rule: OuterRule, value: Tensor, mean_delta: Tensor, momentum: Tensor | None) -> None:
    """One outer step, in place on `value` and `momentum` (fp32, equal shapes, contiguous); `mean_delta` is only read.

    FedAvg: value -= lr * d, with lr = 1 value -= d exactly. Nesterov as torch.optim.SGD(nesterov=True) has it:
    m = mu * m + d; value -= lr * (d + mu * m). `momentum` starts at zeros and is None where `needs_momentum` is false.
    """
    _check(rule, value, mean_delta, momentum)
    if not needs_momentum(rule) and rule.learning_rate == 1:
        value.sub_(mean_delta)
        return
    flat_value, flat_delta = value.view(-1), mean_delta.reshape(-1)
    flat_momentum = momentum.view(-1) if momentum is not None else None
    for start in range(0, flat_value.numel(), SCRATCH_ELEMENTS):
        part = slice(start, start + SCRATCH_ELEMENTS)
        delta = flat_delta[part]
        if flat_momentum is None:
            update = delta.clone()
        else:
            flat_momentum[part].mul_(rule.momentum).add_(delta)
            update = flat_momentum[part].mul(rule.momentum).add_(delta)
        flat_value[part].sub_(update.mul_(rule.learning_rate))


def _check(rule: OuterRule, value: Tensor, mean_delta: Tensor, momentum: Tensor | None) -> None:
    """What only a bug can break: one shape, fp32, contiguous in-place tensors, momentum exactly where it is needed."""
    assert value.dtype == mean_delta.dtype == torch.float32, f"outer step on {value.dtype}, {mean_delta.dtype}"
    assert value.shape == mean_delta.shape and value.is_contiguous(), f"{value.shape} against {mean_delta.shape}"
    assert (momentum is not None) == needs_momentum(rule), f"momentum buffer does not fit {rule}"
    if momentum is not None:
        assert momentum.dtype == torch.float32 and momentum.shape == value.shape and momentum.is_contiguous()
