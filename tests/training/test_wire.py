"""Whole runs whose body travels as bf16 or int8: plan, ledger, one body everywhere, and what int8 owes."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dept.checkpoint.reader import Checkpoint, committed
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from tests.support.corpus import Corpus
from tests.support.distributed import run_ranks
from tests.support.runs import final_state, largest_difference, small_config, train, train_rank, train_sites
from tests.training.conftest import Finished
from tests.training.interrupts import Stop, assert_same_run, resaved, stopped, whole_state
from tests.training.test_sites import HOMES, site_configs, sources

NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}
LOSSY = {"bf16": 0.05, "int8": 0.15}
"""Biases begin at zero, so all of them has travelled: what is lost, or comes twice, makes a difference of 1. Rounding,
twice a round, made one of 0.008 and 0.035 in the worst tensor, whose small deltas share a block with large ones."""


def sections(wire: str, silos: int = 2) -> dict[str, Any]:
    # Buckets of one block, so that several are under way.
    return {"dept": {"outer": {**NESTEROV, "wire": wire, "bucket_mb": 0.002}}, "parallel": {"silos": silos}}


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_a_packed_run_sends_what_was_foretold_and_is_near_the_one_in_fp32(
    finished: Finished, corpus: Corpus, wire: str
) -> None:
    """By kind and to the byte. Bodies are compared by hash at each round's end, so here it is enough that it ended."""
    run_dir, exact = finished(2, **sections(wire)), finished(2, **sections("fp32"))
    entries = json.loads((run_dir / "ledger.json").read_text())["per_round"]
    for entry in entries:
        assert {kind: entry["kinds"][kind] for kind in entry["predicted"]} == entry["predicted"]
    plan = json.loads((run_dir / "plan.json").read_text())["variants"]["glob"]
    assert plan["bytes_first_round"]["body"] == entries[0]["kinds"]["body"]
    assert sum(plan["body_bytes_itemised"].values()) == entries[0]["kinds"]["body"]
    whole = json.loads((exact / "ledger.json").read_text())["per_round"][0]["kinds"]["body"]
    scales = plan["body_bytes_itemised"]["scales"]
    assert entries[0]["kinds"]["body"] - scales == whole // {"bf16": 2, "int8": 4}[wire]
    assert (scales > 0) == (wire == "int8")
    difference = largest_difference(final_state(run_dir), final_state(exact))
    assert 0 < difference < LOSSY[wire], "what travels packed is rounded"


def test_int8_goes_on_to_the_bit_with_what_it_owes(finished: Finished, corpus: Corpus, tmp_path: Path) -> None:
    """Stopped in the second round's second slot: deltas summed, and owed of the first round."""
    config = small_config(corpus, tmp_path / "run", **sections("int8"))
    owed = whole_state(stopped(config, 2, Stop(0, 11)))
    for prefix in ("residual/0/", "residual/1/", "residual_of_update/", "delta/0/"):
        assert any(tensor.any() for name, tensor in owed.items() if name.startswith(prefix)), prefix
    assert train(config, 2) == [True] * 2
    assert_same_run(config.run_dir, finished(2, **sections("int8")))


def at_first_boundary(finished: Finished, directory: Path, silos: int) -> tuple[Path, Checkpoint]:
    """A copy of an int8 run of so many silos, back at its first round's end."""
    run_dir = Path(shutil.copytree(finished(silos, **sections("int8", silos)), directory / "run"))
    shutil.rmtree(committed(run_dir / "checkpoints")[-1])
    return run_dir, Checkpoint.open(run_dir)


def test_other_silos_take_over_what_was_owed(finished: Finished, corpus: Corpus, tmp_path: Path) -> None:
    """Three silos' residuals on two: silo 0 has its own and silo 2's; that of the updates is the body's, by name."""
    run_dir, before = at_first_boundary(finished, tmp_path, 3)
    again = resaved(small_config(corpus, run_dir, **sections("int8", 2)), 2)
    found, wanted = whole_state(again), whole_state(before)
    names = [name.removeprefix("residual/1/") for name in wanted if name.startswith("residual/1/")]
    assert names and not any(name.startswith("residual/2/") for name in found)
    for name in names:
        first, second, third = (wanted[f"residual/{silo}/{name}"] for silo in range(3))
        assert torch.equal(found[f"residual/0/{name}"], first + third)
        assert torch.equal(found[f"residual/1/{name}"], second)
        assert torch.equal(found[f"residual_of_update/{name}"], wanted[f"residual_of_update/{name}"])


def _warned(launch: Launch, config: RunConfig) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert train_rank(launch, config)
    return [str(warning.message) for warning in told]


def test_one_process_drops_what_was_owed_and_says_so(finished: Finished, corpus: Corpus, tmp_path: Path) -> None:
    run_dir, _ = at_first_boundary(finished, tmp_path, 2)
    (told,) = run_ranks(1, _warned, small_config(corpus, run_dir, **sections("int8", 1)))
    assert len([line for line in told if "still owed" in line]) == 1, told
    assert Checkpoint.open(run_dir).index.paths("residual") == []


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_launches_of_their_own_send_packed(finished: Finished, corpus: Corpus, tmp_path: Path, wire: str) -> None:
    """Both have one body, near that in fp32, and each its own debt: of what its deltas and its means lost."""
    same = {"dept": sections(wire)["dept"]}
    configs = site_configs(corpus, tmp_path, [{}, {}], **same)
    assert train_sites(configs, [1, 1]) == [True, True]
    first, second = (final_state(config.run_dir) for config in configs)
    shared = {name for name in first if name.startswith("body/")}
    assert [name for name in shared if not torch.equal(first[name], second[name])] == []
    exact = finished(2, **sections("fp32"), sources=sources(corpus, homes=HOMES))
    expected = final_state(exact)
    both = [{name: of[name] for name in shared} for of in (first, expected)]
    assert 0 < largest_difference(*both) < LOSSY[wire]
    for silo, config in enumerate(configs):
        paths = Checkpoint.open(config.run_dir).index.paths("residual")
        assert bool(paths) == (wire == "int8")
        assert all(path.startswith(f"/{silo}/") for path in paths)
        for entry in json.loads((config.run_dir / "ledger.json").read_text())["per_round"]:
            assert entry["kinds"]["body"] == entry["predicted"]["body"] > 0
