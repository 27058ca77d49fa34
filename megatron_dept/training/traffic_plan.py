"""Bytes a round must move, computed beforehand: what `--dry-run` prints and what the ledger is held against.

The leading term is the paper's, 2 x |body| x (S - 1) / S elements a silo; what tensor ranks hold copies of, and padding
of partitions and shares, comes on top.
Shapes: `S` silos, `P`, `D`, `T` stages, data and tensor ranks of each, `h` hidden.
"""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_dept.common.sizes import FP32_BYTES
from megatron_dept.config.schema import RunConfig
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.federation.named_plan import CanonicalOrder, named_exchange_bytes
from megatron_dept.federation.row_spread import RowSpread, fetch_bytes, return_bytes
from megatron_dept.federation.shares import ELEMENT_BYTES, exchange_bytes
from megatron_dept.models.vocabulary_shard import VocabularyShard
from megatron_dept.ops.wires import Wire
from megatron_dept.topology.layout import Layout
from megatron_dept.training.partitions import RankPart, partition_segments, row_spread, whole_body
from megatron_dept.training.sources import SourceSet

Slots = Sequence[Sequence[str | None]]
"""Slots x silos of source names, as `assign_slots` lays them out."""


class TrafficPlan:
    """Of all ranks; where silos are launches of their own, of this `silo`'s, which alone knows its sources' rows.

    `body_bytes`: what these ranks send in an outer exchange of the body, as measured off its plan or foretold.
    """

    def __init__(
        self, config: RunConfig, layout: Layout, sources: SourceSet, body_bytes: int, silo: int | None = None
    ) -> None:
        self._silo = silo
        self._layout = layout
        self._sources = sources
        self._body_bytes = body_bytes
        self._variant = VARIANTS[config.dept.variant]
        self._hidden = config.model.hidden_size
        self._positions = config.model.seq_length if config.model.has_position_table else 0
        # Always the same, and to know it every source's vocabulary is opened.
        self._evaluation: int | None = None
        self._width = 2 if config.embedding.wire == "bf16" else FP32_BYTES

    def round_bytes(self, sampled: Sequence[str]) -> dict[str, int]:
        """Bytes sent in a round of these sources, by kind, where no source is left out."""
        if not self._variant.averages_body:
            return {"body": 0, "embedding": 0, "position": 0}
        slots = self._sources.slots(sampled, self._layout.silos)
        fetched, again = self._shared_rows(slots), self._shared_rows(slots, fetch=False)
        told = self._told_rows(sampled)
        return {"body": self._body_bytes} | {kind: fetched[kind] + again[kind] + told[kind] for kind in fetched}

    def evaluation_bytes(self) -> int:
        """Bytes sent to fetch the rows that one validation of all sources needs."""
        if self._evaluation is None:
            slots = self._sources.slots(self._sources.names, self._layout.silos)
            if self._variant.vocabulary == "global":
                # One embedding serves all sources: each silo fetches it once.
                slots = ((next(iter(self._sources.vocabularies)),) * self._layout.silos,)
            self._evaluation = sum(self._shared_rows(slots).values())
        return self._evaluation

    def _shared_rows(self, slots: Slots, fetch: bool = True) -> dict[str, int]:
        """By kind, bytes of fetching the shared rows of all `slots`' sources, or (`fetch` False) of returning them."""
        tokens = positions = 0
        if self._variant.token_rows == "shared":
            assert self._sources.vocab_size is not None
            total, ids_of = self._sources.vocab_size, lambda name: self._sources.vocabularies[name].ids
            tokens = self._row_bytes(slots, total, ids_of, self._token_needs, fetch)
            if fetch:
                tokens += self._last_stages(slots)
        if self._variant.position_rows == "shared" and self._positions:
            every = np.arange(self._positions)
            positions = self._row_bytes(slots, self._positions, lambda name: every, self._position_needs, fetch)
        return {"embedding": tokens, "position": positions}

    def _told_rows(self, sampled: Sequence[str]) -> dict[str, int]:
        """What a silo that keeps whole tables tells the others at a round's end: each touched row, to each of them."""
        told = {"embedding": 0, "position": 0}
        own = [name for name in sampled if name in self._sources.vocabularies]
        if self._silo is None or not own:
            return told
        row = (self._layout.silos - 1) * self._hidden * self._width
        if self._variant.token_rows == "shared":
            touched = np.unique(np.concatenate([self._sources.vocabularies[name].ids for name in own]))
            told["embedding"] = len(touched) * row
        if self._variant.position_rows == "shared":
            told["position"] = self._positions * row
        return told

    def _row_bytes(
        self,
        slots: Slots,
        total_rows: int,
        ids_of: Callable[[str], np.ndarray],
        needs_of: Callable[[int, int], list[range]],
        fetch: bool,
    ) -> int:
        sent = 0
        for slot in slots:
            for silo, name in enumerate(slot):
                if name is None or self._silo not in (None, silo):
                    continue
                spread, place = row_spread(self._layout, total_rows), silo
                if self._silo is not None:
                    spread, place = RowSpread.of_peers(total_rows, 1, self._layout.shapes[silo].embedding_ranks), 0
                ids = ids_of(name)
                needs = needs_of(silo, len(ids))
                tensor = self._layout.shapes[silo].tensor
                if fetch:
                    by_link = fetch_bytes(spread, place, ids, needs, self._hidden, self._width)
                else:
                    by_link = return_bytes(spread, place, ids, needs, tensor, self._hidden, self._width)
                sent += sum(by_link.values())
        return sent

    def _last_stages(self, slots: Slots) -> int:
        """What first stages hand on to the last ones, which look up no token but multiply by the same rows."""
        rows = 0
        for slot in slots:
            for silo, name in enumerate(slot):
                shape = self._layout.shapes[silo]
                if name is not None and self._silo in (None, silo) and shape.pipe > 1:
                    rows += shape.data * len(self._sources.vocabularies[name])
        return rows * self._hidden * FP32_BYTES

    def _token_needs(self, silo: int, rows: int) -> list[range]:
        shape = self._layout.shapes[silo]
        return [
            VocabularyShard.vocabulary_range(rows, shape.tensor, rank % shape.tensor)
            for rank in range(shape.embedding_ranks)
        ]

    def _position_needs(self, silo: int, rows: int) -> list[range]:
        shape = self._layout.shapes[silo]
        return [range(0 if rank % shape.tensor else rows) for rank in range(shape.embedding_ranks)]


def itemised_body_bytes(
    layout: Layout, parts: Sequence[RankPart], order: CanonicalOrder, wire: Wire = "fp32"
) -> dict[str, int]:
    """Bytes that all ranks send in an outer exchange of the body, by what they are: the formula's, and what is on top.

    Tensor ranks hold copies of norms and some biases, data ranks pad the body to equal partitions, int8 has a scale a
    block of a share. Under ZeRO 0 the replicated body is cut over the data ranks, so nothing is sent twice.
    `parts`: what every rank holds, silo by silo; `order`: the body's. Between unequal silos elements go to owners that
    the names decide, and come back to all who hold them: nothing is padded, and little of it stays inside a silo.
    """
    if not layout.equal:
        return _named_bytes(layout, parts, order)
    shape = layout.shapes[0]
    body = whole_body(parts[: shape.size], shape.data)
    moved = 2 * (layout.silos - 1) * ELEMENT_BYTES[wire]
    of_silo = parts[: shape.size]
    held, partitions = sum(part.held for part in of_silo) // shape.data, sum(part.partition for part in of_silo)
    sent = sum(silo_body_bytes(of_silo, layout.silos, silo, wire) for silo in range(layout.silos))
    return {
        "formula": moved * body,
        "copies_of_tensor_ranks": moved * (held - body),
        "partition_padding": moved * (partitions - held),
        "scales": sent - moved * partitions,
    }


def silo_body_bytes(parts: Sequence[RankPart], silos: int, silo: int, wire: Wire) -> int:
    """Bytes that the ranks of one of equal silos send in an outer exchange of the body; `parts`: what they hold."""
    return sum(exchange_bytes(part.partition, silos, silo, wire) for part in parts)


def _named_bytes(layout: Layout, parts: Sequence[RankPart], order: CanonicalOrder) -> dict[str, int]:
    """Bytes that all ranks of unequal silos send, by link."""
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    holdings = [
        order.intervals(partition_segments(part, layout.shapes[place.silo], place.data))
        for part, place in zip(parts, places, strict=True)
    ]
    sent = named_exchange_bytes(order, holdings, [place.silo for place in places])
    return {
        "between_silos": sum(rank["federation"] for rank in sent),
        "inside_silos": sum(rank["silo"] for rank in sent),
    }
