"""Silos that are lost or late at a chosen moment of a chosen round, and a record of what each exchange began with."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from tests.support.distributed import free_port, run_ranks
from tests.support.runs import train_rank

SiloFault = Callable[[RunConfig], None]
"""Called in every process of a silo before the program starts."""
OUTCOME_SECONDS = 240


def run_silos(
    configs: list[RunConfig],
    ranks: list[int],
    faults: dict[int, SiloFault] | None = None,
    dying: tuple[int, ...] = (),
) -> list[Any]:
    """Each configuration as a launch of its own; `faults` and `dying` by their place in `configs`.

    A rank's result is what `run` returned, the text of the error it raised, or None where it died.
    """
    first = [sum(ranks[:index]) for index in range(len(ranks))]
    may_die = [rank for index in dying for rank in range(first[index], first[index] + ranks[index])]
    ports = [free_port() for _ in configs]
    arguments = (configs, ranks, ports, faults or {})
    return run_ranks(sum(ranks), _silo_rank, *arguments, limit=OUTCOME_SECONDS, may_die=may_die)


def _silo_rank(
    launch: Launch, configs: list[RunConfig], ranks: list[int], ports: list[int], faults: dict[int, SiloFault]
) -> Any:
    from megatron_dept.common.errors import UserError

    rank = launch.rank
    for index, (config, size, port) in enumerate(zip(configs, ranks, ports, strict=True)):
        if rank >= size:
            rank -= size
            continue
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / f"pid.{rank}").write_text(str(os.getpid()))
        _record(config)
        if index in faults:
            faults[index](config)
        try:
            return train_rank(Launch(rank, size, rank, size, "127.0.0.1", port), config)
        except UserError as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError("ranks are counted")


def dies_in_step(step: int) -> SiloFault:
    """In its `step`-th inner step (from 0), between forward and backward."""
    return partial(_dies_in_step, step)


def dies_packing(round: int) -> SiloFault:
    """At the end of `round` (from 0), before it has exchanged anything."""
    return partial(_dies_packing, round)


def dies_exchanging(round: int) -> SiloFault:
    """When it has told the others its deltas of the body, and they wait for its answer."""
    return partial(_dies_exchanging, round)


def dies_exchanging_rows(round: int) -> SiloFault:
    """When the body is exchanged and the rows are not."""
    return partial(_dies_exchanging_rows, round)


def dies_saving(save: int) -> SiloFault:
    """In its `save`-th checkpoint (from 0), before that is committed."""
    return partial(_dies_saving, save)


def dies_committing(save: int) -> SiloFault:
    """In its `save`-th checkpoint, when all silos have written their parts, before it writes its manifest."""
    return partial(_dies_committing, save)


def sleeps(step: int, seconds: float) -> SiloFault:
    """For so long at its `step`-th inner step (from 0), showing life."""
    return partial(_before_step, step, partial(time.sleep, seconds))


def stops(step: int) -> SiloFault:
    """It is stopped (SIGSTOP), every thread of it, at its `step`-th inner step."""
    return partial(_before_step, step, partial(_signal_self, signal.SIGSTOP))


def is_asked_to_stop(step: int) -> SiloFault:
    """SIGTERM at its `step`-th inner step."""
    return partial(_before_step, step, partial(_signal_self, signal.SIGTERM))


def stops_after(round: int) -> SiloFault:
    """SIGTERM as it has ended `round` (from 0) and saved."""
    return partial(_stops_after, round)


def waits_for_joiner(round: int) -> SiloFault:
    """Ends `round` only when a silo asks to join, so that this does not hang on how fast the machine is."""
    return partial(_waits_for_joiner, round)


def waits_for_file(path: Path) -> SiloFault:
    """Starts when `path` is there."""
    return partial(_waits_for_file, path)


def wakes(round: int, pid: Path) -> SiloFault:
    """Lets a stopped process go on when this silo ends `round`."""
    return partial(_wakes, round, pid)


def both(*faults: SiloFault) -> SiloFault:
    """All of them."""
    return partial(_both, faults)


def _both(faults: tuple[SiloFault, ...], config: RunConfig) -> None:
    for fault in faults:
        fault(config)


def _signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


def _die() -> None:
    _signal_self(signal.SIGKILL)


def _dies_in_step(step: int, config: RunConfig) -> None:
    from tests.support.faults import dies_in_step as dies

    dies(0, step)(Launch(0, 1, 0, 1, "", 0))


def _before_step(step: int, action: Callable[[], None], config: RunConfig) -> None:
    from megatron_dept.engine.silo_engine import SiloEngine

    whole, steps = SiloEngine.train_step, -1

    def interrupted(self: SiloEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            action()
        return whole(self, *args, **kwargs)

    SiloEngine.train_step = interrupted  # type: ignore[method-assign]


def _dies_packing(round: int, config: RunConfig) -> None:
    from megatron_dept.training.elastic import Elastic

    whole = Elastic._prepare

    def last(self: Elastic, stage: str, *args: Any) -> Any:
        if int(stage.split(":")[1]) == round:
            _die()
        return whole(self, stage, *args)

    Elastic._prepare = last  # type: ignore[method-assign]


def _dies_exchanging_rows(round: int, config: RunConfig) -> None:
    from megatron_dept.federation.replicated_rows import ReplicatedRowTable
    from megatron_dept.training.elastic import Elastic

    whole, prepare, current = ReplicatedRowTable.prepare, Elastic._prepare, -1

    def noting(self: Elastic, stage: str, *args: Any) -> Any:
        nonlocal current
        current = int(stage.split(":")[1])
        return prepare(self, stage, *args)

    def last(self: ReplicatedRowTable) -> Any:
        if current == round:
            _die()
        return whole(self)

    Elastic._prepare = noting  # type: ignore[method-assign]
    ReplicatedRowTable.prepare = last  # type: ignore[method-assign]


def _dies_exchanging(round: int, config: RunConfig) -> None:
    """Between the deltas' way to their owners and the means' way back."""
    from megatron_dept.federation import body_exchange

    prepare, mean, prepares = body_exchange.BodyExchange.prepare, body_exchange.body_mean, -1

    def counted(self: body_exchange.BodyExchange, sources: int) -> Any:
        nonlocal prepares
        prepares += 1
        return prepare(self, sources)

    def last(*arguments: Any) -> None:
        mean(*arguments)
        if prepares == round:
            time.sleep(0.5)
            _die()

    body_exchange.BodyExchange.prepare = counted  # type: ignore[method-assign]
    body_exchange.body_mean = last


def _dies_saving(save: int, config: RunConfig) -> None:
    from megatron_dept.training.state import RunState

    whole, saves = RunState._manifest, -1

    def last(self: RunState, *args: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves == save:
            _die()
        return whole(self, *args)

    RunState._manifest = last  # type: ignore[method-assign]


def _dies_committing(save: int, config: RunConfig) -> None:
    from megatron_dept.checkpoint import writer

    whole, saves = writer.write_json, -1

    def last(path: Path, values: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == save:
            # The other silo's manifest is written meanwhile.
            time.sleep(1)
            _die()
        whole(path, values)

    writer.write_json = last


def _stops_after(round: int, config: RunConfig) -> None:
    from megatron_dept.training.state import RunState

    whole = RunState.save

    def save(self: RunState, progress: Any, *args: Any) -> Path:
        path = whole(self, progress, *args)
        if progress.round == round + 1:
            _signal_self(signal.SIGTERM)
        return path

    RunState.save = save  # type: ignore[method-assign]


def _waits_for_joiner(round: int, config: RunConfig) -> None:
    from megatron_dept.training.elastic import Elastic

    whole = Elastic._advance

    def patient(self: Elastic, number: int, members: Any, *args: Any) -> Any:
        end = time.monotonic() + 60
        while number == round + 1 and not self._membership._requests(members)[0]:
            assert time.monotonic() < end, "nobody asked to join"
            time.sleep(0.05)
        return whole(self, number, members, *args)

    Elastic._advance = patient  # type: ignore[method-assign]


def _waits_for_file(path: Path, config: RunConfig) -> None:
    end = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


def _wakes(round: int, pid: Path, config: RunConfig) -> None:
    from megatron_dept.training.elastic import Elastic

    whole = Elastic._report

    def waking(self: Elastic, progress: Any) -> Any:
        if progress.round == round:
            os.kill(int(pid.read_text()), signal.SIGCONT)
        return whole(self, progress)

    Elastic._report = waking  # type: ignore[method-assign]


def _record(config: RunConfig) -> None:
    """Write what each round's end begins with and leads to: `record.<round>.npz` in the silo's run directory."""
    from megatron_dept.training.elastic import Elastic

    whole = Elastic._end_round

    def recorded(self: Elastic, progress: Any) -> Any:
        number, values = progress.round, _state(self, "before")
        values["sources"] = len(progress.done) - len(progress.dropped)
        entry = whole(self, progress)
        values |= _state(self, "after")
        if self._world.leads_silo:
            np.savez(config.run_dir / f"record.{number}.npz", **values)
        return entry

    Elastic._end_round = recorded  # type: ignore[method-assign]


def _state(elastic: Any, when: str) -> dict[str, Any]:
    exchange = elastic._exchange
    values = {"value": exchange.value, "delta": exchange.delta, "momentum": exchange.momentum}
    for part, table in elastic._tables.items():
        values |= {f"{part}.rows": table.rows, f"{part}.momentum": table.momentum}
        values |= {f"{part}.sums": table.pending.sums(0, len(table.rows)), f"{part}.counts": table.pending.counts}
    return {f"{when}.{name}": value.numpy().copy() for name, value in values.items() if value is not None}
