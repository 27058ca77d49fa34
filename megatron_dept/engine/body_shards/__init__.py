"""A rank's fp32 partition of the body, whatever the ZeRO stage: read, written, and known by parameter name.

Everything here reaches into DeepSpeed 0.19's private attributes; this is the only folder that does, and setup.py pins
that version. The known trap: masters are written first, then the low-precision copies are refreshed from them; weights
written alone would be undone by the next step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from megatron_dept.engine.body_shards.base import BodyShards
from megatron_dept.engine.body_shards.replicated import ReplicatedShards
from megatron_dept.engine.body_shards.zero import Bf16Shards, Stage3Shards, Stage12Shards
from megatron_dept.engine.world import World
from megatron_dept.tensor_parallel.shards import ParameterShard

__all__ = ["BodyShards", "body_shards"]


def body_shards(engine: Any, body: nn.Module, cut: Mapping[str, ParameterShard], world: World) -> BodyShards:
    """The adapter for what DeepSpeed has made of `body`, whose parameters have their canonical names.

    `cut` is every parameter's `shard_of` from before DeepSpeed had them: under ZeRO-3 they lose their shapes.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kinds: dict[type, Callable[..., BodyShards]] = {
        BF16_Optimizer: Bf16Shards,
        DeepSpeedZeroOptimizer: Stage12Shards,
        DeepSpeedZeroOptimizer_Stage3: Stage3Shards,
    }
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        return ReplicatedShards(engine, body, cut, world.data)
    return kinds[type(engine.optimizer)](engine, body, cut)
