"""Which engine a silo of this shape needs."""

from torch import nn

from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World


def build_engine(config: RunConfig, body: nn.Module, world: World) -> SiloEngine:
    """The engine of `body`, this rank's part of its silo's; collective over the silo."""
    if world.shape.pipe == 1:
        return SiloEngine(config, body, world)
    # DeepSpeed's pipelines take a second to import.
    from megatron_dept.engine.pipeline_engine import PipelineSiloEngine

    return PipelineSiloEngine(config, body, world)
