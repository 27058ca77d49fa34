"""Ranks that are killed or frozen in any phase: all ranks end in seconds, say which it was and in what phase, leave the
checkpoints whole, and the same command goes on to the same bits."""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_dept.checkpoint.reader import Checkpoint, committed
from megatron_dept.common.errors import EXIT_USER_ERROR
from megatron_dept.config.load import dump_config
from megatron_dept.config.schema import RunConfig
from tests.support.commands import Fault
from tests.support.corpus import Corpus
from tests.support.faults import (
    dies_in_commit,
    dies_in_pack,
    dies_in_save,
    dies_in_step,
    dies_sending,
    elsewhere,
    freezes,
    impatient,
    lingers,
    sleeps,
    suspended,
    together,
)
from tests.support.mortals import End, run_to_end
from tests.support.runs import metrics, small_config, train
from tests.test_launchers import PROJECT, mpirun, start_environment
from tests.training.conftest import Finished
from tests.training.interrupts import assert_same_run
from tests.training.test_sites import site_configs

LIMIT_SECONDS = 30
"""What a run may take at most from a rank's death to its last rank's end."""
KILLED = -9
DATA = {"parallel": {"silos": 2}}
TENSOR = {"parallel": {"silos": 2, "tensor_model_parallel_size": 2}}
PIPE = {"parallel": {"silos": 2, "pipeline_model_parallel_size": 2}}


@dataclass(frozen=True)
class Case:
    """`fault` kills `rank` of four in the second round; `phase`: as the others saw it last."""

    fault: Fault
    rank: int
    phase: str
    sections: dict[str, Any] = field(default_factory=lambda: DATA)

    @property
    def name(self) -> str:
        return f"silo {self.rank // 2}, rank {self.rank}"


CASES = {
    "inner step": Case(dies_in_step(3, 4), 3, "inner step"),
    "pack": Case(dies_in_pack(1, 1), 1, "pack"),
    "exchange": Case(dies_sending(2, "body", "start_all_gather", 1), 2, "exchange"),
    "row exchange": Case(dies_sending(3, "embedding", "all_to_all", 3), 3, "row exchange"),
    "save": Case(dies_in_save(2, 1), 2, "save"),
    "tensor, inner step": Case(dies_in_step(1, 4), 1, "inner step", TENSOR),
    "tensor, row exchange": Case(dies_sending(3, "embedding", "all_to_all", 3), 3, "row exchange", TENSOR),
    "pipe, inner step": Case(dies_in_step(3, 4), 3, "inner step", PIPE),
    "pipe, exchange": Case(dies_sending(1, "body", "start_all_to_all", 1), 1, "exchange", PIPE),
}


def two_sources(corpus: Corpus, run_dir: Path, **sections: Any) -> RunConfig:
    """A collective would wait ten minutes for a rank that is gone."""
    patient = {"timeout_seconds": 600} | sections.pop("training", {})
    return small_config(corpus, run_dir, source_names=["latin", "greek"], training=patient, **sections)


def survivors(ends: list[End], *lost: int) -> list[str]:
    """What all ranks but the `lost` say as they end, which they do in time and with an error's code."""
    assert [ends[rank].code for rank in lost] == [KILLED] * len(lost)
    others = [end for rank, end in enumerate(ends) if rank not in lost]
    assert [end.code for end in others] == [EXIT_USER_ERROR] * len(others), ends
    assert max(end.seconds for end in others) < LIMIT_SECONDS
    return [end.error for end in others]


FURTHER = {"tensor, row exchange", "pipe, inner step"}
"""Phases and layouts that others show one by one: for make test-long."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in FURTHER)) for name in CASES])
def test_a_killed_rank_is_named_and_the_next_start_goes_on(
    finished: Finished, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    config = two_sources(corpus, tmp_path / "run", **case.sections)
    for error in survivors(run_to_end([config], [4], case.fault), case.rank):
        assert re.search(rf": {case.name} is gone \(last seen in phase {case.phase} \d s ago; its process ", error)
        assert error.endswith("; look at that rank's log, then start again: the run resumes from its last checkpoint")
    assert_goes_on(finished, config, case.sections)


def assert_goes_on(finished: Finished, config: RunConfig, sections: dict[str, Any]) -> None:
    """The first round's checkpoint is whole; started again, the run ends as the one that was never disturbed."""
    assert Checkpoint.open(config.run_dir).manifest["round"] == 1
    assert train(config, 4) == [True] * 4
    undisturbed = finished(4, source_names=["latin", "greek"], training={"timeout_seconds": 600}, **sections)
    assert_same_run(config.run_dir, undisturbed)
    assert len(committed(config.run_dir / "checkpoints")) == len(list((config.run_dir / "checkpoints").iterdir()))


def test_the_rank_that_keeps_the_store_is_killed_as_it_commits(
    finished: Finished, corpus: Corpus, tmp_path: Path
) -> None:
    """Its signs of life end with it, but not the note of its phase, which is gone once the run has ended well."""
    config = two_sources(corpus, tmp_path / "run", **DATA)
    for error in survivors(run_to_end([config], [4], dies_in_commit(0, 1)), 0):
        assert re.search(
            r": silo 0, rank 0, which keeps the store of all ranks, is gone \(.*\), last seen in phase save; "
            r"noticed in phase save: ",
            error,
        )
    assert (config.run_dir / "phase").exists()
    assert_goes_on(finished, config, DATA)
    assert not (config.run_dir / "phase").exists()


def test_two_ranks_die_together(corpus: Corpus, tmp_path: Path) -> None:
    """As where a node is lost. One of them is named."""
    config = two_sources(corpus, tmp_path / "run", **DATA)
    fault = together(dies_in_step(2, 1), dies_in_step(3, 1))
    for error in survivors(run_to_end([config], [4], fault), 2, 3):
        assert re.search(r": silo 1, rank [23] is gone \(last seen in phase inner step ", error)


def test_a_rank_of_another_machine_is_missed_after_an_alarm(corpus: Corpus, tmp_path: Path) -> None:
    """Nobody can look at its process: its silence of four beats is enough where another has lost a peer."""
    config = two_sources(corpus, tmp_path / "run", **DATA)
    fault = together(elsewhere(), impatient(beat=0.2, silence=40, grace=5), dies_in_step(3, 1))
    for error in survivors(run_to_end([config], [4], fault), 3):
        assert re.search(r": silo 1, rank 3 is gone \(last seen in phase inner step .*; no sign of life since\)", error)


@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_a_rank_is_missed_by_those_who_share_nothing_with_it(corpus: Corpus, tmp_path: Path, place: str) -> None:
    """Silos of one rank: the other computes for a minute, hears of the death, and is ended by its watch."""
    config = two_sources(corpus, tmp_path / "run", **DATA)
    silence = {"here": 40, "elsewhere": 2}[place]
    faults = [impatient(beat=0.2, silence=silence, grace=0.5), dies_in_step(1, 1), sleeps(0, 1, 60)]
    ends = run_to_end([config], [2], together(*faults, *([elsewhere()] if place == "elsewhere" else [])))
    (error,) = survivors(ends, 1)
    assert re.match(r"error: silo 0, rank 0: silo 1, rank 1 is gone \(last seen in phase inner step ", error)
    assert "; noticed in phase inner step: " in error


@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_is_missed_though_its_connections_stand(corpus: Corpus, tmp_path: Path, rank: int) -> None:
    """As one behind a network that has gone silent; rank 0 takes its store's answers with it."""
    config = two_sources(corpus, tmp_path / "run", **DATA)
    fault = together(impatient(beat=0.2, silence=2, grace=0.5), freezes(rank, 1))
    (error,) = survivors(run_to_end([config], [2], fault), rank)
    name = f"silo {rank}, rank {rank}"
    if rank == 0:
        assert f"{name}, which keeps the store of all ranks, has not answered for " in error
    else:
        assert f"{name} is gone (last seen in phase inner step " in error
    assert error.partition("; noticed in phase ")[2].startswith(("inner step: ", "meeting: "))


def test_a_run_that_was_suspended_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    """Ctrl-Z and fg: no rank has listened meanwhile, so none has been silent."""
    config = two_sources(corpus, tmp_path / "run", **DATA)
    ends = run_to_end([config], [2], together(impatient(beat=0.1, silence=1.5, grace=0.0), suspended(1, 4)))
    assert [(end.code, end.stderr) for end in ends] == [(0, "")] * 2


@pytest.mark.parametrize("rank", [0, 3], ids=["the one with the store", "another"])
def test_separate_launches_end_together(corpus: Corpus, tmp_path: Path, rank: int) -> None:
    """Two launches of two ranks; the other launch's are deep in a long step when a rank of this one dies."""
    silo, own = divmod(rank, 2)
    configs = site_configs(corpus, tmp_path, [{}, {}], training={"timeout_seconds": 600})
    faults = [impatient(beat=0.2, silence=15, grace=0.5), dies_in_step(rank, 1)]
    fault = together(*faults, *(sleeps(other, 1, 60) for other in range(4) if other // 2 != silo))
    for error in survivors(run_to_end(configs, [2, 2], fault), rank):
        # A rank is called as in its own launch's logs.
        kept = ", which keeps the store of all ranks," if rank == 0 else ""
        assert f": silo {silo}, rank {own}{kept} is gone (" in error
        assert "last seen in phase " in error
    for config in configs:
        assert not committed(config.run_dir / "checkpoints")


def test_an_ordinary_run_alarms_nobody(corpus: Corpus, tmp_path: Path) -> None:
    """Ranks that end well say goodbye, whoever is first; with a watch that looks all the time."""
    config = two_sources(corpus, tmp_path / "run", **DATA)
    ends = run_to_end([config], [4], together(impatient(beat=0.02, silence=15, grace=0.0), lingers(0, 2)))
    assert [(end.code, end.stderr) for end in ends] == [(0, "")] * 4
    assert len(metrics(config.run_dir, "step")) == 2 * 2 * 3


def test_a_rank_that_fails_under_mpi_ends_all(corpus: Corpus, tmp_path: Path) -> None:
    """It leaves without MPI's farewell, which would wait for the others: mpirun ends them, spoken or not."""
    pytest.importorskip("mpi4py")
    config = two_sources(corpus, tmp_path / "run", **DATA, federation={"backend": "mpi"})
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    command = [*mpirun(), sys.executable, "tests/support/dying_rank.py", str(file)]
    more = {"DYING": "bug 1 4"}
    done = subprocess.run(
        command, cwd=PROJECT, env=start_environment() | more, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "ZeroDivisionError: nobody foresaw this" in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for error in errors:
        assert "silo 1, rank 1 failed in phase inner step (nobody foresaw this); noticed in phase " in error
    assert Checkpoint.open(config.run_dir).manifest["round"] == 1
