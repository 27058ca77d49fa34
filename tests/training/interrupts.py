"""Runs that are stopped or killed at a chosen moment, by real signals, and what their checkpoints hold."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from tests.support.distributed import run_ranks
from tests.support.runs import losses, metrics, train_rank

SECONDS_TO_ARRIVE = 0.5
"""By then a silo that has nothing left to do waits for the others, and a rank that got a signal has passed it on."""


@dataclass(frozen=True)
class Stop:
    """While `rank` is in its `step`-th inner step (from 1), SIGTERM goes to `target`, itself where that is None.

    A target other than itself is one that waits by then: the sender gives it the time to get there. Where it has steps
    of its own to train first, silo 0's are `after`.
    """

    rank: int
    step: int
    target: int | None = None
    after: int = 0


def stopped(config: RunConfig, ranks: int, stop: Stop) -> Checkpoint:
    """A run that `stop` ends with a checkpoint; returns that."""
    assert run_ranks(ranks, _stopped_rank, config, stop) == [False] * ranks
    return Checkpoint.open(config.run_dir)


def killed(config: RunConfig, ranks: int, after_save: int) -> Checkpoint:
    """A run whose ranks are all killed (SIGKILL) as soon as their `after_save`-th checkpoint (from 1) is committed."""
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(ranks, _killed_rank, config, after_save)
    return Checkpoint.open(config.run_dir)


def resaved(config: RunConfig, ranks: int) -> Checkpoint:
    """Start `config` from its checkpoint and save at once, all state having been through engine, tables and store."""
    assert run_ranks(ranks, _resaved_rank, config) == [False] * ranks
    return Checkpoint.open(config.run_dir)


def whole_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name, whatever files its pieces are in."""
    return {path: checkpoint.index.read(path) for path in checkpoint.index.paths("")}


def assert_same_bits(checkpoint: Checkpoint, expected: Checkpoint) -> None:
    """Two checkpoints hold the same tensors, to the bit, and the same counters."""
    found, wanted = whole_state(checkpoint), whole_state(expected)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    for counter in ("round", "sampled", "done", "dropped", "flights", "cursors", "steps", "skipped"):
        assert checkpoint.manifest["progress"][counter] == expected.manifest["progress"][counter], counter


def assert_same_run(run_dir: Path, never_stopped: Path) -> None:
    """The same losses, final hash and final state as the run that was never stopped."""
    assert losses(run_dir) == losses(never_stopped)
    hashes, expected = (
        {(line["round"], line["silo"]): line["body_hash"] for line in metrics(directory, "round")}
        for directory in (run_dir, never_stopped)
    )
    assert hashes == expected
    assert_same_bits(Checkpoint.open(run_dir), Checkpoint.open(never_stopped))


def steps_logged(run_dir: Path, silo: int) -> int:
    """Inner steps that a silo has trained so far."""
    return sum(line["silo"] == silo for line in metrics(run_dir, "step"))


def _stopped_rank(launch: Launch, config: RunConfig, stop: Stop) -> bool:
    from megatron_dept.engine.silo_engine import SiloEngine

    pids = config.run_dir.parent
    (pids / f"{config.run_dir.name}.{launch.rank}.pid").write_text(str(os.getpid()))
    steps = 0
    whole = SiloEngine.train_step

    def step(self: SiloEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if launch.rank == stop.rank and steps == stop.step:
            if stop.target is None:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                while steps_logged(config.run_dir, 0) < stop.after:
                    time.sleep(0.02)
                time.sleep(SECONDS_TO_ARRIVE)
                os.kill(int((pids / f"{config.run_dir.name}.{stop.target}.pid").read_text()), signal.SIGTERM)
                time.sleep(SECONDS_TO_ARRIVE)
        return whole(self, *args, **kwargs)

    SiloEngine.train_step = step  # type: ignore[method-assign]
    return train_rank(launch, config)


def _killed_rank(launch: Launch, config: RunConfig, after_save: int) -> bool:
    from megatron_dept.training.state import RunState

    saves = 0
    whole = RunState.save

    def save(self: RunState, *args: Any) -> Path:
        nonlocal saves
        saves += 1
        path = whole(self, *args)
        if saves == after_save:
            # Removing old checkpoints is the writer's, after all others have left.
            self._world.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    RunState.save = save  # type: ignore[method-assign]
    try:
        return train_rank(launch, config)
    except Exception:
        # Another rank was quicker to die.
        os.kill(os.getpid(), signal.SIGKILL)
        raise


def _resaved_rank(launch: Launch, config: RunConfig) -> bool:
    from megatron_dept.training.local_phase import LocalPhase
    from megatron_dept.training.trainer import Trainer

    def train(self: Trainer, local: LocalPhase, saves: set[int]) -> bool:
        self._meet(local)
        self._save(local)
        return False

    def run(self: Trainer) -> bool:
        if self.progress.mid_round:
            return self._round()
        self._save(None)
        return False

    Trainer._train = train  # type: ignore[method-assign]
    Trainer.run = run  # type: ignore[method-assign]
    return train_rank(launch, config)
