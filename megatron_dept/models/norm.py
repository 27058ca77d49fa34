"""LayerNorm and RMSNorm: apex's fused kernels where apex is installed and a GPU is there, else torch's own.

Both compute in fp32 whatever the input's dtype, and keep the same parameter names, so a checkpoint does not depend on
which of them was used.
"""

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import nn

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


def layer_norm(hidden_size: int, epsilon: float) -> nn.Module:
    """LayerNorm over the last dimension [.., h], with weight and bias."""
    apex = apex_normalization()
    return apex.FusedLayerNorm(hidden_size, eps=epsilon) if apex else nn.LayerNorm(hidden_size, eps=epsilon)


def rms_norm(hidden_size: int, epsilon: float) -> nn.Module:
    """RMSNorm over the last dimension [.., h] (Zhang and Sennrich, 2019), with weight."""
    apex = apex_normalization()
    return apex.FusedRMSNorm(hidden_size, eps=epsilon) if apex else nn.RMSNorm(hidden_size, eps=epsilon)
