"""Arguments of the faces: what does not fit is a ValueError that names the argument, before any memory is touched."""

from collections.abc import Sequence

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *LOW_PRECISION)


def expect(
    name: str,
    tensor: Tensor,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | None],
    device: torch.device,
) -> None:
    """ValueError unless `tensor` is contiguous, of one of `dtypes`, of `shape` (None: any size) and on `device`."""
    wanted = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in wanted:
        raise ValueError(f"{name} is {tensor.dtype}; want {' or '.join(map(str, wanted))}")
    fits = tensor.dim() == len(shape) and all(
        size is None or size == found for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; want [{sizes}]")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; the other arguments are on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; strides {tensor.stride()}")


def expect_dtype(name: str, dtype: torch.dtype) -> None:
    """ValueError unless `dtype` is one that rows can be cast to."""
    if dtype not in FLOATS:
        raise ValueError(f"{name} is {dtype}; want {' or '.join(map(str, FLOATS))}")
