"""Start again on another layout: what was saved by name is loaded to the bit, and the run goes on within tolerance."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dept.checkpoint.reader import Checkpoint
from tests.support.corpus import Corpus
from tests.support.runs import final_state, largest_difference, losses, small_config, train
from tests.training.conftest import Finished
from tests.training.interrupts import Stop, killed, resaved, stopped, whole_state
from tests.training.test_identities import SMOOTH, TOLERANCE

FULL = {"inner_state": "keep", "outer": {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}}
"""With momenta to carry, of the outer and of the inner optimizers."""


@dataclass(frozen=True)
class Layout:
    silos: int
    data: int = 1
    stage: int = 1
    tensor: int = 1
    pipe: int = 1

    @property
    def ranks(self) -> int:
        return self.silos * self.data * self.tensor * self.pipe

    @property
    def parallel(self) -> dict[str, int]:
        return {
            "silos": self.silos,
            "zero_stage": self.stage,
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipe,
        }

    def __str__(self) -> str:
        return f"{self.silos}x{self.pipe}x{self.data}x{self.tensor}-zero{self.stage}"


@dataclass(frozen=True)
class Case:
    """Stopped by `stop` on one layout, or killed after its first round where that is None; gone on with on another."""

    before: Layout
    after: Layout
    stop: Stop | None
    variant: str = "trim"
    dept: dict[str, Any] = field(default_factory=lambda: FULL)

    def sections(self, layout: Layout) -> dict[str, Any]:
        return {
            "dept": {"variant": self.variant, **self.dept},
            "parallel": layout.parallel,
            "optimizer": SMOOTH,
            "checkpoint": {"keep_last": 9},
        }


CASES = {
    "two silos to one process, mid-slot": Case(Layout(2), Layout(1, stage=3), Stop(0, 2)),
    "two silos to one process, second slot of round two": Case(Layout(2, stage=0), Layout(1, stage=2), Stop(0, 11)),
    "two silos to one process, at the boundary": Case(Layout(2), Layout(1), None, "spec"),
    "one process to two silos, second source": Case(Layout(1, stage=2), Layout(2, stage=0), Stop(0, 5)),
    "one process to two silos, at the boundary": Case(Layout(1), Layout(2, stage=3), None, "spec_opt"),
    "two data ranks to one": Case(Layout(1, 2, stage=2), Layout(1, stage=1), Stop(1, 4), "glob"),
    "one data rank to two": Case(Layout(1, stage=3), Layout(1, 2, stage=3), Stop(0, 8), "spec"),
    "data ranks become silos": Case(Layout(1, 2, stage=3), Layout(2, stage=1), Stop(0, 2), "trim"),
    "silos of two to a silo of two": Case(Layout(2, 2, stage=3), Layout(1, 2, stage=0), Stop(0, 2), "glob"),
    "eight ranks to one process, mid-slot": Case(Layout(2, 2, tensor=2), Layout(1, stage=3), Stop(0, 2), "spec"),
    "one process to eight ranks, at the boundary": Case(Layout(1), Layout(2, 2, pipe=2), None),
    "pipeline to tensor ranks, second slot": Case(Layout(1, pipe=2), Layout(1, tensor=2, stage=3), Stop(0, 5), "glob"),
    "tensor ranks to a pipeline, mid-slot": Case(Layout(2, tensor=2), Layout(1, 2, pipe=2), Stop(0, 2), "spec_opt"),
    "std, tensor ranks to a pipeline": Case(Layout(1, tensor=2, stage=2), Layout(1, pipe=2), Stop(0, 4), "std", {}),
    "std, two data ranks to one": Case(Layout(1, 2, stage=3), Layout(1), Stop(0, 4), "std", {}),
    "act, one to two": Case(Layout(1), Layout(1, 2, stage=2), Stop(0, 5), "act", {}),
}


def summed_deltas(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with the silos' summed deltas added up: silos that are gone have left theirs to those that are."""
    whole = {path: tensor for path, tensor in state.items() if not path.startswith("delta/")}
    for path in sorted(path for path in state if path.startswith("delta/")):
        name = "delta/" + path.split("/", 2)[2]
        whole[name] = whole[name] + state[path] if name in whole else state[path]
    return whole


FURTHER = {
    "two silos to one process, second slot of round two",
    "two silos to one process, at the boundary",
    "two data ranks to one",
    "one data rank to two",
    "data ranks become silos",
    "silos of two to a silo of two",
    "std, two data ranks to one",
}
"""Of data ranks and silos alone: for make test-long."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in FURTHER)) for name in CASES])
def test_another_layout_takes_over(finished: Finished, corpus: Corpus, tmp_path: Path, name: str) -> None:
    """Saved again by the other layout, before any step, every tensor has the same bits; then the same run, within
    tolerance of the one that was never stopped and never moved."""
    case = CASES[name]
    run_dir = tmp_path / "run"
    before = small_config(corpus, run_dir, **case.sections(case.before))
    after = small_config(corpus, run_dir, **case.sections(case.after))
    if case.stop is None:
        saved = killed(before, case.before.ranks, after_save=1)
    else:
        saved = stopped(before, case.before.ranks, case.stop)
        assert saved.manifest["progress"]["flights"]
    again = resaved(after, case.after.ranks)
    assert again.directory != saved.directory
    found, wanted = summed_deltas(whole_state(again)), summed_deltas(whole_state(saved))
    # A silo that starts a source at once has one more under way than the checkpoint.
    assert {path for path in found.keys() - wanted.keys() if not path.startswith("flight/")} == set()
    assert wanted.keys() <= found.keys(), wanted.keys() - found.keys()
    assert [path for path in wanted if not torch.equal(found[path], wanted[path])] == []
    for counter in ("round", "done", "cursors", "steps"):
        kept = saved.manifest["progress"][counter]
        now = again.manifest["progress"][counter]
        assert kept == (now if counter in ("round", "done") else {name: now[name] for name in kept}), counter

    assert train(after, case.after.ranks) == [True] * case.after.ranks
    never_stopped = finished(case.before.ranks, **case.sections(case.before))
    assert losses(run_dir) == pytest.approx(losses(never_stopped), rel=TOLERANCE)
    assert largest_difference(final_state(run_dir), final_state(never_stopped)) < TOLERANCE


def test_local_phases_that_wait_for_their_turn_are_carried_over(
    finished: Finished, corpus: Corpus, tmp_path: Path
) -> None:
    """Two silos caught in two sources; one process finishes the first, is stopped in it, and again in the second."""
    case = CASES["two silos to one process, mid-slot"]
    run_dir = tmp_path / "run"
    two, one = (small_config(corpus, run_dir, **case.sections(layout)) for layout in (Layout(2), Layout(1)))
    flights = [
        set(stopped(two, 2, Stop(0, 2)).manifest["progress"]["flights"]),
        set(stopped(one, 1, Stop(0, 1)).manifest["progress"]["flights"]),
        set(stopped(one, 1, Stop(0, 1)).manifest["progress"]["flights"]),
    ]
    # The first process ends latin's third step, and with it its slot; so the next is stopped in another's: greek's,
    # unless the silo that trained it had run ahead.
    assert flights[:2] == [{"latin", "greek"}] * 2 and len(flights[2]) == 1 and flights[2] != {"latin"}
    assert train(one) == [True]
    never_stopped = finished(2, **case.sections(Layout(2)))
    assert losses(run_dir) == pytest.approx(losses(never_stopped), rel=TOLERANCE)
    assert largest_difference(final_state(run_dir), final_state(never_stopped)) < TOLERANCE


def test_a_checkpoint_is_the_same_whatever_ranks_wrote_it(finished: Finished) -> None:
    """Names, shapes and vocabularies in a final checkpoint do not depend on silos, stages, ranks or ZeRO."""
    case = CASES["two data ranks to one"]
    shapes = []
    for layout in (Layout(1), Layout(1, 2, stage=2), Layout(2, 2, stage=3), Layout(1, pipe=2, tensor=2)):
        state = whole_state(Checkpoint.open(finished(layout.ranks, **case.sections(layout))))
        shapes.append({path: (tensor.dtype, tuple(tensor.shape)) for path, tensor in state.items()})
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]
