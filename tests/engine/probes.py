"""What a forked rank does for the tests of the engine: several short experiments in one process, results as numpy.

Each probe builds an engine of its own on the one silo that all ranks form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World
from megatron_dept.topology.launch import Launch
from tests.engine.silo import Silo, another_body, engine_config, silo_world

SGD = {"optimizer": "sgd", "weight_decay": 0.01}
ADAMW = {"optimizer": "adamw", "epsilon": 1e-2, "weight_decay": 0.01}
"""A large epsilon keeps the update a smooth function of the gradient: with 1e-8 rounding alone decides the sign of an
update wherever a gradient is nearly zero, and no tolerance would mean anything."""
RATE, EMBEDDING_RATE = 0.3, 0.2
CLIP = 0.05
"""Far below the gradient norms here (about 1), so that clipping always bites."""


@dataclass(frozen=True)
class Layout:
    """`subgroup`: ZeRO-3's sub_group_size, small to have several; `hidden` 168 has parameters that it really cuts."""

    stage: int
    precision: str
    ranks: int
    hidden: int = 10
    subgroup: int | None = None

    def __str__(self) -> str:
        extra = "-wide" if self.hidden > 100 else "-subgroups" if self.subgroup else ""
        return f"zero{self.stage}-{self.precision}-x{self.ranks}{extra}"

    def config(self, **optimizer: Any) -> RunConfig:
        return engine_config(self.stage, self.precision, self.hidden, **optimizer)


LAYOUTS = [
    *(Layout(stage, "fp32", ranks) for stage in range(4) for ranks in (1, 2)),
    *(Layout(stage, "bf16", ranks) for stage in (1, 2, 3) for ranks in (1, 2)),
    *(Layout(stage, "fp32", 3) for stage in (0, 2)),
    Layout(3, "fp32", 3, subgroup=1000),
    Layout(3, "fp32", 2, hidden=168),
]


def probe(launch: Launch, layout: Layout) -> dict[str, Any]:
    """Every experiment in turn; each name is one of `PROBES`."""
    world = silo_world(launch)
    return {name: experiment(layout, world) for name, experiment in PROBES.items()}


def _silo(layout: Layout, world: World, **optimizer: Any) -> Silo:
    class Engine(SiloEngine):
        def _deepspeed_config(self, config: RunConfig, elements: int) -> dict[str, Any]:
            values = super()._deepspeed_config(config, elements)
            if layout.subgroup:
                values["zero_optimization"]["sub_group_size"] = layout.subgroup
            return values

    return Silo(layout.config(**optimizer), world, Engine)


def _state(silo: Silo) -> tuple[Any, Any]:
    return silo.pieces(), silo.embedding()


def _bits(silo: Silo) -> list[bytes]:
    """Everything that a step may move, as bits: masters, embedding, both optimizers' state."""
    inner, own = silo.shards.optimizer_state(), silo.owner.optimizer_state()
    tensors = [silo.shards.read(), *silo.owner.module.parameters()]
    tensors += [state[key] for state in (inner, own) for key in sorted(state)]
    return [tensor.detach().cpu().numpy().tobytes() for tensor in tensors]


def _token_losses(silo: Silo) -> np.ndarray:
    inputs, targets = silo.micro_batches(9)[0]
    return silo.engine.token_losses(silo.owner.module, inputs, targets).numpy()


def written(layout: Layout, world: World) -> dict[str, Any]:
    """Read as built; write another body; read, forward, and one SGD step from it."""
    silo = _silo(layout, world, **SGD)
    result: dict[str, Any] = {"numel": silo.shards.numel, "segments": silo.shards.segments, "built": silo.pieces()}
    result["built losses"] = _token_losses(silo)
    silo.write(another_body(silo.config))
    result["read"] = silo.pieces()
    flat = silo.shards.read()
    for segment in silo.shards.segments:
        flat[segment.place] = 0
    result["padding"] = float(flat.abs().max())
    result["losses"] = _token_losses(silo)
    result["loss"] = silo.step(0, RATE, EMBEDDING_RATE).loss
    result["stepped"] = _state(silo)
    return result


def clipped(layout: Layout, world: World) -> dict[str, Any]:
    """Two SGD steps under a clip that bites."""
    silo = _silo(layout, world, **SGD, clip_grad=CLIP)
    norms = [silo.step(number, 10 * RATE, 10 * EMBEDDING_RATE).gradient_norm for number in range(2)]
    return {"norms": norms, "state": _state(silo)}


def _several_steps(layout: Layout, world: World, **optimizer: Any) -> dict[str, Any]:
    silo = _silo(layout, world, **optimizer)
    results = [silo.step(number, RATE, EMBEDDING_RATE) for number in range(3)]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
        "state": _state(silo),
    }


def sgd(layout: Layout, world: World) -> dict[str, Any]:
    """Three SGD steps, no clipping."""
    return _several_steps(layout, world, **SGD)


def adamw(layout: Layout, world: World) -> dict[str, Any]:
    """Three AdamW steps under a clip that bites."""
    return _several_steps(layout, world, **ADAMW, clip_grad=CLIP)


def optimizer_state(layout: Layout, world: World) -> dict[str, Any]:
    """Save after two AdamW steps, go on, load, go on again; then forget all and step."""
    silo = _silo(layout, world, **ADAMW)
    result: dict[str, Any] = {"at start": sorted(silo.shards.optimizer_state())}
    for number in range(2):
        silo.step(number, RATE)
    inner = {key: value.clone() for key, value in silo.shards.optimizer_state().items()}
    own = {key: value.clone() for key, value in silo.owner.optimizer_state().items()}
    flat, tables = silo.shards.read(), [table.detach().clone() for table in silo.owner.module.parameters()]
    result["saved"] = {key: silo.pieces(value) for key, value in inner.items() if key != "step"}
    result["steps"] = (inner["step"].tolist(), own["step"].tolist())

    def put_back(inner_state: dict[str, Tensor], own_state: dict[str, Tensor]) -> None:
        silo.shards.write(flat)
        with torch.no_grad():
            for table, value in zip(silo.owner.module.parameters(), tables, strict=True):
                table.copy_(value)
        silo.shards.load_optimizer_state(inner_state)
        silo.owner.load_optimizer_state(own_state)

    silo.step(2, RATE)
    result["went on"] = _bits(silo)
    put_back(inner, own)
    result["loaded"] = _bits(silo)
    silo.step(2, RATE)
    result["went on again"] = _bits(silo)
    put_back({}, {})
    result["at reset"] = (sorted(silo.shards.optimizer_state()), sorted(silo.owner.optimizer_state()))
    result["before reset step"] = _state(silo)
    silo.step(2, RATE)
    result["after reset step"] = _state(silo)
    result["steps after reset"] = silo.shards.optimizer_state()["step"].tolist()
    return result


def poisoned(layout: Layout, world: World) -> dict[str, Any]:
    """Per kind of poison: bits before and after a poisoned step, and after the next; then the same without poison."""
    results = {}
    for where, poison in POISONS.items():
        silo = _silo(layout, world, **ADAMW, clip_grad=CLIP)
        silo.step(0, RATE)
        before = _bits(silo)
        undo = poison(silo)
        bad = silo.step(1, RATE)
        undo()
        after = _bits(silo)
        good = silo.step(2, RATE)
        results[where] = {
            "skipped": (bad.skipped, good.skipped),
            "norm": bad.gradient_norm,
            "before": before,
            "after": after,
            "next": _bits(silo),
        }
    silo = _silo(layout, world, **ADAMW, clip_grad=CLIP)
    silo.step(0, RATE)
    silo.step(2, RATE)
    results["never"] = {"next": _bits(silo)}
    return results


def _once(value: float, on_this_rank: bool) -> Callable[[Tensor], Tensor | None]:
    """A gradient hook that replaces one element of the first gradient it sees."""
    done = not on_this_rank

    def hook(gradient: Tensor) -> Tensor | None:
        nonlocal done
        if done:
            return None
        done = True
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    return hook


def _poison_body(silo: Silo) -> Callable[[], None]:
    """One infinite element in one body gradient of the last rank's first micro-batch."""
    parameter = dict(silo.body.named_parameters())["layers.0.mlp.up.weight"]
    last = silo.world.launch.rank == silo.world.launch.world_size - 1
    return parameter.register_hook(_once(float("inf"), last)).remove


def _poison_embedding(silo: Silo) -> Callable[[], None]:
    """One NaN in the token table's gradient of rank 0's first micro-batch; the body's gradients are fine."""
    return silo.owner.module.token.register_hook(_once(float("nan"), silo.world.launch.rank == 0)).remove


def _poison_loss(silo: Silo) -> Callable[[], None]:
    """A row of the table that is infinite: loss and all gradients are not numbers."""
    token = silo.owner.module.token
    kept = token.detach()[3].clone()

    def fill(value: Tensor | float) -> None:
        with torch.no_grad():
            token[3] = value

    fill(float("inf"))
    return lambda: fill(kept)


POISONS = {"body": _poison_body, "embedding": _poison_embedding, "loss": _poison_loss}


def asked_to_stop(layout: Layout, world: World) -> dict[str, Any]:
    """The last rank alone is asked to stop in the second step."""
    silo = _silo(layout, world, **SGD)
    last = world.launch.rank == world.launch.world_size - 1
    answers = [
        silo.engine.train_step(silo.micro_batches(0), silo.owner, RATE, RATE, stop=lambda asked=asked: asked).stop
        for asked in (False, last)
    ]
    return {"stops": answers, "without": silo.step(0, RATE).stop}


PROBES: dict[str, Callable[[Layout, World], dict[str, Any]]] = {
    "written": written,
    "clipped": clipped,
    "sgd": sgd,
    "adamw": adamw,
    "optimizer state": optimizer_state,
    "poisoned": poisoned,
    "asked to stop": asked_to_stop,
}
