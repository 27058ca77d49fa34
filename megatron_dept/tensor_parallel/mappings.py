"""Where tensor-parallel computation begins and ends: collectives whose backward is the matching collective.

Shapes: b batch, s sequence, h hidden, T tensor ranks.

`copy_to_ranks` and `reduce_from_ranks` are Megatron-LM's f and g (Shoeybi et al., 2019); `gather_sequence` and
`scatter_sequence_sum` take their places under sequence parallelism (Korthikanti et al., 2022), where the hidden states
between the blocks are split along the sequence, [b, s/T, h]. Every function returns its input as it is where T = 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dept.tensor_parallel.group import TensorGroup


def enter_ranks(hidden: Tensor, tensor: TensorGroup, sequence_parallel: bool) -> Tensor:
    """[b, s, h], or [b, s/T, h] under sequence parallelism -> [b, s, h], input of every rank's own computation."""
    return gather_sequence(hidden, tensor) if sequence_parallel else copy_to_ranks(hidden, tensor)


def leave_ranks(partial: Tensor, tensor: TensorGroup, sequence_parallel: bool) -> Tensor:
    """Every rank's term [b, s, h] of a sum -> the sum, [b, s, h], or this rank's [b, s/T, h] of it.

    `partial` must be an intermediate of the caller's own: it may be overwritten.
    """
    return scatter_sequence_sum(partial, tensor) if sequence_parallel else reduce_from_ranks(partial, tensor)


def copy_to_ranks(value: Tensor, tensor: TensorGroup) -> Tensor:
    """Identity; the ranks' gradients are summed in the backward."""
    return value if tensor.size == 1 else _CopyToRanks.apply(value, tensor)


def reduce_from_ranks(value: Tensor, tensor: TensorGroup) -> Tensor:
    """Sum over the ranks, written over `value`; the backward is the identity."""
    return value if tensor.size == 1 else _ReduceFromRanks.apply(value, tensor)


def gather_sequence(value: Tensor, tensor: TensorGroup) -> Tensor:
    """[b, s/T, ..] of every rank, joined to [b, s, ..]; the backward is a reduce-scatter of the gradient."""
    return value if tensor.size == 1 else _GatherSequence.apply(value, tensor)


def scatter_sequence_sum(value: Tensor, tensor: TensorGroup) -> Tensor:
    """This rank's [b, s/T, ..] of the sum of the ranks' [b, s, ..]; the backward gathers. `ValueError` unless T | s."""
    if tensor.size == 1:
        return value
    if value.shape[1] % tensor.size:
        raise ValueError(
            f"a sequence of {value.shape[1]} tokens cannot be split over {tensor.size} tensor ranks; "
            "give it a multiple of them, or turn sequence parallelism off"
        )
    return _ScatterSequenceSum.apply(value, tensor)


def sum_gradients(tensor: TensorGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
    """`parameters` as they are; the ranks' gradients of them are summed in one collective in the backward.

    For parameters that every rank holds whole and uses on its own part of a sequence. They must be of one dtype.
    """
    return parameters if tensor.size == 1 else _SumGradients.apply(tensor, *parameters)


def sum_copied_rows(gradient: Tensor, tensor: TensorGroup, copy: int, copies: int, rows: int) -> Tensor:
    """A parameter's gradient whose last `rows` rows are summed over the ranks that hold the same ones; a new tensor.

    The tensor ranks hold `copies` different sets of such rows, this rank the set number `copy`. One all-reduce of one
    slot a set, so every holder gets the same bits. Meant as the parameter's own hook: the parameter is then used as it
    is, and ZeRO 3 can let go of it between forward and backward, which it cannot of a view.
    """
    gradient = _own(gradient)
    copied = gradient[-rows:]
    slots = copied.new_zeros(copies, copied.numel())
    slots[copy] = copied.reshape(-1)
    tensor.all_reduce_sum(slots, "activation")
    copied.copy_(slots[copy].view_as(copied))
    return gradient


def _own(gradient: Tensor) -> Tensor:
    """A contiguous copy: autograd may have handed the same gradient to others."""
    return gradient.clone(memory_format=torch.contiguous_format)


def _gather(value: Tensor, tensor: TensorGroup) -> Tensor:
    """[b, s/T, ..] -> [b, s, ..]."""
    batch, part = value.shape[:2]
    parts = tensor.all_gather(value.contiguous().view(-1), "activation").view(tensor.size, *value.shape)
    return parts.transpose(0, 1).reshape(batch, tensor.size * part, *value.shape[2:])


def _scatter_sum(value: Tensor, tensor: TensorGroup) -> Tensor:
    """[b, s, ..] -> [b, s/T, ..]."""
    batch, length = value.shape[:2]
    part = length // tensor.size
    parts = value.reshape(batch, tensor.size, part, *value.shape[2:]).transpose(0, 1).contiguous()
    return tensor.reduce_scatter_sum(parts.view(-1), "activation").view(batch, part, *value.shape[2:])


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.tensor = tensor
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = _own(gradient)
        ctx.tensor.all_reduce_sum(gradient, "activation")
        return gradient, None


class _ReduceFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.mark_dirty(value)
        assert value.is_contiguous()
        tensor.all_reduce_sum(value, "activation")
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.tensor = tensor
        return _gather(value, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(gradient, ctx.tensor), None


class _ScatterSequenceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, tensor: TensorGroup) -> Tensor:
        ctx.tensor = tensor
        return _scatter_sum(value, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient, ctx.tensor), None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: TensorGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.tensor = tensor
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        ctx.tensor.all_reduce_sum(flat, "activation")
        parts = flat.split([gradient.numel() for gradient in gradients])
        return None, *(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))
