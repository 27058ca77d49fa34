"""What every ZeRO stage's partition of the body can do, and what they share: names, norms, how one step is told.

Shapes: `n` elements of this rank's partition, flat, padding included; padding is never named by a segment.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_dept.common.segments import Segment, joined_places
from megatron_dept.tensor_parallel.shards import ParameterShard


class BodyShards(ABC):
    """The partition of one engine. `segments` name every element of it that is not padding, by whole parameters."""

    segments: list[Segment]
    numel: int

    def __init__(self, local: list[Segment], cut: Mapping[str, ParameterShard], numel: int) -> None:
        """`local`: the same by this rank's own parameters, which tensor ranks may hold parts of."""
        self.numel = numel
        self._local = local
        self.segments = [piece for segment in local for piece in _in_whole(segment, cut[segment.name])]
        self._counted = joined_places(segment.place for segment in self.segments if segment.primary)
        self._copies = joined_places(segment.place for segment in self.segments if not segment.primary)

    @abstractmethod
    def read(self) -> Tensor:
        """A copy of the fp32 masters: [n] on the CPU or the masters' device, padding zero."""

    @abstractmethod
    def write(self, flat: Tensor) -> None:
        """Write [n] into the masters, then refresh every low-precision copy. Collective over the data ranks."""

    def write_local(self, tensors: Mapping[str, Tensor]) -> None:
        """`write` from this rank's own parameters' fp32 values, by name."""
        flat = self.read()
        for segment in self._local:
            flat[segment.place] = tensors[segment.name].reshape(-1)[segment.start : segment.stop]
        self.write(flat)

    def gradient(self) -> Tensor:
        """A copy of this partition's share of the gradient, averaged over the data ranks: fp32 [n], padding zero.

        Between the last micro-batch's backward and the step; unclipped.
        """
        parts = [part.detach().reshape(-1).float() for part in self._gradient_parts()]
        flat = torch.cat([*parts, parts[0].new_zeros(self.numel - sum(len(part) for part in parts))])
        return without_padding(flat, self._local)

    def gradient_square(self) -> float:
        """Squared L2 norm of the elements of `gradient()` whose primary holder this rank is; no collective.

        Summed over the silo every element of the body counts once, in every layout. Not finite where a gradient is not.
        """
        squares = self._squares(self._counted)
        if self._copies:
            # Nought of what is finite; a copy that is not, on this rank alone, must stop the step for all.
            squares = squares + 0.0 * self._squares(self._copies)
        # Read once: on a GPU every look at a number waits for all that was asked of it.
        return float(squares)

    def _squares(self, places: list[slice]) -> Tensor:
        """Sum of squares (fp64 scalar) of the gradient's elements at `places`, which are ascending and apart."""
        norms = []
        begin = 0
        wanted = iter([*places, slice(self.numel, self.numel)])
        place = next(wanted)
        for part in self._gradient_parts():
            flat = part.detach().reshape(-1)
            end = begin + len(flat)
            while place.start < end:
                piece = flat[max(place.start, begin) - begin : min(place.stop, end) - begin]
                norms.append(torch.linalg.vector_norm(piece, dtype=torch.float32))
                if place.stop > end:
                    break
                place = next(wanted)
            begin = end
        return torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)

    @abstractmethod
    def _gradient_parts(self) -> Iterable[Tensor]:
        """The averaged gradient as DeepSpeed has it: flat pieces that lie end to end, padding of any value."""

    @abstractmethod
    def step(self, engine: Any, norm: float, coefficient: float | None) -> None:
        """`engine.step()` with the gradient scaled by `coefficient` (<= 1); None discards the gradient instead.

        `norm` is the silo's of this step: DeepSpeed takes it for its own and computes none. Collective over the data
        ranks.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """The inner optimizer's state as flat [n] tensors by name, and its step count as "step" ([1])."""

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `optimizer_state` gave; an empty dictionary forgets all state. Collective under stage 0."""


def _in_whole(local: Segment, shard: ParameterShard) -> Iterator[Segment]:
    """A segment of a rank's own parameter as segments of the whole one: one for each run that it touches."""
    for run in shard.runs:
        low, high = max(local.start, run.local), min(local.stop, run.local + run.count)
        if low < high:
            shift = run.start - run.local
            offset = local.offset + low - local.start
            yield Segment(local.name, low + shift, high + shift, offset, run.primary)


def without_padding(flat: Tensor, segments: list[Segment]) -> Tensor:
    """`flat` [n] with zeros, in place, wherever no segment lies."""
    at = 0
    for place in joined_places(segment.place for segment in segments):
        flat[at : place.start] = 0
        at = place.stop
    flat[at:] = 0
    return flat


def moments(state: Mapping[str, Any]) -> list[str]:
    """What a torch optimizer keeps of a parameter besides its step count."""
    return sorted(key for key in state if key != "step")


def step_tensor(state: Mapping[str, Any]) -> Tensor:
    """The step count in a torch optimizer's state of one parameter: fp32 [1] on the CPU."""
    return torch.as_tensor(state["step"], dtype=torch.float32).detach().cpu().reshape(1).clone()


@contextmanager
def replaced(target: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of one object for the length of a block: how one step is told what DeepSpeed has no option for."""
    own = {name: target.__dict__[name] for name in attributes if name in target.__dict__}
    for name, value in attributes.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in own:
                setattr(target, name, own[name])
            else:
                delattr(target, name)
