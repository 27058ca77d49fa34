"""What is written down of a round: its line in the metrics, its bytes in the ledger beside those foretold.

A round whose exchange runs on while the next one trains is written down when that exchange is done: at the next round's
end, or at a save, where silos meet anyway.
Shapes: `n` elements of this rank's fp32 partition of the body.
"""

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_dept.common.segments import primary_square
from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World
from megatron_dept.federation.exchange import Exchange
from megatron_dept.federation.overlapped_exchange import OverlappedExchange
from megatron_dept.training.body_hash import agree_on_body
from megatron_dept.training.elastic import Elastic
from megatron_dept.training.metrics import LedgerFile, Metrics
from megatron_dept.training.progress_state import RunProgress
from megatron_dept.training.save_schedule import validates, waiting_rounds
from megatron_dept.training.sources import SourceSet
from megatron_dept.training.traffic_plan import TrafficPlan


@dataclass
class EndedRound:
    """A round that has ended and is not written down yet; `entry`: what its line says, `traffic` as of progress."""

    number: int
    sampled: tuple[str, ...]
    entry: dict[str, Any]
    traffic: dict[str, int]
    total_steps: int
    """Inner steps that all sources had trained by its end."""


class RoundBooks:
    """Keeps them for all silos together; every method is collective."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        sources: SourceSet,
        engine: SiloEngine,
        exchange: Exchange | None,
        metrics: Metrics,
        elastic: Elastic | None,
        round: int,
    ) -> None:
        """`round`: the first that is to be trained."""
        self._config = config
        self._world = world
        self._sources = sources
        self._engine = engine
        self._exchange = exchange
        self._overlapped = exchange if isinstance(exchange, OverlappedExchange) else None
        self._metrics = metrics
        self._elastic = elastic
        body_bytes: list[Any] = world.gather_all(0 if exchange is None or elastic else exchange.round_bytes)
        if world.separate:
            own = sum(body_bytes[rank] for rank in world.silo_ranks)
            self._traffic = TrafficPlan(config, world.layout, sources, own, world.place.silo)
        else:
            self._traffic = TrafficPlan(config, world.layout, sources, sum(body_bytes))
        self._file = LedgerFile(config.run_dir / "ledger.json", round) if world.is_writer else None
        if self._overlapped is not None and world.is_writer and waiting_rounds(config) == config.dept.rounds:
            metrics.warn(
                "dept.outer.overlap hides nothing: every round ends with a save or a validation, which waits for its "
                "exchange; set checkpoint.save_interval and evaluation.interval_rounds to more than 1"
            )

    def account(self, traffic: dict[str, int]) -> None:
        """Add what all ranks have sent since the last time to `traffic`, but for an exchange in the background."""
        self._add_up(self._world.ledger.take(), traffic)

    def end(self, progress: RunProgress, sampled: tuple[str, ...], entry: dict[str, Any]) -> EndedRound:
        """`progress` has come to the next round: that round's traffic begins at nothing."""
        self.account(progress.traffic)
        ended = EndedRound(progress.round - 1, sampled, entry, progress.traffic, progress.total_steps)
        progress.traffic = {}
        return ended

    def distance(self, before: Tensor, after: Tensor) -> float:
        """L2 norm of the difference of two global bodies, fp32 [n] each of this rank's partition."""
        return self._world.root_of_sum(primary_square(before - after, self._engine.shards.segments))

    def write(self, ended: EndedRound) -> None:
        """Write a round down, once its exchange is done: bodies that differ are an error (see `agree_on_body`)."""
        overlapped = self._overlapped
        if overlapped is not None:
            value = overlapped.value
            began = time.perf_counter()
            ended.entry["delta_norm"] = self.distance(overlapped.start, value)
            ended.entry["body_hash"] = agree_on_body(self._world, self._engine, value, ended.number)
            ended.entry["exchange_seconds"] += overlapped.waited + time.perf_counter() - began
            ended.entry["body_exchange_seconds"] = overlapped.whole
        batch_tokens = self._config.training.global_batch_size * self._config.model.seq_length
        self._metrics.write(
            "round",
            round=ended.number,
            step=(ended.number + 1) * self._config.dept.n_local,
            total_tokens=ended.total_steps * batch_tokens,
            **ended.entry,
        )
        if overlapped is not None:
            self._add_up(overlapped.sent(), ended.traffic)
        predicted = self._predicted(ended)
        if self._file is not None:
            self._file.add(ended.number, ended.traffic, predicted, ended.total_steps)

    def _add_up(self, sent: dict[str, int], traffic: dict[str, int]) -> None:
        counts: list[Any] = self._world.gather_all(sent)
        for of_rank in counts:
            for key, count in of_rank.items():
                traffic[key] = traffic.get(key, 0) + count

    def _predicted(self, ended: EndedRound) -> dict[str, int]:
        """What the round was to send, by kind."""
        # What sources sent that have left the run in the middle of the round, nobody can foretell.
        here = [name for name in ended.sampled if name in self._sources.trained]
        predicted = self._traffic.round_bytes(here) if self._exchange is not None else {}
        if self._elastic is not None:
            predicted = {kind: sent + self._elastic.told_bytes.get(kind, 0) for kind, sent in predicted.items()}
        if validates(self._config.evaluation, ended.number):
            predicted["evaluation"] = self._traffic.evaluation_bytes()
        if not self._world.separate:
            return predicted
        told: list[Any] = self._world.gather_all(predicted if self._world.leads_silo else {})
        return {kind: sum(of.get(kind, 0) for of in told) for kind in predicted}
