"""The round loop: DEPT's algorithm 1 over silos, and the synchronous baselines as the same loop with one silo.

    a round: sample sources -> slots of one source a silo -> local phases -> outer step -> validate -> checkpoint

Every silo joins every collective in the same order, idle or not. Inside a slot silos run free; they meet where `_meet`
is called: at the slot's end, at a checkpoint within it, and as soon as one of them is asked to stop.

Under outer.overlap a round's body exchange runs on in the background of the next one: local phases begin with the body
before it, add what it made of that after so many steps, and the round is written down when it is done.
"""

import time
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from megatron_dept.common.errors import UserError
from megatron_dept.config.schema import RunConfig
from megatron_dept.dept.sampling import sample_sources
from megatron_dept.dept.schedule import ScheduleRule, cycle_learning_rate, learning_rate
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World
from megatron_dept.federation.exchange import Exchange
from megatron_dept.federation.overlapped_exchange import OverlappedExchange
from megatron_dept.training.body_hash import agree_on_body
from megatron_dept.training.elastic import Elastic
from megatron_dept.training.embeddings import EmbeddingBroker
from megatron_dept.training.local_phase import LocalPhase
from megatron_dept.training.metrics import Metrics, Pace
from megatron_dept.training.progress_state import Flight, RunProgress
from megatron_dept.training.round_books import EndedRound, RoundBooks
from megatron_dept.training.save_schedule import is_due_after, save_steps, validates
from megatron_dept.training.signals import StopRequest
from megatron_dept.training.source_switch import SourceSwitch
from megatron_dept.training.sources import Source, SourceSet
from megatron_dept.training.state import RunState
from megatron_dept.training.step_report import StepReporter
from megatron_dept.training.validation import Validation, report_scores
from megatron_dept.training.watch import FailureWatch


class Trainer:
    """Runs a federation from its current progress to the last round, or until it is asked to stop."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        sources: SourceSet,
        engine: SiloEngine,
        exchange: Exchange | None,
        broker: EmbeddingBroker,
        switch: SourceSwitch,
        state: RunState,
        progress: RunProgress,
        metrics: Metrics,
        stop: StopRequest,
        watch: FailureWatch,
        elastic: Elastic | None = None,
    ) -> None:
        """`elastic`: ends the rounds of a silo that goes on without others; the world is then that silo alone."""
        self._elastic = elastic
        self._config = config
        self._world = world
        self._sources = sources
        self._engine = engine
        self._exchange = exchange
        self._broker = broker
        self._switch = switch
        self._state = state
        self.progress = progress
        self._metrics = metrics
        self._stop = stop
        self._watch = watch
        self._variant = VARIANTS[config.dept.variant]
        self._body_is_global = False
        self._active: tuple[str, ...] = ()
        halved = config.adapt is not None and config.adapt.embedding == "own"
        self._schedule = ScheduleRule(
            maximum=config.optimizer.learning_rate / (2 if halved else 1),
            minimum_ratio=config.optimizer.min_learning_rate_ratio,
            warmup_steps=config.optimizer.warmup_steps,
            total_steps=config.total_steps,
            kind=config.optimizer.schedule,
        )
        self._validation = (
            Validation(config, world, sources, engine, broker) if config.evaluation.interval_rounds else None
        )
        self._overlapped = exchange if isinstance(exchange, OverlappedExchange) else None
        self._ended: EndedRound | None = None
        self._books = RoundBooks(config, world, sources, engine, exchange, metrics, elastic, progress.round)
        self._reporter = StepReporter(config, world, engine, metrics, Pace(self._steps_left()))
        self._saved_at = (progress.round, progress.total_steps)

    def run(self) -> bool:
        """Train to the end; False where the run was asked to stop and has saved itself."""
        with self._watch.phase("meeting"):
            if self._elastic is not None and not self._elastic.begin(self.progress):
                return False
        with self._watch.phase("round"):
            while self.progress.round < self._config.dept.rounds:
                if not self._round():
                    return False
        if self._saved_at != (self.progress.round, self.progress.total_steps):
            self._save(None)
        return True

    def leave(self, finished: bool) -> None:
        """The run has ended here, `finished` or asked to stop: say so to silos that go on."""
        if self._elastic is not None:
            self._elastic.leave(finished)

    def _round(self) -> bool:
        began = time.perf_counter()
        sampled = tuple(self.progress.sampled) or self._sampled(self.progress.round)
        self.progress.sampled = list(sampled)
        remaining = tuple(name for name in sampled if name not in self.progress.done)
        slots = self._sources.slots(remaining, self._world.layout.silos)
        following = self._first_of_round(self.progress.round + 1)
        upcoming = [*(self._own(slot) for slot in slots[1:]), following]
        for slot, after in zip(slots, upcoming, strict=False):
            if not self._slot(slot, after):
                return False
        with self._watch.phase("exchange"):
            entry = self._end_round(sampled)
        if entry is None:
            return False
        entry |= {"switch_seconds": self._switch.take_seconds()}
        number = self.progress.round - 1
        if self._validation is not None and validates(self._config.evaluation, number):
            self._validate(self._validation, number)
        self._fetch_ahead(following)
        self._ended = self._books.end(self.progress, sampled, entry | {"seconds": time.perf_counter() - began})
        if self._overlapped is None:
            self._write_down_round()
        if is_due_after(self._config.checkpoint, number, self._config.dept.n_local):
            self._save(None)
        return True

    def _slot(self, slot: tuple[str | None, ...], upcoming: str | None) -> bool:
        """One source a silo, each to the end of its local phase; False where the run stopped inside it.

        `upcoming`: this silo's source of the next slot.
        """
        self._active = tuple(name for name in slot if name is not None)
        first_common = max((flight.step for flight in self.progress.flights.values()), default=0)
        with self._switch.clock():
            local = self._begin_phase(self._own(slot))
            self._fetch_ahead(upcoming, written=(*self.progress.done, *self._active))
        with self._watch.phase("inner step"):
            if not self._train(
                local, save_steps(self._config.checkpoint, self.progress.round, self._config.dept.n_local, first_common)
            ):
                return False
        dropped = local.name in self.progress.dropped
        contributes = local.source is not None and not dropped
        if contributes and self._exchange is not None:
            with self._watch.phase("pack"):
                self._exchange.add(self._engine.shards.read())
        ids = local.source.vocabulary.ids if local.source is not None else None
        with self._watch.phase("row exchange"), self._switch.clock():
            self._broker.release(local.name, local.held if contributes else None, ids, self.progress.round)
            if local.name is not None and contributes:
                self._switch.inner.end(local.name, self.progress.round)
        for name in slot:
            if name is not None:
                del self.progress.flights[name]
                self.progress.done.append(name)
        return True

    def _begin_phase(self, name: str | None) -> LocalPhase:
        source = self._sources[name] if name is not None else None
        flight = self.progress.flights.get(name) if name is not None else None
        if self._overlapped is not None:
            self._engine.shards.write(self._overlapped.start)
        elif self._exchange is not None and not self._body_is_global:
            self._engine.shards.write(self._exchange.value)
        self._body_is_global = False
        vocabulary = source.vocabulary if source is not None else None
        with self._watch.phase("row exchange"):
            held = self._broker.acquire(name, vocabulary, self.progress.round, resuming=flight is not None)
        if name is None:
            return LocalPhase(None, None)
        if flight is None:
            self._switch.inner.begin(name)
            return LocalPhase(source, held)
        if self._exchange is not None:
            self._state.resume_flight(name, held.owner if held is not None else None)
        return LocalPhase(source, held, step=flight.step, bad=flight.bad)

    def _train(self, local: LocalPhase, saves: set[int]) -> bool:
        """The local phase to its end; False where the run stopped, and saved itself, on the way."""
        local.stop = self._silo_is_asked()
        self._reporter.start_phase()
        while local.step < self._config.dept.n_local and not local.stop:
            if local.source is not None and not self._is_dropped(local.bad):
                self._step(local, local.source)
            else:
                local.stop = self._stop.asked
            local.step += 1
            if local.step == self._config.dept.outer.overlap:
                self._apply_update(local)
            if local.step in saves and not local.stop:
                if self._meet(local):
                    self._save(local)
                    return False
                self._save(local)
                self._reporter.start_phase()
        if self._meet(local):
            self._save(local)
            return False
        return True

    def _apply_update(self, local: LocalPhase) -> None:
        """Add to the body in training what the last round's exchange has made of the one that it began with."""
        if self._overlapped is None or local.source is None or not self.progress.round:
            return
        if self._is_dropped(local.bad):
            return  # its body counts for nothing, and its ranks no longer agree on when to stop
        with self._watch.phase("exchange"):
            self._engine.shards.write(self._overlapped.updated(self._engine.shards.read()))
        self._reporter.start_phase()

    def _silo_is_asked(self) -> bool:
        """Whether any rank of this silo was asked to stop: none may begin a step that another leaves out."""
        asked = torch.tensor([float(self._stop.asked)])
        self._world.silo.all_reduce_sum(asked, "control")
        return bool(asked[0] > 0)

    def _step(self, local: LocalPhase, source: Source) -> None:
        config = self._config
        step = self.progress.round * config.dept.n_local + local.step
        cursor = self.progress.cursors.get(source.name, 0) + local.trained * config.training.global_batch_size
        rate = learning_rate(step, self._schedule)
        embedding_rate = rate
        if self._variant.resets_embedding:
            embedding_rate = cycle_learning_rate(step, config.dept.n_local, self._schedule)
        result = self._engine.train_step(
            self._micro_batches(source, cursor),
            local.owner,
            rate,
            embedding_rate,
            stop=lambda: self._stop.asked,
            want_activation_norm=self._reporter.wants_norms(step),
        )
        local.trained += 1
        local.stop = result.stop
        local.bad += result.skipped
        local.skipped += result.skipped
        steps = self.progress.steps.get(source.name, 0) + local.trained
        self._reporter.report(
            source.name, local.owner, len(source.vocabulary), self.progress.round, step, steps, rate, result
        )
        if self._is_dropped(local.bad):
            self._too_many_bad_steps(source.name, local.bad, step)

    def _micro_batches(self, source: Source, cursor: int) -> list[tuple[Tensor, Tensor]]:
        """This data rank's part of the batch at `cursor`: micro-batch m of rank d is the (m x D + d)-th piece of it."""
        size, data, device = self._config.training.micro_batch_size, self._world.shape.data, self._world.device
        micro_batches = []
        for index in range(self._engine.accumulation_steps):
            piece = source.batch(cursor + (index * data + self._world.place.data) * size, size)
            tokens = torch.from_numpy(piece)
            if device.type == "cuda":
                # Of pageable memory the copy would wait for all that the GPU still has to do of the step before.
                tokens = tokens.pin_memory()
            tokens = tokens.to(device, non_blocking=True)
            micro_batches.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
        return micro_batches

    def _is_dropped(self, bad: int) -> bool:
        return bad > self._config.dept.max_bad_steps

    def _too_many_bad_steps(self, name: str, bad: int, step: int) -> None:
        what = f"source {name}: {bad} steps of round {self.progress.round + 1} had a gradient that is not finite"
        if self._config.dept.on_bad_steps == "stop":
            raise UserError(
                f"{what} (max_bad_steps {self._config.dept.max_bad_steps}, last at step {step + 1}); lower "
                "optimizer.learning_rate, or set dept.on_bad_steps: drop"
            )
        if self._world.leads_silo:
            self._metrics.warn(f"{what}; its delta is left out of the round")

    def _meet(self, local: LocalPhase) -> bool:
        """Tell all silos how far this one is; everyone's progress becomes equal. True where any was asked to stop.

        A silo that comes early waits as long as the others train, and passes on a request to stop meanwhile.
        """
        with self._watch.phase("meeting"):
            self._world.wait_for_all(lambda: self._stop.asked)
            return self._share_progress(local)

    def _share_progress(self, local: LocalPhase) -> bool:
        """`_meet`, once all have come."""
        report = (local.name, local.step, local.bad, local.trained, local.skipped, local.stop or self._stop.asked)
        local.trained = local.skipped = 0
        # Of all ranks: those of an idle silo share no step in which they would have agreed on a request.
        reports: list[Any] = self._world.gather_all(report)
        progress, layout = self.progress, self._world.layout
        for name, step, bad, trained, skipped, _ in (reports[layout.offset(silo)] for silo in range(layout.silos)):
            if name is None:
                continue
            progress.flights[name] = Flight(step, bad)
            progress.steps[name] = progress.steps.get(name, 0) + trained
            batch = self._config.training.global_batch_size
            progress.cursors[name] = progress.cursors.get(name, 0) + trained * batch
            progress.skipped += skipped
            if self._is_dropped(bad) and name not in progress.dropped:
                progress.dropped.append(name)
        return any(stop for *_, stop in reports)

    def _end_round(self, sampled: tuple[str, ...]) -> dict[str, object] | None:
        """The outer step: new global body and shared rows everywhere; what the round's log entry says of it.

        None where the silo was asked to stop while it waited for others.
        """
        # The round before is over everywhere by now, and so is its exchange.
        self._write_down_round()
        began = time.perf_counter()
        entry: dict[str, object] = {"sources": list(sampled), "dropped": list(self.progress.dropped)}
        contributed = len(sampled) - len(self.progress.dropped)
        if self._overlapped is not None:
            self._overlapped.finish(contributed)
            self._broker.end_round()
        elif self._exchange is not None:
            before = self._exchange.value.clone()
            if self._elastic is None:
                self._exchange.finish(contributed)
                self._broker.end_round()
            elif (told := self._elastic.end_round(self.progress)) is not None:
                entry = told
            else:
                return None
            self._engine.shards.write(self._exchange.value)
            self._body_is_global = True
            entry["delta_norm"] = self._books.distance(before, self._exchange.value)
        if self._elastic is None:
            if self._overlapped is None:
                value = self._engine.shards.read() if self._exchange is None else self._exchange.value
                entry["body_hash"] = agree_on_body(self._world, self._engine, value, self.progress.round)
            self.progress.end_round()
        # The store's files of this round are written before anyone reads them in the next.
        with self._watch.phase("source store"), self._switch.clock():
            self._switch.flush()
        self._world.barrier()
        return entry | {"exchange_seconds": time.perf_counter() - began}

    def _write_down_round(self) -> None:
        """Write down the last round, if it is not yet; waits for its exchange. Collective."""
        ended, self._ended = self._ended, None
        if ended is not None:
            with self._watch.phase("exchange"):
                self._books.write(ended)

    def _validate(self, validation: Validation, number: int) -> None:
        """Score all sources with the body as round `number` has made it."""
        if self._overlapped is not None:
            with self._watch.phase("exchange"):
                self._engine.shards.write(self._overlapped.value)
        with self._watch.phase("validation"):
            step = self.progress.round * self._config.dept.n_local
            report_scores(validation.run(), self._metrics, self._engine, number, step)

    def _save(self, local: LocalPhase | None) -> None:
        flight = None
        if self._elastic is not None and self.progress.mid_round:
            return  # a round that others may end without this silo is trained anew from its boundary
        if self._exchange is None:
            flight = (self._sources.trained[0], self._broker.resident)
        elif local is not None and local.name is not None:
            flight = (local.name, local.owner)
        self._write_down_round()
        # What a round has sent so far goes on with it.
        self._books.account(self.progress.traffic)
        with self._watch.phase("save"):
            path = self._state.save(self.progress, flight, self._active)
        self._saved_at = (self.progress.round, self.progress.total_steps)
        if self._world.is_writer:
            self._metrics.say(f"saved {path}")

    def _sampled(self, number: int) -> tuple[str, ...]:
        names = self._sources.trained
        count = len(names) if self._variant.synchronous else (self._config.dept.sources_per_round or len(names))
        return sample_sources(self._config.seed, number, names, count)

    def _fetch_ahead(self, name: str | None, written: Collection[str] = ()) -> None:
        if name is not None:
            self._switch.fetch_ahead(name, self.progress.cursors.get(name, 0), written)

    def _own(self, slot: tuple[str | None, ...]) -> str | None:
        return slot[self._world.place.silo]

    def _first_of_round(self, number: int) -> str | None:
        """This silo's first source of a round that is to come; None where there is none."""
        if number >= self._config.dept.rounds or self._variant.synchronous:
            return None
        slots = self._sources.slots(self._sampled(number), self._world.layout.silos)
        return self._own(slots[0]) if slots else None

    def _steps_left(self) -> int:
        """Inner steps this silo still has to do, for the time left."""
        silos, n_local = self._world.layout.silos, self._config.dept.n_local
        rounds = self._config.dept.rounds - self.progress.round
        return rounds * len(self._sources.slots(self._sampled(0), silos)) * n_local
