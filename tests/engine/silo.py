"""A silo's engine in a forked rank, over a model too small to divide evenly, and its state as named numpy pieces."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dept.common.seeding import generator_for, seed_for
from megatron_dept.config.load import validate_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.embedding_owner import EmbeddingOwner
from megatron_dept.engine.silo_engine import SiloEngine, StepResult
from megatron_dept.engine.world import World, start_world
from megatron_dept.models.build import build_body
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.initialise import init_rows
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout

VOCABULARY = 13
SEQUENCE = 8
BATCH = 12
"""Sequences of a step: divides into micro-batches of 2 on 1, 2 and 3 ranks, several a rank in each case."""

Piece = tuple[str, int, int]
"""Elements [start, stop) of the flattened parameter of that name."""
Pieces = dict[Piece, np.ndarray]


def engine_config(stage: int, precision: str, hidden: int = 10, **optimizer: Any) -> RunConfig:
    """10 wide: neither the body nor most of its parameters divide by 3 ranks, so partitions are padded."""
    return validate_config(
        {
            "run_dir": "unused",
            "model": {
                "num_layers": 2 if hidden < 100 else 1,
                "hidden_size": hidden,
                "num_attention_heads": 2,
                "seq_length": SEQUENCE,
                "init_std": 0.2 if hidden < 100 else 0.04,
            },
            "sources": [{"name": "none", "data": "unused"}],
            "parallel": {"zero_stage": stage},
            "optimizer": {"clip_grad": 0.0, **optimizer},
            "training": {"micro_batch_size": 2, "global_batch_size": BATCH, "precision": precision},
        },
        "test",
    )


def tables(config: RunConfig) -> tuple[Tensor, Tensor]:
    """First token and position tables."""
    hidden = config.model.hidden_size
    return init_rows(0, VOCABULARY, hidden, 0.5, "token"), init_rows(0, SEQUENCE, hidden, 0.5, "position")


def batch(step: int) -> Tensor:
    """A whole step's sequences, int64 [BATCH, SEQUENCE + 1]."""
    return torch.from_numpy(generator_for("batch", step).integers(0, VOCABULARY, (BATCH, SEQUENCE + 1)))


def another_body(config: RunConfig) -> dict[str, Tensor]:
    """Other values for every parameter than the built body's, alike in size so that a forward stays in range."""
    return {
        name: parameter.detach()
        + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed_for("another", name)))
        for name, parameter in build_body(config.model, config.seed).named_parameters()
    }


def silo_world(launch: Launch) -> World:
    """All ranks of the launch as one silo."""
    return start_world(launch, Layout(1, 1, launch.world_size, 1), 60)


class Silo:
    """An engine, an embedding, and steps on this rank's part of a batch."""

    def __init__(self, config: RunConfig, world: World, engine_class: type[SiloEngine] = SiloEngine) -> None:
        self.config, self.world = config, world
        self.body = build_body(config.model, config.seed)
        self.engine = engine_class(config, self.body, world)
        self.shards = self.engine.shards
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self.owner = EmbeddingOwner(SourceEmbedding(*tables(config), dtype, 7), config.optimizer, world.silo)

    def step(self, number: int, learning_rate: float, embedding_learning_rate: float | None = None) -> StepResult:
        """An inner step on batch `number`."""
        rate = learning_rate if embedding_learning_rate is None else embedding_learning_rate
        return self.engine.train_step(self.micro_batches(number), self.owner, learning_rate, rate)

    def micro_batches(self, number: int) -> list[tuple[Tensor, Tensor]]:
        mine = batch(number).view(-1, self.world.layout.data, 2, SEQUENCE + 1)[:, self.world.place.data]
        return [(piece[:, :-1].contiguous(), piece[:, 1:].contiguous()) for piece in mine]

    def write(self, state: dict[str, Tensor]) -> None:
        """Write a body by name into this rank's partition, padding set to a value that must never be seen."""
        flat = torch.full((self.shards.numel,), 1e30)
        for segment in self.shards.segments:
            flat[segment.place] = state[segment.name].flatten()[segment.start : segment.stop]
        self.shards.write(flat)

    def pieces(self, flat: Tensor | None = None) -> Pieces:
        """This rank's partition (or another flat [n] of it) by name."""
        flat = self.shards.read() if flat is None else flat
        return {
            (segment.name, segment.start, segment.stop): flat[segment.place].numpy().copy()
            for segment in self.shards.segments
        }

    def embedding(self) -> dict[str, np.ndarray]:
        """Copies of the embedding's tables."""
        return {name: table.detach().numpy().copy() for name, table in self.owner.module.named_parameters()}


def joined(config: RunConfig, ranks: list[Pieces]) -> dict[str, Tensor]:
    """Named tensors from all ranks' pieces; an element named by none or by two is an error."""
    whole = {}
    for name, parameter in build_body(config.model, config.seed).named_parameters():
        found = sorted(
            (start, stop, piece) for pieces in ranks for (of, start, stop), piece in pieces.items() if of == name
        )
        at = 0
        for start, stop, piece in found:
            assert start == at, f"{name}: element {min(start, at)} is named {'twice' if start < at else 'by nobody'}"
            assert len(piece) == stop - start
            at = stop
        assert at == parameter.numel(), f"{name}: elements from {at} are named by nobody"
        whole[name] = torch.from_numpy(np.concatenate([piece for _, _, piece in found])).view(parameter.shape)
    return whole
