"""LayerNorm and RMSNorm: apex's fused kernels where apex is installed and a GPU is there, else torch's own.

Both compute in fp32 whatever the input's dtype, and keep the same parameter names, so a checkpoint does not depend on
which of them was used. Where the sequence is split over tensor ranks, each normalises its own tokens and the gradients
of weight and bias are summed over the ranks (Korthikanti et al., 2022).
"""

import functools
import importlib
import logging
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dept.models.parts import WHOLE, BodyPart
from megatron_dept.tensor_parallel.group import TensorGroup
from megatron_dept.tensor_parallel.mappings import sum_gradients
from megatron_dept.tensor_parallel.shards import mark, replicated

logger = logging.getLogger(__name__)


@functools.cache
def apex_normalization() -> ModuleType | None:
    """apex's `normalization` module where it can be used; looked for, and said, once in a process."""
    if not torch.cuda.is_available():
        return None
    try:
        module = importlib.import_module("apex.normalization")
    except ImportError:
        logger.info("norms: torch's own (apex is not installed)")
        return None
    logger.info("norms: apex's fused kernels")
    return module


def layer_norm(hidden_size: int, epsilon: float, part: BodyPart = WHOLE) -> nn.Module:
    """LayerNorm over the last dimension [.., h], with weight and bias."""
    apex = apex_normalization()
    if part.splits_sequence:
        return _marked(SplitLayerNorm(hidden_size, epsilon, part.tensor), part)
    norm = apex.FusedLayerNorm(hidden_size, eps=epsilon) if apex else nn.LayerNorm(hidden_size, eps=epsilon)
    return _marked(norm, part)


def rms_norm(hidden_size: int, epsilon: float, part: BodyPart = WHOLE) -> nn.Module:
    """RMSNorm over the last dimension [.., h] (Zhang and Sennrich, 2019), with weight."""
    apex = apex_normalization()
    if part.splits_sequence:
        return _marked(SplitRMSNorm(hidden_size, epsilon, part.tensor), part)
    norm = apex.FusedRMSNorm(hidden_size, eps=epsilon) if apex else nn.RMSNorm(hidden_size, eps=epsilon)
    return _marked(norm, part)


class SplitLayerNorm(nn.LayerNorm):
    """LayerNorm of this rank's tokens [b, s/T, h]."""

    def __init__(self, hidden_size: int, epsilon: float, tensor: TensorGroup) -> None:
        super().__init__(hidden_size, eps=epsilon)
        self._tensor = tensor

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s/T, h] -> [b, s/T, h]."""
        weight, bias = sum_gradients(self._tensor, self.weight, self.bias)
        apex = apex_normalization()
        if apex and hidden.is_cuda:
            return apex.fused_layer_norm.fused_layer_norm_affine(hidden, weight, bias, self.normalized_shape, self.eps)
        return F.layer_norm(hidden, self.normalized_shape, weight, bias, self.eps)


class SplitRMSNorm(nn.RMSNorm):
    """RMSNorm of this rank's tokens [b, s/T, h]."""

    def __init__(self, hidden_size: int, epsilon: float, tensor: TensorGroup) -> None:
        super().__init__(hidden_size, eps=epsilon)
        self._tensor = tensor

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s/T, h] -> [b, s/T, h]."""
        (weight,) = sum_gradients(self._tensor, self.weight)
        apex = apex_normalization()
        if apex and hidden.is_cuda:
            return apex.fused_layer_norm.fused_rms_norm_affine(hidden, weight, self.normalized_shape, self.eps)
        return F.rms_norm(hidden, self.normalized_shape, weight, self.eps)


def _marked(norm: nn.Module, part: BodyPart) -> nn.Module:
    for parameter in norm.parameters():
        mark(parameter, replicated(tuple(parameter.shape), part.tensor))
    return norm
