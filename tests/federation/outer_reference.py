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


BLOCK = 256


def packed(elements: np.ndarray, owed: np.ndarray, wire: str) -> tuple[np.ndarray, np.ndarray]:
    """(what arrives of fp32 [n], what is owed then), `owed` before; int8 in blocks from the first element on."""
    if wire == "fp32":
        return elements, owed
    if wire == "bf16":
        bits = elements.view(np.uint32)
        # Half of the last kept bit, less one where that is even: ties go to even.
        return ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32), owed
    arrives = np.empty_like(elements)
    whole = elements + owed
    for start in range(0, len(whole), BLOCK):
        block = whole[start : start + BLOCK]
        largest = np.abs(block).max()
        inverse = np.float32(127) / largest if largest else np.float32(0)
        arrives[start : start + BLOCK] = np.rint(block * inverse) * (largest / np.float32(127))
    return arrives, whole - arrives


@dataclass
class Wired:
    """After a round: body, momentum, what each silo owes of its deltas, and owners of their updates, all [n]."""

    value: np.ndarray
    momentum: np.ndarray
    owed: list[np.ndarray]
    owed_updates: np.ndarray


def wired_reference(number: int, case: Case, wire: str, everyone: bool) -> list[Wired]:
    """`reference` where deltas and what owners make of them travel over `wire`; shares are equal parts, rounded up."""
    n, silos = case.elements, len(case.rounds[0])
    share = -(-n // silos)
    shares = [slice(min(silo * share, n), min((silo + 1) * share, n)) for silo in range(silos)]
    value = start(number, n)
    zeros = np.zeros_like(value)
    state = Wired(value, zeros, [zeros] * silos, zeros)
    history = []
    rate, mu = np.float32(case.rule.learning_rate), np.float32(case.rule.momentum)
    for round, counts in enumerate(case.rounds):
        value, momentum = state.value.copy(), state.momentum.copy()
        owed, owed_updates = [of.copy() for of in state.owed], state.owed_updates.copy()
        if sum(counts):
            mean = np.zeros_like(value)
            for silo, count in enumerate(counts):
                delta = np.zeros_like(value)
                for source in range(count):
                    delta -= local_body(number, round, silo, source, n) - value
                for part in shares:
                    arrives, owed[silo][part] = packed(delta[part], owed[silo][part], wire)
                    mean[part] = arrives if silo == 0 else mean[part] + arrives
            mean /= np.float32(sum(counts))
            if everyone:
                for silo, part in enumerate(shares):
                    mean[part], lost = packed(mean[part], zeros[part], wire)
                    owed[silo][part] += lost * np.float32(sum(counts))
            momentum = mu * momentum + mean
            new = value - rate * (mean + mu * momentum if case.rule.momentum else mean)
            if not everyone and wire != "fp32":
                for part in shares:
                    update, owed_updates[part] = packed(value[part] - new[part], owed_updates[part], wire)
                    new[part] = value[part] - update
            value = new
        state = Wired(value, momentum, owed, owed_updates)
        history.append(state)
    return history
