"""Which part of the body a rank has, and over which group it exchanges it."""

from megatron_dept.config.schema import RunConfig
from megatron_dept.dept.outer import OuterRule
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World
from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.federation.exchange import Exchange
from megatron_dept.federation.named_exchange import NamedBodyExchange
from megatron_dept.federation.overlapped_exchange import OverlappedExchange
from megatron_dept.federation.shares import Packing, refuse_packed
from megatron_dept.models.parts import BodyPart
from megatron_dept.models.pipeline import stage_layers


def body_part(config: RunConfig, world: World, vocabulary: int) -> BodyPart:
    """The layers of this rank's stage, cut over its tensor ranks; the same for every source."""
    parallel = config.parallel
    layers = stage_layers(config.model, world.shape.pipe, vocabulary)[world.place.pipe]
    sequence_parallel = parallel.sequence_parallel and world.shape.tensor > 1
    return BodyPart(world.tensor, sequence_parallel, layers, final_norm=world.last_stage)


def build_exchange(
    world: World, engine: SiloEngine, rule: OuterRule, packing: Packing, overlaps: bool = False
) -> Exchange:
    """Among peers where silos are equal, else by named slices among all ranks; collective.

    Silos that are launches of their own may be lost: each keeps the whole of what the outer step needs. `overlaps`: it
    runs while the next round trains, over a group of its own (see `start_world`).
    """
    shards, silo, among = engine.shards, world.place.silo, world.exchange
    exchange: Exchange
    if world.layout.equal:
        exchange = BodyExchange(among, shards.read(), rule, world.separate, packing)
    else:
        refuse_packed(packing)
        shapes = engine.body_shapes
        exchange = NamedBodyExchange(among, shards.read(), shards.segments, shapes, rule, silo, world.separate)
    return OverlappedExchange(exchange, world.exchange_ledger) if overlaps else exchange
