"""A hash of the body that does not depend on how its elements are cut over ranks.

Every element is mixed with its place in the whole body, and the mixed numbers are added modulo 2^64: ranks hash what
they hold, in any order, and the sum of their hashes is the body's. It finds faults of memory and network, no forgery.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from megatron_dept.common.errors import FederationError
from megatron_dept.common.segments import Segment
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World

_CHUNK = 1 << 20
"""Elements hashed at once: the 64-bit intermediate values of a chunk stay in cache."""


def hash_partition(flat: Tensor, segments: Iterable[Segment], shapes: Mapping[str, Sequence[int]]) -> int:
    """This rank's summand: over its primary segments of an fp32 partition [n]; `shapes`: whole, in the body's order."""
    starts, at = {}, 0
    for name, shape in shapes.items():
        starts[name] = at
        at += math.prod(shape)
    bits = flat.detach().cpu().contiguous().numpy().view(np.uint32)
    total = np.uint64(0)
    with np.errstate(over="ignore"):
        for segment in segments:
            if not segment.primary:
                continue
            first, piece = starts[segment.name] + segment.start, bits[segment.place]
            for low in range(0, len(piece), _CHUNK):
                values = piece[low : low + _CHUNK].astype(np.uint64)
                places = np.arange(first + low, first + low + len(values), dtype=np.uint64)
                total += _mix(_mix(places) ^ values).sum(dtype=np.uint64)
    return int(total)


def join_hashes(parts: Iterable[int]) -> str:
    """The body's hash from those of all ranks of a silo."""
    return f"{sum(parts) % 2**64:016x}"


def agree_on_body(world: World, engine: SiloEngine, value: Tensor, round: int) -> str:
    """The hash of the whole body, from every rank's partition `value` of it, fp32 [n]. Collective.

    Raises `FederationError` where silos do not have the same.
    """
    parts: list[Any] = world.gather_all(hash_partition(value, engine.shards.segments, engine.body_shapes))
    layout = world.layout
    bodies = [join_hashes(parts[rank] for rank in layout.members(silo)) for silo in range(layout.silos)]
    if len(set(bodies)) != 1:
        raise FederationError(
            f"silos hold different bodies after round {round + 1}: {bodies}; "
            "this is a fault of memory or network, start again from the last checkpoint"
        )
    return bodies[0]


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014), element by element."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
