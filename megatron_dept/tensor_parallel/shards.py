"""Which elements of a whole parameter a tensor-parallel rank holds, said by the parameter itself.

Shapes: `T` tensor ranks. A rank's parameter is cut along the first dimension only (row-parallel weights are stored
input-major for that), so that what it holds is a few contiguous runs of the whole parameter's flat order.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_dept.tensor_parallel.group import TensorGroup

_ATTRIBUTE = "dept_shard"


@dataclass(frozen=True)
class Run:
    """Flat elements [local, local + count) of a rank's parameter are [start, start + count) of the whole one's.

    `primary`: of the tensor ranks that hold copies of them, this rank counts and saves them.
    """

    local: int
    start: int
    count: int
    primary: bool


@dataclass(frozen=True)
class ParameterShard:
    """`shape` of the whole parameter; `runs` cover the rank's parameter, ascending, merged where adjacent."""

    shape: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's parameter: the whole one's but for the first dimension."""
        row = math.prod(self.shape[1:])
        return (sum(run.count for run in self.runs) // row, *self.shape[1:])


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a whole parameter's first dimension, and whether this rank is their primary holder."""

    start: int
    stop: int
    primary: bool = True


def even_rows(total: int, tensor: TensorGroup) -> tuple[Rows, ...]:
    """This rank's of `total` rows cut evenly over the tensor ranks. `ValueError` where they do not divide."""
    if total % tensor.size:
        raise ValueError(f"{total} rows cannot be cut evenly over {tensor.size} tensor ranks")
    share = total // tensor.size
    return (Rows(tensor.rank * share, (tensor.rank + 1) * share),)


def cut_by_rows(shape: tuple[int, ...], rows: tuple[Rows, ...]) -> ParameterShard:
    """The shard that holds `rows`, in their order, of a whole parameter of `shape`."""
    row = math.prod(shape[1:])
    runs: list[Run] = []
    local = 0
    for block in rows:
        start, count = block.start * row, (block.stop - block.start) * row
        last = runs[-1] if runs else None
        if last is not None and last.start + last.count == start and last.primary == block.primary:
            runs[-1] = Run(last.local, last.start, last.count + count, last.primary)
        elif count:
            runs.append(Run(local, start, count, block.primary))
        local += count
    return ParameterShard(shape, tuple(runs))


def replicated(shape: tuple[int, ...], tensor: TensorGroup) -> ParameterShard:
    """The shard of a parameter that every tensor rank holds whole; the first rank is its primary holder."""
    return ParameterShard(shape, (Run(0, 0, math.prod(shape), tensor.rank == 0),))


def mark(parameter: nn.Parameter, shard: ParameterShard) -> nn.Parameter:
    """Let `parameter` know its shard, and return it; one that holds less than the whole tells DeepSpeed so too."""
    assert tuple(parameter.shape) == shard.local_shape, f"{tuple(parameter.shape)} is not {shard}"
    setattr(parameter, _ATTRIBUTE, shard)
    if shard.local_shape != shard.shape:
        # DeepSpeed's own norms count a parameter once a tensor rank only where these say that it is cut.
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.model_parallel = True  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: nn.Parameter) -> ParameterShard:
    """What `parameter` was marked with; unmarked it is whole, and this rank its primary holder."""
    shard = getattr(parameter, _ATTRIBUTE, None)
    if shard is not None:
        return shard
    shape = tuple(parameter.shape)
    return ParameterShard(shape, (Run(0, 0, math.prod(shape), True),))


def take(whole: Tensor, shard: ParameterShard) -> Tensor:
    """This rank's part of a whole parameter's values: `shard.local_shape`, in `whole`'s dtype."""
    assert tuple(whole.shape) == shard.shape
    flat = whole.reshape(-1)
    return torch.cat([flat[run.start : run.start + run.count] for run in shard.runs]).view(shard.local_shape)
