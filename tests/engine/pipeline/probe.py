"""What a forked rank does for the tests of pipelines: a few short experiments on one silo, results as numpy."""

import gc
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dept.engine.embedding_owner import EmbeddingOwner
from megatron_dept.engine.pipeline_engine import PipelineSiloEngine
from megatron_dept.engine.silo_engine import StepResult
from megatron_dept.engine.world import World, start_world
from megatron_dept.models.build import build_body
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.parts import BodyPart
from megatron_dept.models.vocabulary_shard import VocabularyShard
from megatron_dept.topology.launch import Launch
from tests.engine.pipeline.cases import SEQUENCE, Case, batch, tables

SGD = {"optimizer": "sgd", "weight_decay": 0.01}
ADAMW = {"optimizer": "adamw", "epsilon": 1e-2, "weight_decay": 0.01, "clip_grad": 0.05}
"""A large epsilon keeps the update a smooth function of the gradient. The clip is far below the norms here, about 1."""
RATE, EMBEDDING_RATE = 0.3, 0.2
SCORED = (4, 3, 2)
"""Sequences scored together on a data rank: as pieces of the training's shape, of another, and of its own."""
TURNS = 6
"""How often the silo turns to the other source where nothing may pile up."""

Arrays = dict[Any, np.ndarray]


class Rank:
    """An engine, an embedding of each source, and steps on this rank's part of a batch.

    `found`: what every step found before it clipped and stepped: (body's, embedding's gradients).
    """

    def __init__(self, case: Case, world: World, **optimizer: Any) -> None:
        self.case, self.world, self.config = case, world, case.config(**optimizer)
        layers = case.layers(world.place.pipe)
        part = BodyPart(world.tensor, case.sequence_parallel, layers, final_norm=world.last_stage)
        self.body = build_body(self.config.model, self.config.seed, case.checkpointing, part)
        self.engine = PipelineSiloEngine(self.config, self.body, world)
        self.shards = self.engine.shards
        self.owners = {source: self.owner(source) for source in ("large", "small")}
        self.found: list[tuple[Arrays, Arrays]] = []
        self._record()

    def owner(self, source: str) -> EmbeddingOwner | None:
        """This rank's part of a source's embedding as it starts; None between the ends."""
        world = self.world
        if not (world.first_stage or world.last_stage):
            return None
        token, position = tables(self.config, source)
        shard = VocabularyShard(world.tensor, len(token), self.case.sequence_parallel)
        first = world.first_stage and world.place.tensor == 0
        dtype = torch.bfloat16 if self.case.precision == "bf16" else torch.float32
        rows = token[shard.start : shard.stop].clone()
        module = SourceEmbedding(rows, position if first else None, dtype, 7, shard)
        return EmbeddingOwner(module, self.config.optimizer, world)

    def step(self, number: int, source: str = "large", owner: EmbeddingOwner | None = None) -> StepResult:
        """An inner step on batch `number` of a source, from its embedding here or another `owner` of it."""
        mine = batch(source, number).view(-1, self.case.data, 2, SEQUENCE + 1)[:, self.world.place.data]
        micro_batches = [(piece[:, :-1].contiguous(), piece[:, 1:].contiguous()) for piece in mine]
        return self.engine.train_step(
            micro_batches, owner or self.owners[source], RATE, EMBEDDING_RATE, want_activation_norm=True
        )

    def token_losses(self, source: str, sequences: int) -> np.ndarray:
        """Of this data rank's share of a batch of so many sequences a data rank."""
        ids = batch(source, 9, sequences * self.case.data)[self.world.place.data :: self.case.data]
        owner = self.owners[source]
        embedding = None if owner is None else owner.module
        return self.engine.token_losses(embedding, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).numpy().copy()

    def pieces(self, flat: Tensor | None = None) -> Arrays:
        """This rank's partition (or another flat [n] of it) by (name, start, stop, primary)."""
        flat = self.shards.read() if flat is None else flat
        return {
            (segment.name, segment.start, segment.stop, segment.primary): flat[segment.place].numpy().copy()
            for segment in self.shards.segments
        }

    def tables(self, source: str = "large") -> Arrays:
        """Copies of this rank's tables of a source."""
        owner = self.owners[source]
        named = () if owner is None else owner.module.named_parameters()
        return {name: table.detach().numpy().copy() for name, table in named}

    def state(self, source: str = "large") -> tuple[Arrays, Arrays]:
        return self.pieces(), self.tables(source)

    def bits(self) -> list[bytes]:
        """Everything that a step may move."""
        owner = self.owners["large"]
        states = [self.shards.optimizer_state(), {} if owner is None else owner.optimizer_state()]
        tensors = [self.shards.read(), *([] if owner is None else owner.module.parameters())]
        tensors += [state[key] for state in states for key in sorted(state)]
        return [tensor.detach().numpy().tobytes() for tensor in tensors]

    def _record(self) -> None:
        step = self.shards.step

        def recording(*arguments: Any) -> None:
            modules = [owner.module for owner in self.owners.values() if owner is not None]
            tables = {
                name: table.grad.numpy().copy()
                for module in modules
                for name, table in module.named_parameters()
                if table.grad is not None
            }
            self.found.append((self.pieces(self.shards.gradient()), tables))
            step(*arguments)

        self.shards.step = recording  # type: ignore[method-assign]


def probe(launch: Launch, cases: Sequence[Case]) -> dict[Case, dict[str, Any]]:
    """Every experiment on every case of one layout; two engines a case."""
    world = start_world(launch, cases[0].layout, 60)
    reports = {}
    for case in cases:
        rank = Rank(case, world, **SGD)
        reports[case] = {"sgd": sgd(rank), "turned": turned(rank), "adamw": adamw(Rank(case, world, **ADAMW))}
    return reports


def sgd(rank: Rank) -> dict[str, Any]:
    """Three steps on one source, two on the other, one more on the first; losses of tokens in between."""
    rank.world.ledger.take()
    built = rank.pieces()
    results, states, scores = [], [], []
    for number, source in enumerate(TURNS_OF_SGD):
        results.append(rank.step(number, source))
        states.append(rank.state(source))
        scores.append({count: rank.token_losses(source, count) for count in SCORED})
    report = {"built": built, "results": results, "states": states, "scores": scores, "gradients": rank.found}
    report["numel"], report["stage"] = rank.shards.numel, rank.world.place.pipe
    report["ledger"] = rank.world.ledger.take()
    return report


TURNS_OF_SGD = ("large", "large", "large", "small", "small", "large")


def adamw(rank: Rank) -> dict[str, Any]:
    """Clipped steps: saved after two, gone on, put back, gone on again; then with a gradient spoilt on one stage."""
    results, states = [], []
    for number in range(2):
        results.append(rank.step(number))
        states.append(rank.state())
    put_back = _saved(rank)
    results.append(rank.step(2))
    states.append(rank.state())
    report: dict[str, Any] = {"results": results, "states": states, "went on": rank.bits()}
    put_back()
    report["put back"] = rank.bits()
    rank.step(2)
    report["went on again"] = rank.bits()
    report["poisoned"] = {}
    for stage in range(rank.case.pipe):
        before, undo = rank.bits(), _spoil(rank, stage)
        skipped = rank.step(3).skipped
        undo()
        report["poisoned"][stage] = (skipped, before == rank.bits())
    put_back()
    report["stepped after all"] = rank.step(2).skipped, rank.bits()
    return report


def _saved(rank: Rank) -> Callable[[], None]:
    """What puts back this moment's state, through the faces that checkpoints use."""
    flat, owner = rank.shards.read(), rank.owners["large"]
    inner = {key: value.clone() for key, value in rank.shards.optimizer_state().items()}
    own = {} if owner is None else {key: value.clone() for key, value in owner.optimizer_state().items()}
    tables = rank.tables()

    @torch.no_grad()
    def put_back() -> None:
        rank.shards.write(flat)
        rank.shards.load_optimizer_state(inner)
        if owner is not None:
            owner.load_optimizer_state(own)
            for name, table in owner.module.named_parameters():
                table.copy_(torch.from_numpy(tables[name]))

    return put_back


def _spoil(rank: Rank, stage: int) -> Callable[[], None]:
    """One infinite element in one body gradient of a stage's last data rank, in each micro-batch."""
    place = rank.world.place
    if (place.pipe, place.data, place.tensor) != (stage, rank.case.data - 1, 0):
        return lambda: None

    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[-1] = float("inf")
        return gradient

    return next(rank.body.parameters()).register_hook(hook).remove


def turned(rank: Rank) -> dict[str, Any]:
    """Turns between sources, each embedding made anew: what is left of earlier ones, of files and of threads."""
    left: list[weakref.ref[Tensor]] = []
    counts = []
    for turn in range(TURNS):
        source = ("large", "small")[turn % 2]
        owner = rank.owners[source] = rank.owner(source)
        rank.token_losses(source, SCORED[1])
        rank.step(turn, source)  # last: it is a training's graphs that could keep an embedding alive
        if owner is not None:
            left.append(weakref.ref(owner.module.token))
        rank.owners[source] = owner = None
        gc.collect()
        counts.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return {"alive": sum(reference() is not None for reference in left), "counts": counts}
