"""A silo's engine in a forked rank, over a model too small to divide evenly, and its state as named numpy pieces."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dept.common.seeding import generator_for, seed_for
from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.embedding_owner import EmbeddingOwner
from megatron_dept.engine.silo_engine import SiloEngine, StepResult
from megatron_dept.engine.world import World
from megatron_dept.models.build import body_shapes, build_body
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.initialise import init_rows
from megatron_dept.models.parts import BodyPart
from megatron_dept.models.vocabulary_shard import VocabularyShard
from tests.engine.cases import BATCH, SEQUENCE, Case

Piece = tuple[str, int, int, bool]
"""Elements [start, stop) of the flattened parameter of that name, and whether they count."""
Pieces = dict[Piece, np.ndarray]
Arrays = dict[str, np.ndarray]


def tables(case: Case) -> tuple[Tensor, Tensor | None]:
    """First token and position tables, whole."""
    token = init_rows(0, case.vocabulary, case.hidden, 0.5, "token")
    return token, init_rows(0, SEQUENCE, case.hidden, 0.5, "position") if case.family == "gpt" else None


def batch(case: Case, step: int) -> Tensor:
    """A whole step's sequences, int64 [BATCH, SEQUENCE + 1]."""
    return torch.from_numpy(generator_for("batch", step).integers(0, case.vocabulary, (BATCH, SEQUENCE + 1)))


def share(case: Case, step: int, data_rank: int) -> Tensor:
    """A data rank's micro-batches of it: int64 [micro-batches, 2, SEQUENCE + 1]."""
    return batch(case, step).view(-1, case.data, 2, SEQUENCE + 1)[:, data_rank]


def another_body(config: RunConfig) -> dict[str, Tensor]:
    """Other values for every parameter than the built body's, alike in size so that a forward stays in range."""
    return {
        name: parameter.detach()
        + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed_for("another", name)))
        for name, parameter in build_body(config.model, config.seed).named_parameters()
    }


class Silo:
    """An engine, an embedding, and steps on this rank's part of a batch.

    `gradients`, `embedding_gradients`: what every step found before it clipped and stepped.
    """

    def __init__(self, case: Case, config: RunConfig, world: World, engine_class: type[SiloEngine]) -> None:
        self.case, self.config, self.world = case, config, world
        part = BodyPart(world.tensor, config.parallel.sequence_parallel)
        self.body = build_body(config.model, config.seed, part=part)
        self.engine = engine_class(config, self.body, world)
        self.shards = self.engine.shards
        shard = VocabularyShard(world.tensor, case.vocabulary, config.parallel.sequence_parallel)
        token, position = tables(case)
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        module = SourceEmbedding(
            token[shard.start : shard.stop].clone(), None if world.place.tensor else position, dtype, 7, shard
        )
        self.owner = EmbeddingOwner(module, config.optimizer, world)
        self.gradients: list[Pieces] = []
        self.embedding_gradients: list[Arrays] = []
        self._record_gradients()

    def step(self, number: int, learning_rate: float, embedding_learning_rate: float | None = None) -> StepResult:
        """An inner step on batch `number`."""
        rate = learning_rate if embedding_learning_rate is None else embedding_learning_rate
        return self.engine.train_step(self.micro_batches(number), self.owner, learning_rate, rate)

    def micro_batches(self, number: int) -> list[tuple[Tensor, Tensor]]:
        mine = share(self.case, number, self.world.place.data)
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
            (segment.name, segment.start, segment.stop, segment.primary): flat[segment.place].numpy().copy()
            for segment in self.shards.segments
        }

    def embedding(self) -> Arrays:
        """Copies of this rank's tables."""
        return {name: table.detach().numpy().copy() for name, table in self.owner.module.named_parameters()}

    def _record_gradients(self) -> None:
        step = self.shards.step

        def recording(*arguments: Any) -> None:
            self.gradients.append(self.pieces(self.shards.gradient()))
            self.embedding_gradients.append(
                {name: table.grad.numpy().copy() for name, table in self.owner.module.named_parameters()}
            )
            step(*arguments)

        self.shards.step = recording  # type: ignore[method-assign]


def joined(config: RunConfig, ranks: Sequence[Pieces]) -> dict[str, Tensor]:
    """Named tensors from what counts of all ranks' pieces; an element named by none or by two is an error.

    What does not count must be a copy, to the bit, of what does.
    """
    whole = {}
    for name, shape in body_shapes(config.model).items():
        mine = [(*key[1:], piece) for pieces in ranks for key, piece in pieces.items() if key[0] == name]
        at = 0
        found = sorted(((a, b, piece) for a, b, primary, piece in mine if primary), key=lambda found: found[:2])
        for start, stop, piece in found:
            assert start == at, f"{name}: element {min(start, at)} is named {'twice' if start < at else 'by nobody'}"
            assert len(piece) == stop - start
            at = stop
        assert at == np.prod(shape), f"{name}: elements from {at} are named by nobody"
        flat = np.concatenate([piece for _, _, piece in found])
        for start, stop, primary, piece in mine:
            assert primary or (piece == flat[start:stop]).all(), f"{name} differs between tensor ranks"
        whole[name] = torch.from_numpy(flat).view(shape)
    return whole


def joined_tables(case: Case, ranks: Sequence[Arrays]) -> dict[str, Tensor]:
    """The whole tables from the tensor ranks of the first data rank; the others' must be the same to the bit."""
    for rank, arrays in enumerate(ranks):
        for name, array in arrays.items():
            assert (array == ranks[rank % case.tensor][name]).all(), f"{name} differs between data ranks"
    first = ranks[: case.tensor]
    names = sorted({name for arrays in first for name in arrays})
    return {
        name: torch.from_numpy(np.concatenate([arrays[name] for arrays in first if name in arrays])) for name in names
    }
