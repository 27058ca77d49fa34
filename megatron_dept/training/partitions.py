"""How large every rank's part of the body and its fp32 partition are, known before anything is allocated.

Shapes: P stages, D data ranks, T tensor ranks of a silo.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dept.common.segments import Segment
from megatron_dept.config.schema import RunConfig
from megatron_dept.federation.row_spread import RowSpread
from megatron_dept.models.build import empty_body
from megatron_dept.models.parts import BodyPart
from megatron_dept.models.pipeline import stage_layers
from megatron_dept.tensor_parallel.shards import ParameterShard, shard_of
from megatron_dept.topology.layout import Layout, SiloShape
from megatron_dept.training.planning.cut import partition, partition_ranges


@dataclass
class _PlannedRank:
    """A tensor rank that has no group yet: what a body needs to know of it to have its shapes."""

    rank: int
    size: int

    def all_reduce_sum(self, value: Tensor, kind: str) -> None:
        raise AssertionError("a planned rank tells nobody anything")

    all_reduce_max = all_reduce_sum

    def all_gather(self, mine: Tensor, kind: str) -> Tensor:
        raise AssertionError("a planned rank tells nobody anything")

    reduce_scatter_sum = all_gather


@dataclass(frozen=True)
class RankPart:
    """One rank's part of the body in elements.

    `held`: its parameters; `primary`: those of them that no other tensor rank counts; `partition`: its fp32 share under
    ZeRO, padding included. `shards`: its parameters by name, in order.
    """

    pipe: int
    tensor: int
    layers: int
    held: int
    primary: int
    partition: int
    shards: Mapping[str, ParameterShard]


def row_spread(layout: Layout, rows: int) -> RowSpread:
    """Who owns which of a shared table's rows."""
    ranks = tuple(shape.embedding_ranks for shape in layout.shapes)
    return RowSpread.of_peers(rows, layout.silos, ranks[0]) if layout.equal else RowSpread.of_all(rows, ranks)


def silo_parts(config: RunConfig, shape: SiloShape, largest_vocabulary: int) -> Iterator[RankPart]:
    """The parts of a silo's ranks, in rank order (stage, data, tensor)."""
    for pipe, layers in enumerate(stage_layers(config.model, shape.pipe, largest_vocabulary)):
        stage = [_part(config, shape, pipe, layers, tensor) for tensor in range(shape.tensor)]
        for _ in range(shape.data):
            yield from stage


def _part(config: RunConfig, shape: SiloShape, pipe: int, layers: range, tensor: int) -> RankPart:
    part = BodyPart(
        _PlannedRank(tensor, shape.tensor),
        config.parallel.sequence_parallel and shape.tensor > 1,
        layers,
        final_norm=pipe == shape.pipe - 1,
    )
    with torch.device("meta"):
        parameters = dict(empty_body(config.model, part=part).named_parameters())
    sizes = [parameter.numel() for parameter in parameters.values()]
    shards = {name: shard_of(parameter) for name, parameter in parameters.items()}
    return RankPart(
        pipe,
        tensor,
        len(layers),
        sum(sizes),
        sum(run.count for shard in shards.values() for run in shard.runs if run.primary),
        partition(sizes, shape),
        shards,
    )


def whole_body(parts: Sequence[RankPart], data: int) -> int:
    """Elements of the whole body, from all parts of a silo of `data` data ranks."""
    return sum(part.primary for part in parts) // data


def partition_segments(part: RankPart, shape: SiloShape, data: int) -> list[Segment]:
    """Names for the partition of data rank `data` that has `part`, by whole parameters; where it lies is not told."""
    sizes = [math.prod(shard.local_shape) for shard in part.shards.values()]
    found = []
    for (name, shard), own in zip(part.shards.items(), partition_ranges(sizes, shape, data), strict=True):
        for run in shard.runs:
            low, high = max(own.start, run.local), min(own.stop, run.local + run.count)
            if low < high:
                shift = run.start - run.local
                found.append(Segment(name, low + shift, high + shift, low + shift, run.primary))
    return found
