"""A hash of the body that does not depend on how its elements are cut over ranks.

Every element is mixed with its place in the whole body, and the mixed numbers are added modulo 2^64: ranks hash what
they hold, in any order, and the sum of their hashes is the body's. It finds faults of memory and network, no forgery.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dept.common.errors import FederationError
from megatron_dept.common.segments import Segment
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World

_CHUNK = 1 << 20
"""Elements hashed at once: the 64-bit intermediate values of a chunk stay in cache."""
_CHUNK_IN_PLACE = 1 << 24
"""On a GPU: enough to fill it, little beside a body."""
_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hash_partition(flat: Tensor, segments: Iterable[Segment], shapes: Mapping[str, Sequence[int]]) -> int:
    """This rank's summand: over its primary segments of an fp32 partition [n]; `shapes`: whole, in the body's order."""
    starts, at = {}, 0
    for name, shape in shapes.items():
        starts[name] = at
        at += math.prod(shape)
    pieces = ((starts[each.name] + each.start, each.place) for each in segments if each.primary)
    if flat.device.type == "cpu":
        return _hash_on_host(flat.detach().contiguous().numpy().view(np.uint32), pieces)
    return _hash_in_place(flat.detach().contiguous(), pieces)


def _hash_on_host(bits: np.ndarray, pieces: Iterable[tuple[int, slice]]) -> int:
    """`pieces`: (place in the whole body of a piece's first element, where it lies in `bits`)."""
    total = np.uint64(0)
    with np.errstate(over="ignore"):
        for first, place in pieces:
            piece = bits[place]
            for low in range(0, len(piece), _CHUNK):
                values = piece[low : low + _CHUNK].astype(np.uint64)
                places = np.arange(first + low, first + low + len(values), dtype=np.uint64)
                total += _mix(_mix(places) ^ values).sum(dtype=np.uint64)
    return int(total)


def _hash_in_place(flat: Tensor, pieces: Iterable[tuple[int, slice]]) -> int:
    """The same in torch's int64, whose sums and products wrap alike: a GPU's body stays on the GPU."""
    bits = flat.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first, place in pieces:
        for low in range(place.start, place.stop, _CHUNK_IN_PLACE):
            values = bits[low : min(low + _CHUNK_IN_PLACE, place.stop)].long().bitwise_and_(0xFFFFFFFF)
            begin = first + low - place.start
            places = torch.arange(begin, begin + len(values), device=flat.device)
            total += _mix_in_place(_mix_in_place(places).bitwise_xor_(values)).sum()
    return int(total) % 2**64


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
    values = values + np.uint64(_INCREMENT)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def _mix_in_place(values: Tensor) -> Tensor:
    """`_mix` on int64, written over `values`."""
    values += _signed(_INCREMENT)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        # int64 is shifted with its sign; what came in from the left is masked away.
        values ^= (values >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        values *= _signed(factor)
    return values


def _signed(number: int) -> int:
    """The int64 with the bits of a uint64."""
    return number - 2**64 if number >= 2**63 else number
