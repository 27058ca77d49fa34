"""Where a source's embedding comes from at the start of its local phase, and where it goes at the end.

The variant's table (`dept.variants`) says which: shared rows come from and return to row tables, local ones live in the
source store, a resident one stays in memory. Only the embedding of the source in training is ever held, and of that a
rank holds its vocabulary shard: the silo's first stage for the look-up, its last for the head, no stage between.
Shapes: `v` rows of a source, `v_t` of them on a tensor rank, `h` hidden, `L` positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dept.checkpoint.slice_file import Entry
from megatron_dept.checkpoint.slices import SliceIndex, whole
from megatron_dept.checkpoint.store import Read, SourceStore
from megatron_dept.config.schema import RunConfig
from megatron_dept.data.remap import VocabularyMap
from megatron_dept.dept.outer import OuterRule
from megatron_dept.dept.row_storage import RowStorage
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.engine.embedding_owner import EmbeddingOwner
from megatron_dept.engine.world import World
from megatron_dept.federation.ledger import Kind
from megatron_dept.federation.replicated_rows import ReplicatedRowTable
from megatron_dept.federation.row_table import RowTable
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.initialise import init_rows
from megatron_dept.models.vocabulary_shard import VocabularyShard
from megatron_dept.training.partitions import row_spread
from megatron_dept.training.table_state import load_table, table_entries

NO_IDS = torch.empty(0, dtype=torch.int64)
NO_ROWS = range(0)


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
        # The first stage alone fetches rows, owns tables and answers for what is saved.
        self._holds = world.first_stage or world.last_stage
        self._saves = world.first_stage and world.place.data == 0
        self._tables: dict[str, RowTable] = {}
        if world.first_stage and self._variant.token_rows == "shared":
            assert vocab_size is not None
            self._tables["token"] = self._row_table("embedding", "token", vocab_size, rule)
        if world.first_stage and self._variant.position_rows == "shared" and self._positions:
            self._tables["position"] = self._row_table("position", "position", self._positions, rule)
        self._resident: EmbeddingOwner | None = None
        self._vocab_size = vocab_size
        if self._variant.token_rows == "resident" and self._holds:
            self._resident = self._fresh_resident(())

    @property
    def tables(self) -> dict[str, RowTable]:
        """This rank's shared tables, "token" and "position", where the variant has them."""
        return self._tables

    @property
    def resident(self) -> EmbeddingOwner | None:
        """The one embedding of a variant whose embedding stays in memory; None on a pipeline's middle stages."""
        return self._resident

    def acquire(
        self, name: str | None, vocabulary: VocabularyMap | None, round: int, resuming: bool = False
    ) -> HeldEmbedding | None:
        """The embedding for a local phase of source `name`; None for an idle silo and on a pipeline's middle stages.

        Collective where rows are shared. `resuming`: the phase goes on from a checkpoint, which has what a phase's
        start would make anew.
        """
        if self._variant.token_rows == "resident":
            if self._resident is not None and self._variant.resets_embedding and not resuming:
                self._resident = self._fresh_resident(("reset", round))
            return None if self._resident is None else HeldEmbedding(self._resident, None, None)
        token, position = self._shared_rows(vocabulary, None)
        if name is None or vocabulary is None or not self._holds:
            return None
        shard = self._shard(len(vocabulary))
        stored = self._store.index(name)
        own_token, own_position = token, position
        if token is None:
            own_token = self._own_token(name, shard, stored)
        if position is None:
            own_position = self._own_position(name, stored)
        assert own_token is not None
        # What is trained is a copy: the rows as they came are what the deltas are taken from.
        owner = self._owner(
            own_token if token is None else token.clone(),
            own_position if position is None else position.clone(),
            shard,
        )
        if stored is not None and self._config.dept.inner_state == "keep":
            owner.load_optimizer_state(read_embedding_optimizer(stored, f"source/{name}", held_rows(owner)))
        return HeldEmbedding(owner, token, position)

    def ahead(self, name: str, rows: int) -> Read | None:
        """Reads what `acquire` will ask of the store, for a source of `rows` rows; None: nothing."""
        if self._variant.token_rows == "resident" or not self._holds:
            return None
        shard, mine = self._shard(rows), {}
        if self._variant.token_rows == "local":
            mine["token"] = range(shard.start, shard.stop)
        if self._has_position and self._variant.position_rows == "local":
            mine["position"] = range(self._positions)

        def read(stored: SliceIndex) -> None:
            for part, which in mine.items():
                stored.read(f"source/{name}/{part}", which.start, which.stop)
            if self._config.dept.inner_state == "keep":
                every = {"token": range(shard.start, shard.stop)}
                if self._has_position:
                    every["position"] = range(self._positions)
                read_embedding_optimizer(stored, f"source/{name}", every)

        return read

    def release(self, name: str | None, held: HeldEmbedding | None, ids: np.ndarray | None, round: int) -> None:
        """Take back what a local phase made of an embedding. Collective where rows are shared.

        An idle silo, and one whose source is left out of the round, passes no `held`.
        """
        if self._variant.token_rows == "resident":
            return
        for part, table in self._tables.items():
            if held is None or ids is None:
                table.accumulate(NO_IDS, torch.empty(0, self._config.model.hidden_size), NO_ROWS)
                continue
            which = torch.from_numpy(ids.copy()) if part == "token" else torch.arange(self._positions)
            table.accumulate(which, self._row_deltas(part, held), self._need(part, len(which)))
        if name is None or held is None or not self._saves:
            return
        keep = self._config.dept.inner_state == "keep"
        tensors = embedding_tensors(f"source/{name}", held.owner, keep, self._world.leads_silo)
        for part in self._tables:
            tensors = {key: value for key, value in tensors.items() if not key.startswith(f"source/{name}/{part}@")}
        if tensors:
            self._store.save(name, f"embedding-{self._world.place.tensor}", round + 1, tensors)

    def end_round(self) -> None:
        """Shared rows become the means of the round."""
        for table in self._tables.values():
            table.apply()

    def view(self, name: str | None, vocabulary: VocabularyMap | None) -> SourceEmbedding | None:
        """A source's embedding to evaluate with; None where it has none yet, and on a pipeline's middle stages.

        Collective where rows are shared.
        """
        if self._variant.token_rows == "resident":
            return None if self._resident is None else self._resident.module
        token, position = self._shared_rows(vocabulary, "evaluation")
        if name is None or vocabulary is None or not self._holds or not self.has(name):
            return None
        shard, stored = self._shard(len(vocabulary)), self._store.index(name)
        if token is None:
            token = self._own_token(name, shard, stored)
        if position is None:
            position = self._own_position(name, stored)
        return self._module(token, position, shard)

    def has(self, name: str) -> bool:
        """Whether a source has an embedding yet: one of its own it has from its first turn on."""
        return self._variant.token_rows != "local" or self._store.has(name)

    def replace_resident(self, index: SliceIndex) -> None:
        """Start the resident embedding from a checkpoint's global tables (adapt's own-embedding protocol)."""
        self.load(index, mid_round=False)

    def tensors(self, mid_round: bool) -> dict[str, Entry]:
        """This rank's part of the shared or resident tables for a checkpoint, with the round's sums where under way."""
        entries: dict[str, Entry] = {}
        if self._resident is not None and self._saves:
            for part, parameter in self._resident.module.named_parameters():
                entries |= whole(part, parameter, first_row(self._resident, part))
        for part, table in self._tables.items():
            entries |= table_entries(part, table, mid_round)
        return {key: value for key, value in entries.items() if len(value)}

    def load(self, index: SliceIndex, mid_round: bool) -> None:
        """Put back what all ranks' `tensors` saved, on any layout."""
        if self._resident is not None:
            assert self._vocab_size is not None
            shard = self._shard(self._vocab_size)
            position = index.read("position") if self._has_position else None
            self._resident = self._owner(index.read("token", shard.start, shard.stop), position, shard)
        for part, table in self._tables.items():
            load_table(index, part, table, mid_round)

    @property
    def _has_position(self) -> bool:
        """Positions are added once: on the first stage's first tensor rank, before the ranks' rows are summed."""
        return self._positions > 0 and self._world.first_stage and self._world.place.tensor == 0

    def _need(self, part: str, rows: int) -> range:
        """Which of a table's rows, in the order of their ids, this rank holds in training."""
        if part == "token":
            shard = self._shard(rows)
            return range(shard.start, shard.stop)
        return range(rows if self._has_position else 0)

    def _row_deltas(self, part: str, held: HeldEmbedding) -> Tensor:
        """Start minus end of a local phase, of the rows this rank holds; the start's tensor is used up."""
        start = held.start_token if part == "token" else held.start_position
        current = getattr(held.owner.module, part)
        if start is None or current is None:
            return torch.empty(0, self._config.model.hidden_size)
        return start.sub_(current.detach().cpu())

    def _shared_rows(self, vocabulary: VocabularyMap | None, kind: Kind | None) -> tuple[Tensor | None, Tensor | None]:
        """This rank's rows of the shared tables; on the last stage, what its first stage has fetched."""
        token = position = None
        rows = 0 if vocabulary is None else len(vocabulary)
        if "token" in self._tables:
            ids = NO_IDS if vocabulary is None else torch.from_numpy(vocabulary.ids.copy())
            token = self._tables["token"].gather(ids, self._need("token", rows) if rows else NO_ROWS, kind)
        if "position" in self._tables:
            ids = NO_IDS if vocabulary is None else torch.arange(self._positions)
            fetched = self._tables["position"].gather(ids, self._need("position", len(ids)), kind)
            position = fetched if self._has_position else None
        if self._variant.token_rows == "shared" and rows and self._world.ends.size > 1:
            if token is None:
                need = self._need("token", rows)
                token = torch.empty(len(need), self._config.model.hidden_size)
            self._world.ends.broadcast(token, 0, kind or "embedding")
        return token, position

    def _own_token(self, name: str, shard: VocabularyShard, stored: SliceIndex | None) -> Tensor:
        """A source's own rows: as stored, or random the first time it is sampled (SPEC, algorithm 1)."""
        if stored is not None:
            return stored.read(f"source/{name}/token", shard.start, shard.stop)
        return self._draw("token", shard.start, shard.stop, (name,))

    def _own_position(self, name: str, stored: SliceIndex | None) -> Tensor | None:
        if not self._has_position or self._variant.position_rows == "shared":
            return None
        if stored is not None:
            return stored.read(f"source/{name}/position", 0, self._positions)
        return self._draw("position", 0, self._positions, (name,))

    def _fresh_resident(self, meaning: tuple[str | int, ...]) -> EmbeddingOwner:
        """Random tables for what `meaning` names; equal on whatever ranks they are made."""
        assert self._vocab_size is not None
        shard = self._shard(self._vocab_size)
        position = self._draw("position", 0, self._positions, meaning) if self._has_position else None
        return self._owner(self._draw("token", shard.start, shard.stop, meaning), position, shard)

    def _draw(self, part: str, start: int, stop: int, meaning: tuple[str | int, ...]) -> Tensor:
        model = self._config.model
        phase = ("adapt",) if self._config.phase == "adapt" else ()
        return init_rows(start, stop, model.hidden_size, model.init_std, self._config.seed, part, *phase, *meaning)

    def _row_table(self, kind: Kind, part: str, rows: int, rule: OuterRule) -> RowTable:
        world, hidden = self._world, self._config.model.hidden_size
        others = world.peers if world.layout.equal else world.row_owners
        storage = row_storage(self._config, world.device)
        wire = torch.bfloat16 if self._config.embedding.wire == "bf16" else torch.float32

        def initial(start: int, stop: int) -> Tensor:
            return self._draw(part, start, stop, ())

        if world.separate:
            silos = range(world.layout.silos)
            if not world.layout.equal:
                owners = world.layout.embedding_ranks()
                silos = [world.layout.coordinate(rank).silo for rank in owners]  # type: ignore[assignment]
            return ReplicatedRowTable(
                kind,
                hidden,
                rows,
                others,
                silos,
                world.place.silo,
                world.embedding,
                world.shape.tensor,
                rule,
                initial,
                storage,
                wire,
            )
        spread = row_spread(world.layout, rows)
        tensor = world.shape.tensor
        return RowTable(kind, hidden, spread, others, world.embedding, tensor, rule, initial, storage, wire)

    def _shard(self, rows: int) -> VocabularyShard:
        return VocabularyShard(self._world.tensor, rows, self._config.parallel.sequence_parallel)

    def _module(self, token: Tensor, position: Tensor | None, shard: VocabularyShard) -> SourceEmbedding:
        module = SourceEmbedding(token, position, self._dtype, self._config.training.loss_chunk_tokens, shard)
        return module.to(self._world.device)

    def _owner(self, token: Tensor, position: Tensor | None, shard: VocabularyShard) -> EmbeddingOwner:
        return EmbeddingOwner(self._module(token, position, shard), self._config.optimizer, self._world)


def row_storage(config: RunConfig, device: torch.device) -> RowStorage:
    """Where a rank keeps its rows of shared tables."""
    if config.embedding.row_table == "disk":
        return RowStorage(directory=config.embedding.directory or config.run_dir / "tables")
    return RowStorage(pinned=device.type == "cuda")


def first_row(owner: EmbeddingOwner, part: str) -> int:
    """Which row of the whole table an owner's rows begin with."""
    return owner.module.shard.start if part == "token" else 0


def held_rows(owner: EmbeddingOwner) -> dict[str, range]:
    """Which rows of the whole tables an owner has, by part."""
    rows = {"token": range(owner.module.shard.start, owner.module.shard.stop)}
    if owner.module.position is not None:
        rows["position"] = range(len(owner.module.position))
    return rows


def embedding_tensors(prefix: str, owner: EmbeddingOwner, with_optimizer: bool, leads: bool) -> dict[str, Tensor]:
    """An embedding shard, and its inner optimizer state where asked for, as named entries under `prefix`.

    `leads`: this rank writes the optimizer's step count, of which there is one a source.
    """
    entries: dict[str, Tensor] = {}
    for part, parameter in owner.module.named_parameters():
        entries |= whole(f"{prefix}/{part}", parameter, first_row(owner, part))
    if with_optimizer:
        for key, value in owner.optimizer_state().items():
            if key != "step":
                part = key.partition("/")[2]
                entries |= whole(f"{prefix}/embedding.optimizer/{key}", value, first_row(owner, part))
            elif leads:
                entries |= whole(f"{prefix}/embedding.optimizer/step", value)
    return entries


def read_embedding_optimizer(index: SliceIndex, prefix: str, rows: Mapping[str, range]) -> dict[str, Tensor]:
    """What `embedding_tensors` saved of the optimizer, of each part's `rows`; empty where it saved none."""
    path = f"{prefix}/embedding.optimizer/"
    state: dict[str, Tensor] = {}
    for key in index.paths(path):
        if key == "step":
            state[key] = index.read(path + key)
            continue
        which = rows.get(key.partition("/")[2])
        if which is not None:
            state[key] = index.read(path + key, which.start, which.stop)
    return state
