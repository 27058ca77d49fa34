"""Continued pre-training: STD from a trained body under one global vocabulary, held against plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dept.checkpoint.reader import Checkpoint
from tests.engine.plain import Plain
from tests.support.corpus import Corpus
from tests.support.runs import final_state, largest_difference, metrics, small_config, train
from tests.training.conftest import Finished
from tests.training.interrupts import Stop, assert_same_run, stopped
from tests.training.plain_run import by_checkpoint_name, first_tables, vocabulary_size
from tests.training.test_identities import SMOOTH, TOLERANCE
from tests.training.test_synchronous import blended_batch


def adapt_sections(start: Path, embedding: str, **dept: Any) -> dict[str, Any]:
    return {
        "phase": "adapt",
        "adapt": {"checkpoint": str(start), "embedding": embedding},
        "dept": {"variant": "std", "rounds": 1, **dept},
        "optimizer": SMOOTH,
    }


@pytest.mark.parametrize(("variant", "embedding"), [("trim", "random"), ("trim", "own"), ("spec_opt", "random")])
@pytest.mark.parametrize("stage", [1, 3])
def test_adapt_is_plain_training_from_the_checkpoints_body(
    finished: Finished, corpus: Corpus, variant: str, embedding: str, stage: int
) -> None:
    """Random: new tables and the full learning rate; own: the checkpoint's tables and half of it. The inner optimizer
    and the schedule begin anew."""
    start = finished(2, dept={"variant": variant}, parallel={"silos": 2})
    sections = {**adapt_sections(start, embedding), "parallel": {"zero_stage": stage}}
    run_dir = finished(**sections)
    config = small_config(corpus, run_dir, **sections)
    checkpoint = Checkpoint.open(start)
    tables = first_tables(config, vocabulary_size(config), "adapt")
    if embedding == "own":
        position = checkpoint.position_table()
        assert position is not None
        tables = checkpoint.index.read("token"), position
    plain = Plain(config, *tables)
    plain.body.load_state_dict(checkpoint.body())
    lines = metrics(run_dir, "step")
    assert [line["learning_rate"] for line in lines[:2]] == pytest.approx(
        [1.5e-3, 3e-3] if embedding == "random" else [0.75e-3, 1.5e-3]
    )
    for step, line in enumerate(lines):
        loss, norm = plain.step(blended_batch(config, step), line["learning_rate"])
        assert (line["loss"], line["grad_norm"]) == pytest.approx((loss, norm), rel=TOLERANCE)
    assert len(lines) == 3
    assert largest_difference(final_state(run_dir), by_checkpoint_name(plain)) < TOLERANCE


def test_a_stopped_adapt_goes_on_as_if_never_stopped(finished: Finished, corpus: Corpus, tmp_path: Path) -> None:
    """From its own checkpoint, not from the one it started with."""
    start = finished(2, dept={"variant": "trim"}, parallel={"silos": 2})
    sections = adapt_sections(start, "own", rounds=2)
    config = small_config(corpus, tmp_path / "run", **sections)
    stopped(config, 1, Stop(0, 5))
    assert train(config) == [True]
    assert_same_run(config.run_dir, finished(**sections))


def test_adapt_leaves_the_checkpoint_it_starts_from_alone(finished: Finished) -> None:
    start = finished(2, dept={"variant": "trim"}, parallel={"silos": 2})
    before = final_state(start)
    finished(**adapt_sections(start, "own"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in final_state(start).items())
