"""What goes wrong in a test: each returns a function that every rank calls before the program starts."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from megatron_dept.topology.launch import Launch

Fault = Callable[[Launch], None]


def full_disk(rank: int, save: int, limit: int = 4096) -> Fault:
    """From its `save`-th checkpoint on (counted from 1) the kernel lets `rank` write no file beyond `limit` bytes."""
    return partial(_full_disk, rank, save, limit)


def little_space(rank: int, limit: int) -> Fault:
    """From the start the kernel lets `rank` write no file beyond `limit` bytes."""
    return partial(_little_space, rank, limit)


def nan_gradients(source: str, steps: Collection[int]) -> Fault:
    """The loss of `source` is not a number at these sequential steps (counted from 0)."""
    return partial(_nan_gradients, source, frozenset(steps))


def bug(rank: int, step: int) -> Fault:
    """`rank` raises what nobody foresaw at its `step`-th inner step (counted from 0)."""
    return partial(_at_step, rank, step, _raise)


def dies_in_step(rank: int, step: int) -> Fault:
    """`rank` is killed in the middle of its `step`-th inner step (counted from 0), between forward and backward."""
    return partial(_dies_in_step, rank, step)


def dies_in_exchange(rank: int, round: int) -> Fault:
    """`rank` is killed at the end of its `round`-th round (counted from 0), a second after it let the others wait."""
    return partial(_dies_in_exchange, rank, round)


def dies_in_pack(rank: int, slot: int) -> Fault:
    """`rank` is killed as it takes its body's delta at the end of its `slot`-th slot (counted from 0)."""
    return partial(_dies_in_pack, rank, slot)


def dies_sending(rank: int, kind: str, operation: str, call: int) -> Fault:
    """`rank` is killed in its `call`-th (from 0) collective `operation` of payload `kind`, when others wait for it."""
    return partial(_dies_sending, rank, kind, operation, call)


def dies_in_save(rank: int, save: int) -> Fault:
    """`rank` is killed in its `save`-th checkpoint (counted from 0), half of its part written."""
    return partial(_dies_in_save, rank, save)


def dies_in_commit(rank: int, save: int) -> Fault:
    """`rank`, which commits, is killed in its `save`-th checkpoint (from 0): all parts written, the manifest not."""
    return partial(_dies_in_commit, rank, save)


def freezes(rank: int, step: int) -> Fault:
    """`rank` is stopped (SIGSTOP) as its `step`-th inner step (counted from 0) begins: its connections stay open."""
    return partial(_at_step, rank, step, _freeze)


def suspended(step: int, seconds: float) -> Fault:
    """All ranks are stopped as their `step`-th inner step (counted from 0) begins, and go on so many seconds later.

    In rank order each stops half a second before the one before it and goes on half a second after it.
    """
    return partial(_suspended, step, seconds)


def lingers(rank: int, seconds: float) -> Fault:
    """`rank` takes so long to leave when the run has ended well and the others go."""
    return partial(_lingers, rank, seconds)


def sleeps(rank: int, step: int, seconds: float) -> Fault:
    """`rank` takes so long for its `step`-th inner step (counted from 0), in no collective."""
    return partial(_at_step, rank, step, partial(time.sleep, seconds))


def impatient(beat: float, silence: float, grace: float) -> Fault:
    """Every rank shows life and looks for others this often, takes one that is silent for `silence` s for gone, and
    waits `grace` s for itself to find out."""
    return partial(_impatient, beat, silence, grace)


def elsewhere() -> Fault:
    """Every rank is as if on a machine of its own: none can look at another's process."""
    return _elsewhere


def together(*faults: Fault) -> Fault:
    """All of them."""
    return partial(_together, faults)


def _together(faults: tuple[Fault, ...], launch: Launch) -> None:
    for fault in faults:
        fault(launch)


def _elsewhere(launch: Launch) -> None:
    from megatron_dept.training import watch

    watch.own_process = lambda: None


def _impatient(beat: float, silence: float, grace: float, launch: Launch) -> None:
    from megatron_dept.training import watch

    watch.BEAT_SECONDS, watch.SILENCE_SECONDS, watch.GRACE_SECONDS = beat, silence, grace


def is_sent(number: int, rank: int, step: int, times: int = 1) -> Fault:
    """`rank` is sent a signal as its `step`-th inner step (counted from 0) begins."""
    return partial(_is_sent, number, rank, step, times)


def _is_sent(number: int, rank: int, step: int, times: int, launch: Launch) -> None:
    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    _at_step(rank, step, send, launch)


def _dies_in_step(rank: int, step: int, launch: Launch) -> None:
    from megatron_dept.models.embedding import SourceEmbedding

    loss = SourceEmbedding.loss

    def fatal() -> None:
        def dying(self: SourceEmbedding, hidden: Tensor, targets: Tensor) -> Tensor:
            loss(self, hidden, targets)
            _die()

        SourceEmbedding.loss = dying  # type: ignore[method-assign]

    _at_step(rank, step, fatal, launch)


def _dies_in_exchange(rank: int, round: int, launch: Launch) -> None:
    from megatron_dept.federation.body_exchange import BodyExchange

    if launch.rank != rank:
        return
    rounds = -1
    finish = BodyExchange.finish

    def last(self: BodyExchange, sources: int) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == round:
            time.sleep(1)
            _die()
        finish(self, sources)

    BodyExchange.finish = last  # type: ignore[method-assign]


def _dies_in_pack(rank: int, slot: int, launch: Launch) -> None:
    from megatron_dept.federation.body_exchange import BodyExchange

    if launch.rank == rank:
        _dies_at_call(BodyExchange, "add", slot)


def _dies_sending(rank: int, kind: str, operation: str, call: int, launch: Launch) -> None:
    from megatron_dept.federation.communicator import CountedCommunicator

    if launch.rank != rank:
        return
    calls = -1
    whole = getattr(CountedCommunicator, operation)

    def last(self: CountedCommunicator, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += self._scope == "federation" and kind in (*args, *kwargs.values())
        if calls == call:
            time.sleep(0.2)
            _die()
        return whole(self, *args, **kwargs)

    setattr(CountedCommunicator, operation, last)


def _dies_in_save(rank: int, save: int, launch: Launch) -> None:
    from megatron_dept.checkpoint import writer

    if launch.rank != rank:
        return
    saves = -1
    whole = writer.save_slices

    def half(path: Path, tensors: Mapping[str, Tensor]) -> None:
        nonlocal saves
        saves += 1
        whole(path, tensors)
        if saves == save:
            os.truncate(path, path.stat().st_size // 2)
            _die()

    writer.save_slices = half


def _dies_in_commit(rank: int, save: int, launch: Launch) -> None:
    from megatron_dept.checkpoint import writer

    if launch.rank == rank:
        _dies_at_call(writer, "write_json", save)


def _dies_at_call(owner: Any, name: str, call: int) -> None:
    calls = -1
    whole = getattr(owner, name)

    def last(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            _die()
        return whole(*args)

    setattr(owner, name, last)


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _suspended(step: int, seconds: float, launch: Launch) -> None:
    def suspend() -> None:
        time.sleep((launch.world_size - 1 - launch.rank) / 2)
        subprocess.Popen(["sh", "-c", f"sleep {seconds + launch.rank}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)

    _at_step(launch.rank, step, suspend, launch)


def _lingers(rank: int, seconds: float, launch: Launch) -> None:
    from megatron_dept.training.trainer import Trainer

    def leave(self: Trainer, finished: bool) -> None:
        time.sleep(seconds)

    if launch.rank == rank:
        Trainer.leave = leave  # type: ignore[method-assign]


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process goes no further")


def _full_disk(rank: int, save: int, limit: int, launch: Launch) -> None:
    from megatron_dept.training.state import RunState

    if launch.rank != rank:
        return
    saves = 0
    whole = RunState.save

    def limited(self: RunState, *args: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves >= save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return whole(self, *args)

    RunState.save = limited  # type: ignore[method-assign]


def _little_space(rank: int, limit: int, launch: Launch) -> None:
    if launch.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def _nan_gradients(source: str, steps: frozenset[int], launch: Launch) -> None:
    from megatron_dept.models.embedding import SourceEmbedding
    from megatron_dept.training.trainer import Trainer

    poisoned = False
    step, loss = Trainer._step, SourceEmbedding.loss

    def watched(self: Trainer, local: Any, trained: Any) -> None:
        nonlocal poisoned
        sequential = self.progress.round * self._config.dept.n_local + local.step
        poisoned = trained.name == source and sequential in steps
        step(self, local, trained)

    def poisonous(self: SourceEmbedding, hidden: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = loss(self, hidden, targets)
        return value * float("nan") if poisoned else value

    Trainer._step = watched  # type: ignore[method-assign]
    SourceEmbedding.loss = poisonous  # type: ignore[method-assign]


def _at_step(rank: int, step: int, action: Callable[[], None], launch: Launch) -> None:
    from megatron_dept.engine.silo_engine import SiloEngine

    if launch.rank != rank:
        return
    steps = -1
    whole = SiloEngine.train_step

    def interrupted(self: SiloEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            action()
        return whole(self, *args, **kwargs)

    SiloEngine.train_step = interrupted  # type: ignore[method-assign]


def _raise() -> None:
    raise ZeroDivisionError("nobody foresaw this")


def without_package(name: str) -> Fault:
    """As if `name` were not installed."""
    return partial(_without_package, name)


def _without_package(name: str, launch: Launch) -> None:
    # None is what import and find_spec take for "there is none".
    sys.modules[name] = None  # type: ignore[assignment]
