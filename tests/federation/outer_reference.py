"""The outer step in numpy, the whole body in one place, and what sources contribute in tests.

`n` elements, `S` silos.
"""

from dataclasses import dataclass

import numpy as np

from megatron_dept.common.seeding import generator_for
from megatron_dept.dept.outer import OuterRule

FEDAVG = OuterRule("fedavg", 1.0, 0.0)
SLOW_FEDAVG = OuterRule("fedavg", 0.3, 0.0)
NESTEROV = OuterRule("nesterov", 0.7, 0.9)


@dataclass(frozen=True)
class Case:
    """`rounds[t][s]`: sources that silo s trains and contributes in round t."""

    elements: int
    rule: OuterRule
    rounds: tuple[tuple[int, ...], ...]


def busy_rounds(silos: int) -> tuple[tuple[int, ...], ...]:
    """Several sources a silo, one each, nobody, the last silo's dropped, and several again."""
    several = tuple(2 + silo % 2 for silo in range(silos))
    one_each = (1,) * silos
    return several, one_each, (0,) * silos, (*one_each[:-1], 0), several


def start(case: int, elements: int) -> np.ndarray:
    return generator_for("global", case).standard_normal(elements).astype(np.float32)


def local_body(case: int, round: int, silo: int, source: int, elements: int) -> np.ndarray:
    """What a local phase ends with: nothing that depends on where it began, so a wrong start cannot hide."""
    return generator_for("local", case, round, silo, source).standard_normal(elements).astype(np.float32)


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
