"""Where a source's embedding comes from at the start of its local phase, and where it goes at the end.

The variant's table (`dept.variants`) says which: shared rows come from and return to row tables, local ones live in the
source store, a resident one stays in memory. Only the embedding of the source in training is ever held.
Shapes: `v` rows of a source, `h` hidden, `L` positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dept.checkpoint.slices import SliceIndex, whole
from megatron_dept.checkpoint.store import SourceStore
from megatron_dept.config.schema import RunConfig
from megatron_dept.data.remap import VocabularyMap
from megatron_dept.dept.outer import OuterRule
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.engine.embedding_owner import EmbeddingOwner
from megatron_dept.engine.world import World
from megatron_dept.federation.ledger import Kind
from megatron_dept.federation.row_table import RowTable
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.initialise import init_rows

NO_IDS = torch.empty(0, dtype=torch.int64)


@dataclass
class HeldEmbedding:
    """A source's embedding in training, with its shared rows as they stood at the round's start (None: not shared)."""

    owner: EmbeddingOwner
    start_token: Tensor | None
    start_position: Tensor | None


class EmbeddingBroker:
    """Brings embeddings to this silo and takes them back. Every method marked collective is called by all silos."""

    def __init__(
        self, config: RunConfig, world: World, store: SourceStore, vocab_size: int | None, rule: OuterRule
    ) -> None:
        self._config = config
        self._world = world
        self._store = store
        self._variant = VARIANTS[config.dept.variant]
        self._dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self._positions = config.model.seq_length if config.model.has_position_table else 0
        self._tables: dict[str, RowTable] = {}
        if self._variant.token_rows == "shared":
            assert vocab_size is not None
            self._tables["token"] = self._row_table("embedding", "token", vocab_size, rule)
        if self._variant.position_rows == "shared" and self._positions:
            self._tables["position"] = self._row_table("position", "position", self._positions, rule)
        self._resident: EmbeddingOwner | None = None
        if self._variant.token_rows == "resident":
            assert vocab_size is not None
            self._vocab_size = vocab_size
            self._resident = self._owner(*self._initial(vocab_size, ()))

    @property
    def resident(self) -> EmbeddingOwner | None:
        """The one embedding of a variant whose embedding stays in memory."""
        return self._resident

    def acquire(
        self, name: str | None, vocabulary: VocabularyMap | None, round: int, resuming: bool = False
    ) -> HeldEmbedding | None:
        """The embedding for a local phase of source `name`; None for an idle silo. Collective where rows are shared.

        `resuming`: the phase goes on from a checkpoint, which has what a phase's start would make anew.
        """
        if self._resident is not None:
            if self._variant.resets_embedding and not resuming:
                self._resident = self._owner(*self._initial(self._vocab_size, ("reset", round)))
            return HeldEmbedding(self._resident, None, None)
        token, position = self._shared_rows(vocabulary, None)
        if name is None or vocabulary is None:
            return None
        stored = self._store.index(name)
        own_token, own_position = self._local_rows(name, vocabulary, stored)
        if token is None:
            owner = self._owner(own_token(), own_position() if position is None else position.clone())
        else:
            owner = self._owner(token.clone(), None if position is None else position.clone())
        if stored is not None and self._config.dept.inner_state == "keep":
            owner.load_optimizer_state(read_embedding_optimizer(stored, f"source/{name}"))
        return HeldEmbedding(owner, token, position)

    def release(self, name: str | None, held: HeldEmbedding | None, ids: np.ndarray | None, round: int) -> None:
        """Take back what a local phase made of an embedding. Collective where rows are shared.

        An idle silo, and one whose source is left out of the round, passes no `held`.
        """
        if self._resident is not None:
            return
        for part, table in self._tables.items():
            if held is None or ids is None:
                table.accumulate(NO_IDS, torch.empty(0, self._config.model.hidden_size))
                continue
            start = held.start_token if part == "token" else held.start_position
            assert start is not None
            current = getattr(held.owner.module, part).detach().cpu()
            which = torch.from_numpy(ids.copy()) if part == "token" else torch.arange(self._positions)
            table.accumulate(which, start.sub_(current))
        if name is None or held is None or not self._world.leads_silo:
            return
        keep = self._config.dept.inner_state == "keep"
        tensors = embedding_tensors(f"source/{name}", held.owner, with_optimizer=keep)
        if "token" in self._tables:
            tensors.pop(f"source/{name}/token@0")
        if "position" in self._tables:
            tensors.pop(f"source/{name}/position@0", None)
        if tensors:
            self._store.save(name, "embedding", round + 1, tensors)

    def end_round(self) -> None:
        """Shared rows become the means of the round."""
        for table in self._tables.values():
            table.apply()

    def view(self, name: str | None, vocabulary: VocabularyMap | None) -> SourceEmbedding | None:
        """A source's embedding to evaluate with; None where it has none yet. Collective where rows are shared."""
        if self._resident is not None:
            return self._resident.module
        token, position = self._shared_rows(vocabulary, "evaluation")
        if name is None or vocabulary is None:
            return None
        stored = self._store.index(name)
        if token is None:
            if stored is None:
                return None
            own_token, own_position = self._local_rows(name, vocabulary, stored)
            return self._module(own_token(), own_position() if position is None else position)
        return self._module(token, position)

    def replace_resident(self, token: Tensor, position: Tensor | None) -> None:
        """Start the resident embedding from given tables (adapt's own-embedding protocol)."""
        assert self._resident is not None
        self._resident = self._owner(token, position)

    def tensors(self, mid_round: bool) -> dict[str, Tensor]:
        """This rank's part of the shared or resident tables for a checkpoint, with the round's sums where under way."""
        entries: dict[str, Tensor] = {}
        if self._resident is not None and self._world.leads_silo:
            for part, parameter in self._resident.module.named_parameters():
                entries |= whole(part, parameter)
        for part, table in self._tables.items():
            entries |= whole(part, table.rows, table.first)
            if table.momentum is not None:
                entries |= whole(f"{part}.momentum", table.momentum, table.first)
            if mid_round:
                entries |= whole(f"{part}.sums", table.pending.sums, table.first)
                entries |= whole(f"{part}.counts", table.pending.counts, table.first)
        return {key: value for key, value in entries.items() if len(value)}

    def load(self, index: SliceIndex, mid_round: bool) -> None:
        """Put back what all ranks' `tensors` saved, on any layout."""
        if self._resident is not None:
            position = index.read("position") if self._positions else None
            self._resident = self._owner(index.read("token"), position)
        for part, table in self._tables.items():
            first, last = table.first, table.first + len(table.rows)
            if first == last:
                continue
            table.rows.copy_(index.read(part, first, last))
            if table.momentum is not None:
                table.momentum.copy_(index.read(f"{part}.momentum", first, last))
            if mid_round:
                table.pending.sums.copy_(index.read(f"{part}.sums", first, last))
                table.pending.counts.copy_(index.read(f"{part}.counts", first, last))

    def _shared_rows(self, vocabulary: VocabularyMap | None, kind: Kind | None) -> tuple[Tensor | None, Tensor | None]:
        ids = NO_IDS if vocabulary is None else torch.from_numpy(vocabulary.ids.copy())
        positions = NO_IDS if vocabulary is None else torch.arange(self._positions)
        token = self._tables["token"].gather(ids, kind) if "token" in self._tables else None
        position = self._tables["position"].gather(positions, kind) if "position" in self._tables else None
        return token, position

    def _local_rows(
        self, name: str, vocabulary: VocabularyMap, stored: SliceIndex | None
    ) -> tuple[Callable[[], Tensor], Callable[[], Tensor | None]]:
        """A source's own tables: as stored, or random the first time it is sampled (SPEC, algorithm 1)."""

        def token() -> Tensor:
            if stored is not None:
                return stored.read(f"source/{name}/token")
            return self._initial(len(vocabulary), (name,))[0]

        def position() -> Tensor | None:
            if not self._positions:
                return None
            return stored.read(f"source/{name}/position") if stored is not None else self._initial(1, (name,))[1]

        return token, position

    def _initial(self, rows: int, meaning: tuple[str | int, ...]) -> tuple[Tensor, Tensor | None]:
        """Random token and position tables for what `meaning` names; equal wherever they are made."""
        token = self._draw("token", 0, rows, meaning)
        return token, self._draw("position", 0, self._positions, meaning) if self._positions else None

    def _draw(self, part: str, start: int, stop: int, meaning: tuple[str | int, ...]) -> Tensor:
        model = self._config.model
        phase = ("adapt",) if self._config.phase == "adapt" else ()
        return init_rows(start, stop, model.hidden_size, model.init_std, self._config.seed, part, *phase, *meaning)

    def _row_table(self, kind: Kind, part: str, rows: int, rule: OuterRule) -> RowTable:
        return RowTable(
            kind,
            rows,
            self._config.model.hidden_size,
            self._world.peers,
            self._world.silo,
            rule,
            lambda start, stop: self._draw(part, start, stop, ()),
        )

    def _module(self, token: Tensor, position: Tensor | None) -> SourceEmbedding:
        module = SourceEmbedding(token, position, self._dtype, self._config.training.loss_chunk_tokens)
        return module.to(self._world.device)

    def _owner(self, token: Tensor, position: Tensor | None) -> EmbeddingOwner:
        return EmbeddingOwner(self._module(token, position), self._config.optimizer, self._world.silo)


def embedding_tensors(prefix: str, owner: EmbeddingOwner, with_optimizer: bool) -> dict[str, Tensor]:
    """An embedding, and its inner optimizer state where asked for, as named entries under `prefix`."""
    entries: dict[str, Tensor] = {}
    for part, parameter in owner.module.named_parameters():
        entries |= whole(f"{prefix}/{part}", parameter)
    if with_optimizer:
        for key, value in owner.optimizer_state().items():
            entries |= whole(f"{prefix}/embedding.optimizer/{key}", value)
    return entries


def read_embedding_optimizer(index: SliceIndex, prefix: str) -> dict[str, Tensor]:
    """What `embedding_tensors` saved of the optimizer; empty where it saved none."""
    path = f"{prefix}/embedding.optimizer/"
    return {key: index.read(path + key) for key in index.paths(path)}
