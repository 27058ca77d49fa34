"""A run's whole state, to a checkpoint and back: by parameter and source name, on any layout.

At a round's boundary: the global body and its outer optimizer, the row tables, the source store, cursors. In the middle
of one also, per source under way, its local body, embedding and inner optimizer state, and the deltas summed so far.
Under outer.overlap, whose last exchange is waited for, also the body that it, and the local phases, began with.
"""

import warnings
import zlib
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.checkpoint.slices import SliceIndex, cut_by_name, whole
from megatron_dept.checkpoint.store import SourceStore
from megatron_dept.checkpoint.writer import save_checkpoint
from megatron_dept.common.segments import Segment
from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.embedding_owner import EmbeddingOwner
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World
from megatron_dept.federation.exchange import Exchange, Residual
from megatron_dept.federation.overlapped_exchange import OverlappedExchange
from megatron_dept.training.embeddings import (
    EmbeddingBroker,
    embedding_tensors,
    first_row,
    held_rows,
    read_embedding_optimizer,
)
from megatron_dept.training.inner_state import inner_tensors, read_inner_state
from megatron_dept.training.progress_state import RunProgress
from megatron_dept.training.source_changes import SourceChanges, retired_sources
from megatron_dept.training.sources import MIXTURE, SourceSet


class RunState:
    """Saves and restores everything a run consists of. `exchange` is None for variants without an outer step."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        sources: SourceSet,
        engine: SiloEngine,
        exchange: Exchange | None,
        broker: EmbeddingBroker,
        store: SourceStore,
    ) -> None:
        self._config = config
        self._world = world
        self._sources = sources
        self._engine = engine
        self._exchange = exchange
        self._broker = broker
        self._store = store
        self._directory = config.run_dir / "checkpoints"
        self._flight_index: SliceIndex | None = None
        self._retired: dict[str, dict[str, Any]] = {}

    def save(
        self, progress: RunProgress, flight: tuple[str, EmbeddingOwner | None] | None, active: Collection[str]
    ) -> Path:
        """Write and commit a checkpoint; collective.

        `flight`: the source this silo is training, and its embedding; `active`: those all silos are training. Local
        phases that a restored checkpoint caught under way and whose turn has not come are carried over.
        """
        waiting = [name for name in progress.flights if name not in active]
        segments = self._engine.shards.segments
        tensors = self._broker.tensors(progress.mid_round)
        if self._exchange is None:
            tensors |= cut_by_name("body", self._engine.shards.read(), segments)
        else:
            tensors |= self._outer_tensors(self._exchange, segments, progress.mid_round)
        if self._keeps_start(progress):
            tensors |= self._start_tensors(segments)
        if flight is not None:
            tensors |= self._flight_tensors(*flight)
        if self._world.is_writer:
            for name in waiting:
                tensors |= self._carried(name)
        # A rank that idles is ahead of its silo: what others put into the store must be there before it is listed.
        self._store.flush()
        self._world.barrier()
        target = save_checkpoint(
            self._directory / f"step-{progress.total_steps:08d}",
            self._world.rank,
            self._world.silo_ranks if self._world.separate else range(self._world.layout.world_size),
            self._world.gather_all,
            tensors,
            self._links(),
            self._manifest(progress),
            self._config.checkpoint.keep_last,
        )
        if waiting:
            # The checkpoint that they were restored from may be gone now.
            self._flight_index = Checkpoint.open(target).index
        return target

    def restore(self, checkpoint: Checkpoint) -> RunProgress:
        """Load a checkpoint of this run (see `training.resume`) into engine, exchange, tables and store; collective.

        Sources may have joined and left since: see `training.source_changes`.
        """
        progress = RunProgress.load(checkpoint.manifest["progress"])
        SourceChanges.since(checkpoint.manifest, self._sources.names).apply(progress)
        self._retired = retired_sources(checkpoint.manifest, self._sources.names)
        index, shards = checkpoint.index, self._engine.shards
        body = index.fill(torch.zeros(shards.numel), "body", shards.segments)
        shards.write(body)
        if self._exchange is not None:
            self._load_outer(self._exchange, index, body, shards.segments, progress.mid_round)
        if isinstance(self._exchange, OverlappedExchange):
            if self._keeps_start(progress):
                index.fill(self._exchange.start, "start", shards.segments)
            else:
                self._exchange.start.copy_(body)
        self._broker.load(index, progress.mid_round)
        if self._world.is_writer:
            self._store.restore(checkpoint.directory, checkpoint.manifest["files"])
            for name in self._retired:
                self._store.keep(name, partial(_vocabulary, index, name))
        self._world.barrier()
        if progress.flights or self._exchange is None:
            self._flight_index = index
        return progress

    def keep_vocabularies(self) -> None:
        """Put into the store, for every checkpoint to link, which ids each source's rows stand for; by one rank."""
        for name in self._sources.vocabularies:
            self._store.keep(name, partial(self._ids, name))

    def _ids(self, name: str) -> dict[str, Tensor]:
        return whole(f"vocabulary/{name}", torch.from_numpy(self._sources.ids(name)))

    def resume_flight(self, name: str, owner: EmbeddingOwner | None) -> None:
        """Put back a local phase that the restored checkpoint caught under way; `owner` as its silo's rank has one."""
        assert self._flight_index is not None, f"no local phase of {name} was restored"
        index, shards, prefix = self._flight_index, self._engine.shards, f"flight/{name}"
        if self._exchange is not None:
            shards.write(index.fill(torch.zeros(shards.numel), f"{prefix}/body", shards.segments))
        if owner is not None:
            if self._exchange is not None:
                with torch.no_grad():
                    for part, parameter in owner.module.named_parameters():
                        start = first_row(owner, part)
                        parameter.copy_(index.read(f"{prefix}/{part}", start, start + len(parameter)))
            owner.load_optimizer_state(read_embedding_optimizer(index, prefix, held_rows(owner)))
        shards.load_optimizer_state(read_inner_state(index, prefix, shards.numel, shards.segments))

    def _outer_tensors(self, exchange: Exchange, segments: list[Segment], mid_round: bool) -> dict[str, Tensor]:
        """This rank's share of the global body and momentum, and in mid-round its silo's summed deltas."""
        if self._world.separate:
            # Nobody else's disk can be counted on: what a silo saves is whole.
            value, momentum, mine = exchange.value, exchange.momentum, segments
        else:
            value, momentum, mine = exchange.owned_value, exchange.owned_momentum, exchange.owned(segments)
        tensors = cut_by_name("body", value, mine)
        if momentum is not None:
            tensors |= cut_by_name("outer", momentum, mine)
        for owed in exchange.residuals(segments):
            tensors |= cut_by_name(self._residual_path(owed, self._world.place.silo), owed.tensor, owed.segments)
        if mid_round:
            tensors |= cut_by_name(f"delta/{self._world.place.silo}", exchange.delta, segments)
        return tensors

    def _load_outer(
        self, exchange: Exchange, index: SliceIndex, body: Tensor, segments: list[Segment], mid_round: bool
    ) -> None:
        exchange.value.copy_(body)
        exchange.adopt()
        if exchange.momentum is not None:
            index.fill(exchange.momentum, "outer", exchange.momentum_segments(segments))
        self._load_residuals(exchange, index, segments)
        if mid_round and (total := self._sum_of_silos(index, "delta/", exchange.value, segments)) is not None:
            exchange.load_delta(total)

    def _load_residuals(self, exchange: Exchange, index: SliceIndex, segments: list[Segment]) -> None:
        """What the wire owed: silos' by their sums, the owners' by name; nothing where the wire owed nothing then."""
        residuals = exchange.residuals(segments)
        for owed in residuals:
            if owed.of_silo:
                total = self._sum_of_silos(index, "residual/", owed.tensor, segments)
                owed.tensor.zero_() if total is None else owed.tensor.copy_(total)
            elif index.paths(f"{self._residual_path(owed, 0)}/"):
                index.fill(owed.tensor, self._residual_path(owed, 0), owed.segments)
        if index.paths("residual/") and not residuals and self._world.is_writer:
            warnings.warn(
                "what the last rounds' int8 wire still owed (under half a step of it an element) is dropped: one silo "
                "sends nothing; keep at least two silos to go on exactly",
                RuntimeWarning,
                stacklevel=2,
            )

    def _sum_of_silos(self, index: SliceIndex, prefix: str, like: Tensor, segments: list[Segment]) -> Tensor | None:
        """What this silo takes over of `prefix`'s sums, one a silo: its own, and those of silos there are no more.

        They are summed in turn, for the total of all silos is what counts. None where there is nothing for it.
        """
        total = None
        for silo in sorted({int(path.split("/")[0]) for path in index.paths(prefix)}):
            if silo % self._world.layout.silos == self._world.place.silo:
                of_silo = index.fill(torch.zeros_like(like), f"{prefix}{silo}", segments)
                total = of_silo if total is None else total.add_(of_silo)
        return total

    @staticmethod
    def _residual_path(owed: Residual, silo: int) -> str:
        return f"residual/{silo}" if owed.of_silo else f"residual_of_{owed.name}"

    def _keeps_start(self, progress: RunProgress) -> bool:
        """Whether local phases to come begin with another body than the newest: the first round's do not."""
        return isinstance(self._exchange, OverlappedExchange) and 0 < progress.round < self._config.dept.rounds

    def _start_tensors(self, segments: list[Segment]) -> dict[str, Tensor]:
        """This rank's part of the body that local phases begin with; equal silos hold the same and share the work."""
        assert isinstance(self._exchange, OverlappedExchange)
        start, world = self._exchange.start, self._world
        if world.separate:
            return cut_by_name("start", start, segments)
        if not world.layout.equal:
            return cut_by_name("start", start, segments) if world.place.silo == 0 else {}
        share = -(-len(start) // world.layout.silos)
        own = slice(world.place.silo * share, (world.place.silo + 1) * share)
        pieces = [piece for segment in segments if (piece := segment.within(own)) is not None]
        return cut_by_name("start", start[own], pieces)

    def _flight_tensors(self, name: str, owner: EmbeddingOwner | None) -> dict[str, Tensor]:
        shards, prefix, world = self._engine.shards, f"flight/{name}", self._world
        tensors = inner_tensors(prefix, shards.optimizer_state(), shards.segments, world.leads_silo)
        if self._exchange is not None:
            tensors |= cut_by_name(f"{prefix}/body", shards.read(), shards.segments)
        if owner is not None and world.first_stage and world.place.data == 0:
            embedding = embedding_tensors(prefix, owner, with_optimizer=True, leads=world.leads_silo)
            if self._exchange is None:
                embedding = {key: value for key, value in embedding.items() if "/embedding.optimizer/" in key}
            tensors |= embedding
        return tensors

    def _carried(self, name: str) -> dict[str, Tensor]:
        assert self._flight_index is not None
        paths = [f"flight/{name}/{rest}" for rest in self._flight_index.paths(f"flight/{name}/")]
        return {f"{path}@0": self._flight_index.read(path) for path in paths}

    def _links(self) -> list[Path]:
        """Store files this rank answers for: all that share a run directory share the work, by the files' names."""
        ranks, own = self._world.launch.world_size, self._world.launch.rank
        files = [file for name in (*self._sources.names, *self._retired) for file in self._store.files(name)]
        return [file for file in files if zlib.crc32(f"{file.parent.name}/{file.name}".encode()) % ranks == own]

    def _manifest(self, progress: RunProgress) -> dict[str, Any]:
        config = self._config
        batch_tokens = config.training.global_batch_size * config.model.seq_length
        trained = {name for name, steps in progress.steps.items() if steps}
        return {
            "step": progress.round * config.dept.n_local,
            "round": progress.round,
            "tokens": progress.total_steps * batch_tokens,
            "variant": config.dept.variant,
            "vocabulary": self._sources.kind,
            "phase": config.phase,
            "seed": config.seed,
            "model": config.model.model_dump(),
            "body_shapes": self._engine.body_shapes,
            "vocab_size": self._sources.vocab_size,
            "sources": {
                name: {
                    **asdict(card),
                    "vocabulary": self._sources.kind,
                    "trained": name in trained or MIXTURE in trained,
                    "retired": False,
                }
                for name, card in self._sources.cards.items()
                if name in self._sources.directories
            }
            | self._retired,
            "all_sources": list(self._sources.names),
            "progress": progress.dump(),
            "trained_with": config.model_dump(mode="json"),
        }


def _vocabulary(index: SliceIndex, name: str) -> dict[str, Tensor]:
    """A source's as a checkpoint has it, for the store."""
    return whole(f"vocabulary/{name}", index.read(f"vocabulary/{name}"))
