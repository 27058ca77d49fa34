"""Bytes a round must move, computed beforehand: what `--dry-run` prints and what the ledger is held against.

The leading term is the paper's, 2 x |body| x (S - 1) / S elements a silo; padding of partitions and shares comes on
top.
Shapes: `S` silos, `D` data ranks of each, `h` hidden.
"""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_dept.config.schema import RunConfig
from megatron_dept.dept.sampling import assign_slots
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.federation.body_exchange import share_size
from megatron_dept.federation.row_table import block_size
from megatron_dept.topology.layout import Layout
from megatron_dept.training.sources import SourceSet

FP32_BYTES = 4
Slots = Sequence[Sequence[str | None]]
"""Slots x silos of source names, as `assign_slots` lays them out."""


class TrafficPlan:
    """`partitions`: elements of each data rank's partition of the body, padding included (equal in every silo)."""

    def __init__(self, config: RunConfig, layout: Layout, sources: SourceSet, partitions: Sequence[int]) -> None:
        self._layout = layout
        self._sources = sources
        self._partitions = partitions
        self._variant = VARIANTS[config.dept.variant]
        self._hidden = config.model.hidden_size
        self._positions = config.model.seq_length if config.model.has_position_table else 0

    def round_bytes(self, sampled: Sequence[str]) -> dict[str, int]:
        """Bytes sent by all ranks in a round of these sources, by kind, where no source is left out."""
        if not self._variant.averages_body:
            return {"body": 0, "embedding": 0, "position": 0}
        slots = assign_slots(sampled, self._layout.silos)
        fetched, again = self._shared_rows(slots), self._shared_rows(slots, fetch=False)
        return {"body": self.body_bytes()} | {kind: fetched[kind] + again[kind] for kind in fetched}

    def evaluation_bytes(self) -> int:
        """Bytes sent by all ranks to fetch the rows that one validation of all sources needs."""
        slots = assign_slots(self._sources.names, self._layout.silos)
        if self._variant.vocabulary == "global":
            # One embedding serves all sources: each silo fetches it once.
            slots = ((self._sources.names[0],) * self._layout.silos,)
        return sum(self._shared_rows(slots).values())

    def _shared_rows(self, slots: Slots, fetch: bool = True) -> dict[str, int]:
        """By kind, bytes of fetching the shared rows of all `slots`' sources, or (`fetch` False) of returning them."""
        tokens = positions = 0
        if self._variant.token_rows == "shared":
            assert self._sources.vocab_size is not None
            tokens = self._row_bytes(
                slots, self._sources.vocab_size, lambda name: self._sources.vocabularies[name].ids, fetch
            )
        if self._variant.position_rows == "shared" and self._positions:
            every = np.arange(self._positions)
            positions = self._row_bytes(slots, self._positions, lambda name: every, fetch)
        return {"embedding": tokens, "position": positions}

    def body_bytes(self) -> int:
        """The body's reduce-scatter and all-gather among peers, of all ranks."""
        silos = self._layout.silos
        shares = sum(share_size(numel, silos) for numel in self._partitions)
        return 2 * silos * (silos - 1) * shares * FP32_BYTES

    def itemised_body_bytes(self, body: int) -> dict[str, int]:
        """`body_bytes` of a body of so many parameters by what they are: the formula's, and padding that comes on top.

        Data ranks pad the body to equal partitions, silos pad each partition to equal shares. Nothing is sent twice:
        under ZeRO 0 the replicated body is cut over the data ranks.
        """
        moved = 2 * (self._layout.silos - 1) * FP32_BYTES
        items = {"formula": moved * body, "partition_padding": moved * (sum(self._partitions) - body)}
        return items | {"share_padding": self.body_bytes() - sum(items.values())}

    def _row_bytes(self, slots: Slots, total_rows: int, ids_of: Callable[[str], np.ndarray], fetch: bool) -> int:
        """Rows that cross between silos, and that a silo's data ranks share among themselves after a fetch."""
        silos, data = self._layout.silos, self._layout.data
        block = block_size(total_rows, silos * data)
        rows = 0
        for slot in slots:
            for silo, name in enumerate(slot):
                if name is not None:
                    owners = ids_of(name) // block % silos
                    rows += int((owners != silo).sum()) + ((data - 1) * len(owners) if fetch else 0)
        return rows * self._hidden * FP32_BYTES
