"""What a forked rank does for the tests of the engine: several short experiments in one process, results as numpy.

Each probe builds an engine of its own on the one silo that all ranks form: torch has one default group a process, so
only silos of one shape can share it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World, start_world
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout
from tests.engine.cases import Case
from tests.engine.silo import Silo, another_body

SGD = {"optimizer": "sgd", "weight_decay": 0.01}
ADAMW = {"optimizer": "adamw", "epsilon": 1e-2, "weight_decay": 0.01}
"""A large epsilon keeps the update a smooth function of the gradient: with 1e-8 rounding alone decides the sign of an
update wherever a gradient is nearly zero, and no tolerance would mean anything."""
RATE, EMBEDDING_RATE = 0.3, 0.2
CLIP = 0.05
"""Far below the gradient norms here (about 1), so that clipping always bites."""


def probe(launch: Launch, cases: Sequence[Case], names: Sequence[str]) -> dict[Case, dict[str, Any]]:
    """The experiments called `names` (of `PROBES`) with each case in turn; all cases are of one shape."""
    world = start_world(launch, Layout((cases[0].shape,)), 60)
    return {case: {name: PROBES[name](case, world) for name in names} for case in cases}


def _silo(case: Case, world: World, **optimizer: Any) -> Silo:
    class Engine(SiloEngine):
        def _deepspeed_config(self, config: RunConfig, elements: int) -> dict[str, Any]:
            values = super()._deepspeed_config(config, elements)
            if case.subgroup:
                values["zero_optimization"]["sub_group_size"] = case.subgroup
            return values

    return Silo(case, case.config(**optimizer), world, Engine)


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


def written(case: Case, world: World) -> dict[str, Any]:
    """Read as built; write another body; read, forward, and one SGD step from it."""
    silo = _silo(case, world, **SGD)
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


def clipped(case: Case, world: World) -> dict[str, Any]:
    """Two SGD steps under a clip that bites."""
    silo = _silo(case, world, **SGD, clip_grad=CLIP)
    norms = [silo.step(number, 10 * RATE, 10 * EMBEDDING_RATE).gradient_norm for number in range(2)]
    return {"norms": norms, "state": _state(silo)}


def _several_steps(case: Case, world: World, **optimizer: Any) -> dict[str, Any]:
    silo = _silo(case, world, **optimizer)
    results = [silo.step(number, RATE, EMBEDDING_RATE) for number in range(3)]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
        "gradients": list(zip(silo.gradients, silo.embedding_gradients, strict=True)),
        "state": _state(silo),
        "token losses": _token_losses(silo),
    }


def sgd(case: Case, world: World) -> dict[str, Any]:
    """Three SGD steps, no clipping."""
    return _several_steps(case, world, **SGD)


def adamw(case: Case, world: World) -> dict[str, Any]:
    """Three AdamW steps under a clip that bites."""
    return _several_steps(case, world, **ADAMW, clip_grad=CLIP)


def optimizer_state(case: Case, world: World) -> dict[str, Any]:
    """Save after two AdamW steps, go on, load, go on again; then forget all and step."""
    silo = _silo(case, world, **ADAMW)
    result: dict[str, Any] = {"at start": sorted(silo.shards.optimizer_state())}
    for number in range(2):
        silo.step(number, RATE)
    inner, own = silo.shards.optimizer_state(), silo.owner.optimizer_state()
    result["saved"] = {key: silo.pieces(value) for key, value in inner.items() if key != "step"}
    result["steps"] = (inner["step"].tolist(), own["step"].tolist())
    back = _keeper(silo)
    silo.step(2, RATE)
    result["went on"] = _bits(silo)
    back()
    result["loaded"] = _bits(silo)
    silo.step(2, RATE)
    result["went on again"] = _bits(silo)
    back(forget=True)
    result["at reset"] = (sorted(silo.shards.optimizer_state()), sorted(silo.owner.optimizer_state()))
    result["before reset step"] = _state(silo)
    silo.step(2, RATE)
    result["after reset step"] = _state(silo)
    result["steps after reset"] = silo.shards.optimizer_state()["step"].tolist()
    return result


def poisoned(case: Case, world: World) -> dict[str, Any]:
    """Per kind of poison: bits before and after a poisoned step, and after the next; then the same without poison."""
    silo = _silo(case, world, **ADAMW, clip_grad=CLIP)
    silo.step(0, RATE)
    back = _keeper(silo)
    results = {}
    for where, poison in POISONS.items():
        back()
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
    back()
    silo.step(2, RATE)
    results["never"] = {"next": _bits(silo)}
    return results


def _keeper(silo: Silo) -> Callable[..., None]:
    """A function that puts body and embedding back to what they are now, and both optimizers' state, or forgets it."""
    inner = {key: value.clone() for key, value in silo.shards.optimizer_state().items()}
    own = {key: value.clone() for key, value in silo.owner.optimizer_state().items()}
    flat, tables = silo.shards.read(), [table.detach().clone() for table in silo.owner.module.parameters()]

    def back(forget: bool = False) -> None:
        silo.shards.write(flat)
        with torch.no_grad():
            for table, value in zip(silo.owner.module.parameters(), tables, strict=True):
                table.copy_(value)
        silo.shards.load_optimizer_state({} if forget else inner)
        silo.owner.load_optimizer_state({} if forget else own)

    return back


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
    last = silo.world.rank == silo.world.silo.size - 1
    return parameter.register_hook(_once(float("inf"), last)).remove


def _poison_copy(silo: Silo) -> Callable[[], None]:
    """One infinite element where tensor ranks hold copies, on the last rank alone: not the copy that is counted."""
    parameter = dict(silo.body.named_parameters())["layers.0.mlp_norm.weight"]
    last = silo.world.rank == silo.world.silo.size - 1
    return parameter.register_hook(_once(float("inf"), last)).remove


def _poison_embedding(silo: Silo) -> Callable[[], None]:
    """One NaN in the token table's gradient of rank 0's first micro-batch; the body's gradients are fine."""
    return silo.owner.module.token.register_hook(_once(float("nan"), silo.world.rank == 0)).remove


def _poison_loss(silo: Silo) -> Callable[[], None]:
    """A row of the table that is infinite: loss and all gradients are not numbers."""
    token = silo.owner.module.token
    kept = token.detach()[3].clone()

    def fill(value: Tensor | float) -> None:
        with torch.no_grad():
            token[3] = value

    fill(float("inf"))
    return lambda: fill(kept)


POISONS = {"body": _poison_body, "copy": _poison_copy, "embedding": _poison_embedding, "loss": _poison_loss}


def asked_to_stop(case: Case, world: World) -> dict[str, Any]:
    """The last rank alone is asked to stop in the second step."""
    silo = _silo(case, world, **SGD)
    last = world.rank == world.silo.size - 1
    answers = [
        silo.engine.train_step(silo.micro_batches(0), silo.owner, RATE, RATE, stop=lambda asked=asked: asked).stop
        for asked in (False, last)
    ]
    return {"stops": answers, "without": silo.step(0, RATE).stop}


def traced(case: Case, world: World) -> dict[str, Any]:
    """Every collective that building an engine and a step touch, and the step's mean activation norm."""
    world.ledger.trace = began = []
    silo = _silo(case, world, **ADAMW)
    world.ledger.trace = trained = []
    silo.engine.train_step(silo.micro_batches(0), silo.owner, RATE, RATE)
    world.ledger.trace = None
    norms = [
        silo.engine.train_step(silo.micro_batches(0), silo.owner, 0.0, 0.0, want_activation_norm=wanted).activation_norm
        for wanted in (False, True)
    ]
    return {"began": began, "trained": trained, "activation norms": norms}


PROBES: dict[str, Callable[[Case, World], dict[str, Any]]] = {
    "written": written,
    "clipped": clipped,
    "sgd": sgd,
    "adamw": adamw,
    "optimizer state": optimizer_state,
    "poisoned": poisoned,
    "asked to stop": asked_to_stop,
    "traced": traced,
}

DIFFERENTIAL = ("sgd", "adamw")
"""What every layout runs; the other probes only some."""
