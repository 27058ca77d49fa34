"""The body's inner optimizer state at a source's turn: reset every round (the paper's recipe), or kept (DiLoCo).

Where it is kept it belongs to the source, so it waits in the source store, by parameter name, for the next turn.
Shapes: `n` elements of this rank's partition.
"""

import torch
from torch import Tensor

from megatron_dept.checkpoint.slices import SliceIndex, cut_by_name, whole
from megatron_dept.checkpoint.store import Read, SourceStore
from megatron_dept.common.segments import Segment
from megatron_dept.config.schema import DeptConfig
from megatron_dept.engine.body_shards import BodyShards
from megatron_dept.engine.world import World


class InnerState:
    """Begins and ends local phases for the body's inner optimizer. Synchronous variants keep theirs in the engine."""

    def __init__(self, config: DeptConfig, world: World, shards: BodyShards, store: SourceStore) -> None:
        self._resident = config.synchronous
        self._keeps = config.inner_state == "keep"
        self._world = world
        self._shards = shards
        self._store = store

    def begin(self, name: str) -> None:
        """The state with which source `name` starts its local phase."""
        if self._resident:
            return
        stored = self._store.index(name) if self._keeps else None
        state = read_inner_state(stored, f"source/{name}", self._shards.numel, self._shards.segments) if stored else {}
        self._shards.load_optimizer_state(state)

    def ahead(self, name: str) -> Read | None:
        """Reads what `begin` will ask of the store; None where it asks for nothing."""
        if self._resident or not self._keeps:
            return None
        prefix, numel, segments = f"source/{name}", self._shards.numel, self._shards.segments
        return lambda stored: read_inner_state(stored, prefix, numel, segments)

    def end(self, name: str, round: int) -> None:
        """Source `name` has ended its phase of `round`."""
        if self._resident or not self._keeps:
            return
        state, leads = self._shards.optimizer_state(), self._world.leads_silo
        tensors = inner_tensors(f"source/{name}", state, self._shards.segments, leads)
        self._store.save(
            name, f"inner-{self._world.rank - self._world.layout.offset(self._world.place.silo)}", round + 1, tensors
        )


def inner_tensors(prefix: str, state: dict[str, Tensor], segments: list[Segment], leads: bool) -> dict[str, Tensor]:
    """The body's inner optimizer state as named entries under `prefix`; the step count by the silo's leader alone."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "step":
            tensors |= whole(f"{prefix}/inner.step", value) if leads else {}
        else:
            tensors |= cut_by_name(f"{prefix}/inner/{key}", value, segments)
    return tensors


def read_inner_state(index: SliceIndex, prefix: str, numel: int, segments: list[Segment]) -> dict[str, Tensor]:
    """What `inner_tensors` saved, for this rank's partition; empty where it saved none."""
    if f"{prefix}/inner.step" not in index:
        return {}
    moments = sorted({path.split("/")[0] for path in index.paths(f"{prefix}/inner/")})
    state = {key: index.fill(torch.zeros(numel), f"{prefix}/inner/{key}", segments) for key in moments}
    return {**state, "step": index.read(f"{prefix}/inner.step")}
