"""Stop anywhere, start again: the same losses and the same final bits as a run never stopped, at the same layout.

Three sources, so on two silos a round has two slots, the second with silo 1 idle; two rounds of three steps a source.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_dept.checkpoint.reader import committed
from tests.support.corpus import Corpus
from tests.support.runs import small_config, train
from tests.training.conftest import Finished
from tests.training.interrupts import Stop, assert_same_run, killed, steps_logged, stopped

NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}


@dataclass(frozen=True)
class Case:
    """`flights`: where the stop must have caught the sources on the stopped silo, source -> steps done."""

    stop: Stop
    flights: dict[str, int]
    variant: str = "glob"
    silos: int = 2
    data: int = 1
    stage: int = 1
    dept: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    embedding: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.silos * self.data

    @property
    def sections(self) -> dict[str, Any]:
        return {
            "dept": {"variant": self.variant, **self.dept},
            "parallel": {"silos": self.silos, "zero_stage": self.stage},
            "checkpoint": self.checkpoint,
            "training": self.training,
            "embedding": self.embedding,
        }


KEEP = {"inner_state": "keep"}
CASES = {
    "in the middle of a slot": Case(Stop(0, 2), {"latin": 2}),
    "in the first step": Case(Stop(1, 1), {"greek": 1}, variant="spec_opt", dept=KEEP, stage=3),
    "one silo alone is told": Case(Stop(1, 2), {"greek": 2}, variant="trim", stage=3, dept={"outer": NESTEROV}),
    "in the second slot, beside an idle silo": Case(Stop(0, 5), {"code": 2}, variant="spec", dept=KEEP),
    "in the second round": Case(Stop(0, 8), {"latin": 2}, variant="spec", dept={**KEEP, "outer": NESTEROV}),
    "the idle silo is told, while it waits": Case(Stop(0, 5, target=1), {"code": 2}, variant="spec_opt"),
    "a silo that is done is told, while it waits": Case(
        Stop(1, 2, target=0, after=3), {"latin": 3, "greek": 2}, stage=0
    ),
    "at a round's last step": Case(Stop(0, 6), {"code": 3}, dept={**KEEP, "outer": NESTEROV}, stage=3),
    "at the run's last step, saving only at the end": Case(
        Stop(0, 12), {"code": 3}, variant="trim", checkpoint={"save_interval": 0}
    ),
    "one data rank of four ranks is told": Case(Stop(3, 2), {"greek": 2}, variant="trim", data=2, stage=2),
    "a data rank of the idle silo is told": Case(Stop(0, 5, target=3), {"code": 2}, data=2, stage=3, dept=KEEP),
    "std, the second data rank": Case(Stop(1, 4), {"mixture": 1}, variant="std", silos=1, data=2),
    "act, in its second cycle": Case(Stop(0, 5), {"mixture": 2}, variant="act", silos=1, stage=3),
    "bf16, whose masters are fp32": Case(Stop(0, 5), {"code": 2}, dept=KEEP, training={"precision": "bf16"}, stage=3),
    "tables on disk, rows in bf16, a slot's deltas waiting": Case(
        Stop(0, 5),
        {"code": 2},
        variant="trim",
        dept={"outer": NESTEROV},
        embedding={"row_table": "disk", "wire": "bf16"},
    ),
    "one process": Case(Stop(0, 4), {"greek": 1}, variant="trim", silos=1, dept={**KEEP, "outer": NESTEROV}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_as_if_never_stopped(
    finished: Finished, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    """SIGTERM, a checkpoint at the end of the step it came in, and the same command again: bitwise."""
    case = CASES[name]
    config = small_config(corpus, tmp_path / "run", **case.sections)
    checkpoint = stopped(config, case.ranks, case.stop)
    flights = {source: flight["step"] for source, flight in checkpoint.manifest["progress"]["flights"].items()}
    assert flights.items() >= case.flights.items(), f"stopped at {flights}"
    assert steps_logged(config.run_dir, case.stop.rank // case.data) == case.stop.step
    assert train(config, case.ranks) == [True] * case.ranks
    assert_same_run(config.run_dir, finished(case.ranks, **case.sections))


def test_a_run_stopped_again_and_again(finished: Finished, corpus: Corpus, tmp_path: Path) -> None:
    """In its second step, one step later at the slot's end, in the second round, and there again."""
    sections = {"dept": {"variant": "trim", "inner_state": "keep"}, "parallel": {"silos": 2}}
    config = small_config(corpus, tmp_path / "run", **sections)
    for steps in (2, 1, 4, 2):
        stopped(config, 2, Stop(0, steps))
    assert train(config, 2) == [True] * 2
    assert_same_run(config.run_dir, finished(2, **sections))


@pytest.mark.parametrize(
    ("variant", "ranks", "sections"),
    [
        ("glob", 2, {"parallel": {"silos": 2, "zero_stage": 3}, "dept": {"outer": NESTEROV}}),
        ("spec_opt", 2, {"parallel": {"silos": 2}, "dept": {"inner_state": "keep"}}),
        ("trim", 1, {}),
        ("std", 2, {"parallel": {"zero_stage": 3}}),
        ("act", 1, {}),
    ],
)
def test_a_run_killed_in_its_second_round_goes_on_from_the_first(
    finished: Finished, corpus: Corpus, tmp_path: Path, variant: str, ranks: int, sections: dict[str, Any]
) -> None:
    """SIGKILL right after the boundary's checkpoint."""
    sections = {**sections, "dept": {"variant": variant, **sections.get("dept", {})}}
    config = small_config(corpus, tmp_path / "run", **sections)
    checkpoint = killed(config, ranks, after_save=1)
    assert checkpoint.manifest["round"] == 1 and not checkpoint.manifest["progress"]["flights"]
    assert train(config, ranks) == [True] * ranks
    assert_same_run(config.run_dir, finished(ranks, **sections))


@pytest.mark.parametrize("save", [1, 2, 3])
@pytest.mark.parametrize("variant", ["glob", "spec"])
def test_a_run_killed_after_a_save_within_a_round_goes_on_from_there(
    finished: Finished, corpus: Corpus, tmp_path: Path, variant: str, save: int
) -> None:
    """Every second step is saved, in every slot; the third is in the second round's first slot."""
    sections = {
        "dept": {"variant": variant, "inner_state": "keep", "outer": NESTEROV},
        "parallel": {"silos": 2},
        "checkpoint": {"save_interval": 2, "save_interval_unit": "steps"},
    }
    config = small_config(corpus, tmp_path / "run", **sections)
    checkpoint = killed(config, 2, after_save=save)
    assert checkpoint.manifest["progress"]["flights"]
    assert train(config, 2) == [True] * 2
    assert_same_run(config.run_dir, finished(2, **sections))


def test_what_a_killed_round_left_in_the_store_is_forgotten(finished: Finished, corpus: Corpus, tmp_path: Path) -> None:
    """SPEC with state kept: the second round had stored newer embeddings and moments when it was killed."""
    sections = {"dept": {"variant": "spec", "inner_state": "keep"}}
    config = small_config(corpus, tmp_path / "run", **sections)
    killed(config, 1, after_save=1)
    later = finished(**sections) / "store"
    shutil.rmtree(config.run_dir / "store")
    shutil.copytree(later, config.run_dir / "store")
    assert train(config) == [True]
    assert_same_run(config.run_dir, finished(**sections))


@pytest.mark.parametrize(
    ("checkpoint", "rounds", "expected"),
    [
        # Two sources on one process: a round of 3 steps trains 6. Steps 2, 4 and 6 of each source, 6 being a boundary.
        ({"save_interval": 2, "save_interval_unit": "steps", "keep_last": 9}, 2, [2, 5, 7, 10, 12]),
        ({"save_interval": 4, "save_interval_unit": "steps", "keep_last": 9}, 2, [7, 10, 12]),
        ({"save_interval": 1, "save_interval_unit": "rounds", "keep_last": 9}, 3, [6, 12, 18]),
        ({"save_interval": 2, "save_interval_unit": "rounds", "keep_last": 9}, 3, [12, 18]),
        ({"save_interval": 1, "save_interval_unit": "steps", "keep_last": 3}, 2, [10, 11, 12]),
        ({"save_interval": 1, "save_interval_unit": "rounds", "keep_last": 1}, 3, [18]),
        ({"save_interval": 0}, 2, [12]),
    ],
)
def test_checkpoints_are_saved_when_asked_and_the_last_ones_kept(
    finished: Finished, checkpoint: dict[str, Any], rounds: int, expected: list[int]
) -> None:
    """Named by the steps of all sources together; the end of a run is always saved."""
    run_dir = finished(source_names=["latin", "greek"], dept={"rounds": rounds}, checkpoint=checkpoint)
    assert [path.name for path in committed(run_dir / "checkpoints")] == [f"step-{total:08d}" for total in expected]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in expected]


def test_a_finished_run_started_again_trains_nothing(finished: Finished, corpus: Corpus, tmp_path: Path) -> None:
    sections = {"parallel": {"silos": 2}}
    run_dir = Path(shutil.copytree(finished(2, **sections), tmp_path / "run"))
    config = small_config(corpus, run_dir, **sections)
    before = (run_dir / "metrics.silo0.jsonl").read_text()
    assert train(config, 2) == [True] * 2
    assert (run_dir / "metrics.silo0.jsonl").read_text() == before
    assert_same_run(run_dir, finished(2, **sections))
