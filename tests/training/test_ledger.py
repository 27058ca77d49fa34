"""Bytes on the wire, measured where they are sent, against what was computed beforehand and what the paper claims."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dept.models.build import build_body
from megatron_dept.training.plan import build_plan
from tests.support.corpus import Corpus
from tests.support.runs import small_config, train
from tests.training.conftest import Finished
from tests.training.interrupts import Stop, stopped
from tests.training.plain_run import vocabulary_size

DEPT = {"rounds": 2, "n_local": 1}
VALIDATED = {"evaluation": {"interval_rounds": 1, "max_tokens": 200}}


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    """Every round's entry."""
    return json.loads((run_dir / "ledger.json").read_text())["per_round"]


def run(finished: Finished, variant: str, silos: int, data: int, stage: int) -> Path:
    """Three sources; so with two silos the second slot has an idle one."""
    return finished(
        silos * data,
        dept={**DEPT, "variant": variant},
        parallel={"silos": silos, "zero_stage": stage},
        **VALIDATED,
    )


LAYOUTS = [
    ("glob", 1, 1, 1),
    ("glob", 1, 2, 2),
    ("glob", 2, 1, 0),
    ("glob", 2, 1, 3),
    ("glob", 2, 2, 0),
    ("glob", 2, 2, 1),
    ("glob", 2, 2, 3),
    ("trim", 2, 1, 1),
    ("trim", 2, 2, 2),
    ("spec", 1, 2, 3),
    ("spec", 2, 1, 2),
    ("spec_opt", 2, 2, 1),
]


@pytest.mark.parametrize(("variant", "silos", "data", "stage"), LAYOUTS)
def test_measured_bytes_are_the_predicted_ones(
    finished: Finished, variant: str, silos: int, data: int, stage: int
) -> None:
    """To the byte, by kind, every round; rows fetched for validation are a kind of their own."""
    entries = ledger(run(finished, variant, silos, data, stage))
    assert len(entries) == DEPT["rounds"]
    for entry in entries:
        assert set(entry["predicted"]) == {"body", "embedding", "position", "evaluation"}
        assert {kind: entry["kinds"][kind] for kind in entry["predicted"]} == entry["predicted"]


@pytest.mark.parametrize("data", [1, 2])
def test_rows_in_bf16_are_half_the_bytes_and_foretold(finished: Finished, data: int) -> None:
    """Of rows and deltas between silos; ids, counts and the body are what they were."""
    sections = {"dept": {**DEPT, "variant": "trim"}, "parallel": {"silos": 2, "zero_stage": data}, **VALIDATED}
    entries = zip(
        ledger(finished(2 * data, **sections)),
        ledger(finished(2 * data, **sections, embedding={"wire": "bf16"})),
        strict=True,
    )
    for whole, half in entries:
        assert {kind: half["kinds"][kind] for kind in half["predicted"]} == half["predicted"]
        for kind in ("embedding", "position", "evaluation"):
            assert half["groups"][f"federation/{kind}"] * 2 == whole["groups"][f"federation/{kind}"] > 0
        assert half["kinds"]["body"] == whole["kinds"]["body"]


@pytest.mark.parametrize(("silos", "data", "stage"), [layout[1:] for layout in LAYOUTS if layout[0] == "glob"])
def test_the_body_moves_twice_its_size_and_some_padding(
    finished: Finished, corpus: Corpus, silos: int, data: int, stage: int
) -> None:
    """2 x |body| x (S - 1) elements, all silos together; padding: under an element a parameter and rank, and share."""
    run_dir = run(finished, "glob", silos, data, stage)
    parameters = list(build_body(small_config(corpus, run_dir).model, 0).parameters())
    leading = 2 * sum(parameter.numel() for parameter in parameters) * (silos - 1) * 4
    most = 2 * (len(parameters) + 4) * (silos - 1) * data * silos * 4
    for entry in ledger(run_dir):
        assert leading <= entry["kinds"]["body"] <= leading + most
        assert entry["groups"].get("silo/body", 0) == 0


@pytest.mark.parametrize("variant", ["spec", "spec_opt"])
def test_spec_moves_no_embedding_byte_between_silos(finished: Finished, variant: str) -> None:
    """The ledger, counted at the communicator, says 0: for training and for validation; bodies and control do move."""
    for stage, data in ((1, 1), (1, 2)):
        for entry in ledger(run(finished, variant, 2, data, stage)):
            between = {
                key.split("/")[1]: count for key, count in entry["groups"].items() if key.startswith("federation/")
            }
            assert between["body"] > 0 and between["control"] > 0
            assert {kind for kind, count in between.items() if count} == {"body", "control"}


def test_glob_and_trim_do_move_them(finished: Finished) -> None:
    """So the zero above is not a ledger that cannot count."""
    glob, trim = (ledger(run(finished, variant, 2, 1, 1))[0]["groups"] for variant in ("glob", "trim"))
    assert glob["federation/embedding"] != trim["federation/embedding"]
    assert glob["federation/position"] == trim["federation/position"]
    for entry in (glob, trim):
        assert min(entry[f"federation/{kind}"] for kind in ("embedding", "position", "evaluation")) > 0


def test_one_process_sends_nothing(finished: Finished) -> None:
    for entry in ledger(run(finished, "glob", 1, 1, 1)):
        assert not any(entry["kinds"].values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_std_pays_for_gradients_every_step(finished: Finished, corpus: Corpus, stage: int) -> None:
    """Two data ranks: each step reduces every gradient of body and tables once. An all-reduce of P fp32 elements costs
    2 ranks 2 x 4 P bytes together, a reduce to its owner or a reduce-scatter half of that; ZeRO gathers parameters."""
    dept = {"variant": "std", "std_tau": 1.0, "rounds": 2, "n_local": 3}
    run_dir = finished(2, dept=dept, optimizer={"epsilon": 1e-3}, parallel={"zero_stage": stage})
    config = small_config(corpus, run_dir)
    body = sum(parameter.numel() for parameter in build_body(config.model, 0).parameters())
    tables = (vocabulary_size(config) + config.model.seq_length) * config.model.hidden_size
    for number, entry in enumerate(ledger(run_dir)):
        per_step = entry["groups"]["silo/gradient"] / dept["n_local"] / 4
        least, most = (2 if stage == 0 else 1) * body + 2 * tables, 2 * body + 2 * tables
        assert least <= per_step <= most * 1.02, "2 % for padding and for norms reduced beside"
        # Before the first step DeepSpeed gives every data rank the first one's parameters.
        assert (entry["groups"].get("silo/parameter", 0) > 0) == (stage > 0 or number == 0)
        assert not any(key.startswith("federation/") for key in entry["groups"])


def test_an_interrupted_round_keeps_what_it_has_sent(corpus: Corpus, tmp_path: Path) -> None:
    """Stopped in its second slot and resumed: what was sent before goes on with the checkpoint, and only the rows that
    silo 0 fetches a second time (those of the other silo's half) come on top."""
    config = small_config(corpus, tmp_path / "run", dept={"rounds": 1}, parallel={"silos": 2})
    stopped(config, 2, Stop(rank=0, step=5))
    train(config, ranks=2)
    (entry,) = ledger(config.run_dir)
    row = config.model.hidden_size * 4
    again = {"body": 0, "embedding": vocabulary_size(config) // 2 * row, "position": config.model.seq_length // 2 * row}
    assert {kind: entry["kinds"][kind] - entry["predicted"][kind] for kind in again} == again


@pytest.mark.parametrize(
    ("variant", "silos", "sampled", "idle"),
    [("glob", 2, None, 0), ("glob", 3, None, 0), ("spec", 4, None, 1), ("glob", 4, 1, 3), ("std", 1, None, 0)],
)
def test_the_plan_counts_idle_silos(
    corpus: Corpus, tmp_path: Path, variant: str, silos: int, sampled: int | None, idle: int
) -> None:
    """Three sources."""
    dept = {**DEPT, "variant": variant, "sources_per_round": sampled}
    config = small_config(corpus, tmp_path, dept=dept, parallel={"silos": silos})
    plan = build_plan(config, silos)
    assert plan["idle_silos"] == idle
    slots = plan["variants"][variant]["first_round_sources"]
    assert variant == "std" or max(0, silos - len(slots)) == idle


def test_the_plan_itemises_the_bodys_padding(corpus: Corpus, tmp_path: Path) -> None:
    """25,472 elements over 3 data ranks and 2 silos under ZeRO 0: the body is padded to a multiple of 3; whatever is
    not the formula's is padding, and the sum is what is sent."""
    parallel = {"silos": 2, "zero_stage": 0}
    config = small_config(corpus, tmp_path, parallel=parallel, training={"global_batch_size": 6})
    plan = build_plan(config, 6)
    entry = plan["variants"]["glob"]
    body = plan["body_parameters"]
    moved = 2 * (2 - 1) * 4
    padded = -(-body // 3) * 3
    assert entry["body_bytes_itemised"] == {
        "formula": moved * body,
        "copies_of_tensor_ranks": 0,
        "partition_padding": moved * (padded - body),
        "scales": 0,
    }
    assert sum(entry["body_bytes_itemised"].values()) == entry["bytes_first_round"]["body"]
    assert padded > body
