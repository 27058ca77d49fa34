"""The whole program on tensor ranks, pipelines and unequal silos: the same run as one process, the ledger as foretold.

Gradients and single steps of every pair of choices are tests/engine's; here is what comes around them: variants, shared
rows, validation, the outer step, the ledger.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import final_state, largest_difference, losses, metrics
from tests.training.conftest import Finished
from tests.training.test_identities import SMOOTH, TOLERANCE

NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}
LLAMA = {"family": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "ffn_hidden_size": 48}
BF16 = 0.02
"""Relative L2 of a state after six steps: a bf16 gradient is 8 bits, and ranks sum their parts in another order."""


@dataclass(frozen=True)
class Case:
    ranks: int
    parallel: dict[str, Any]
    variant: str = "trim"
    dept: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    training: dict[str, Any] = field(default_factory=dict)

    def sections(self, parallel: dict[str, Any]) -> dict[str, Any]:
        return {
            "dept": {"variant": self.variant, **self.dept},
            "model": self.model,
            "optimizer": SMOOTH,
            "parallel": parallel,
            "training": {"precision": self.precision, **self.training},
            "evaluation": {"interval_rounds": 1, "max_tokens": 300},
        }


def sizes(tensor: int = 1, pipe: int = 1, **others: Any) -> dict[str, Any]:
    return {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipe, **others}


CASES = {
    "trim, 2 silos x tensor 2, sequence": Case(4, sizes(2, silos=2, sequence_parallel=True), dept={"outer": NESTEROV}),
    "glob, tensor 4 with 2 key-value heads": Case(4, sizes(4, zero_stage=2), "glob", model=LLAMA),
    "spec, pipe 2 x data 2": Case(4, sizes(1, 2, zero_stage=0), "spec", {"inner_state": "keep"}),
    "spec_opt, 2 silos x pipe 2 x tensor 2": Case(8, sizes(2, 2, silos=2), "spec_opt", {"outer": NESTEROV}, LLAMA),
    "std, data 2 x tensor 2, ZeRO 3": Case(4, sizes(2, zero_stage=3), "std"),
    "act, pipe 2": Case(2, sizes(1, 2), "act", {"n_local": 2}),
    "trim, bf16, pipe 2 x tensor 2": Case(4, sizes(2, 2), precision="bf16"),
    "glob, bf16, offload, tensor 2, ZeRO 3": Case(
        2, sizes(2, zero_stage=3, offload_optimizer=True), "glob", {}, LLAMA, "bf16"
    ),
    "trim, tensor 2 beside data 2": Case(
        4, {"shapes": [{"tensor_model_parallel_size": 2}, {"data_parallel_size": 2}]}, dept={"outer": NESTEROV}
    ),
    "spec_opt, pipe 2 beside tensor 2 beside one": Case(
        5, {"shapes": [{"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}, {}]}, "spec_opt"
    ),
    "spec, tensor 2 beside data 3, ZeRO 0": Case(
        5,
        {"shapes": [{"tensor_model_parallel_size": 2}, {"data_parallel_size": 3}], "zero_stage": 0},
        "spec",
        training={"global_batch_size": 6},
    ),
    "trim, data 3 beside one, ZeRO 3": Case(
        4, {"shapes": [{"data_parallel_size": 3}, {}], "zero_stage": 3}, training={"global_batch_size": 6}
    ),
    "glob, unequal, ZeRO 3": Case(
        3, {"shapes": [{"tensor_model_parallel_size": 2}, {}], "zero_stage": 3}, "glob", {"inner_state": "keep"}, LLAMA
    ),
}  # fmt: skip


def validation(run_dir: Path) -> dict[tuple[str, int], float]:
    return {(line["source"], line["round"]): line["bits_per_byte"] for line in metrics(run_dir, "validation")}


@pytest.mark.parametrize("name", CASES)
def test_any_layout_is_one_process(finished: Finished, name: str) -> None:
    case = CASES[name]
    stage = {"zero_stage": max(1, case.parallel.get("zero_stage", 1))} if case.precision == "bf16" else {}
    one = finished(1, **case.sections(stage))
    many = finished(case.ranks, **case.sections(case.parallel))
    tolerance = TOLERANCE if case.precision == "fp32" else BF16
    assert largest_difference(final_state(many), final_state(one)) < tolerance
    assert losses(many) == pytest.approx(losses(one), rel=tolerance) and losses(one)
    assert validation(many) == pytest.approx(validation(one), rel=tolerance) and validation(one)


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_is_what_the_plan_said(finished: Finished, name: str) -> None:
    """By kind and to the byte, on every layout: body, shared rows, and rows fetched to validate with."""
    case = CASES[name]
    run_dir = finished(case.ranks, **case.sections(case.parallel))
    for entry in json.loads((run_dir / "ledger.json").read_text())["per_round"]:
        assert entry["predicted"], "a round has something to foretell"
        assert {kind: entry["kinds"][kind] for kind in entry["predicted"]} == entry["predicted"]


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_is_what_a_dry_run_says(finished: Finished, name: str) -> None:
    """To the byte, before anything was allocated: where silos are cut differently too, under every ZeRO stage."""
    case = CASES[name]
    run_dir = finished(case.ranks, **case.sections(case.parallel))
    plan = json.loads((run_dir / "plan.json").read_text())["variants"][case.variant]
    first = json.loads((run_dir / "ledger.json").read_text())["per_round"][0]
    assert {kind: first["kinds"][kind] for kind in plan["bytes_first_round"]} == plan["bytes_first_round"]
    assert sum(plan["body_bytes_itemised"].values()) == first["kinds"]["body"]


def test_a_body_travels_once_between_unequal_silos(finished: Finished) -> None:
    """Each element of a silo's delta goes to its one owner: at most the body a silo; new values go to whom holds them.

    Of what crosses between silos, that is: 2 x 2 silos' bodies and the copies that tensor ranks hold, less what an
    owner holds itself. The owner is of the other silo for about half of the elements.
    """
    case = CASES["trim, tensor 2 beside data 2"]
    run_dir = finished(case.ranks, **case.sections(case.parallel))
    body = sum(tensor.numel() for name, tensor in final_state(run_dir).items() if name.startswith("body/"))
    for entry in json.loads((run_dir / "ledger.json").read_text())["per_round"]:
        crossing = entry["groups"]["federation/body"] / 4
        deltas = body  # half of each of two silos' bodies is owned by the other
        assert 1.9 * deltas < crossing < 2.2 * deltas
