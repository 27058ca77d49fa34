"""The plan's memory beside what small real runs hold: every tensor's storage, once, in an inner step.

Taken between the last backward and the optimizer's step, so activations are gone and gradients are there. On top comes
little: batches, norms, what DeepSpeed keeps for itself. A CPU's device and host memory are one: they are weighed
together.
"""

import gc
from collections import Counter
from typing import Any

import pytest
import torch

from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout
from megatron_dept.training.plan import build_plan
from megatron_dept.training.planning.cut import parameters_of_rank
from megatron_dept.training.planning.memory import PERSISTED_ELEMENTS
from tests.support.corpus import Corpus
from tests.support.distributed import run_ranks
from tests.support.runs import small_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "data 2, ZeRO 3": (2, {"zero_stage": 3}),
    "data 2, ZeRO 2": (2, {"zero_stage": 2}),
    "data 2, ZeRO 1": (2, {"zero_stage": 1}),
    "data 2, ZeRO 0": (2, {"zero_stage": 0}),
    "offload": (1, {"offload_optimizer": True}),
    "ZeRO 2, offload": (1, {"zero_stage": 2, "offload_optimizer": True}),
    "data 2, ZeRO 1, offload": (2, {"zero_stage": 1, "offload_optimizer": True}),
    "data 2, ZeRO 2, offload": (2, {"zero_stage": 2, "offload_optimizer": True}),
    "data 2, ZeRO 3, offload": (2, {"zero_stage": 3, "offload_optimizer": True}),
    "tensor 2 beside data 2": (4, {"shapes": [{"tensor_model_parallel_size": 2}, {"data_parallel_size": 2}]}),
    "data 2 beside pipe 2": (4, {"shapes": [{"data_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]}),
    "2 silos x tensor 2": (4, {"silos": 2, "tensor_model_parallel_size": 2}),
    "2 silos x pipe 2": (4, {"silos": 2, "pipeline_model_parallel_size": 2}),
    "2 silos, overlapped": (2, {"silos": 2}),
}
OVERLAPPED = ["2 silos, overlapped"]
IN_BF16 = ["one process", "data 2, ZeRO 1", "data 2, ZeRO 3", "ZeRO 2, offload", "2 silos x pipe 2"]
TRANSIENT = ("gathered", "activations", "logits")
"""Parts that are there in forward or backward alone; rows' deltas come when the first source's steps are done."""
NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}


def storages() -> dict[int, int]:
    """Bytes by address of every storage that a live tensor has."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _held(launch: Launch, config: RunConfig) -> tuple[int, int]:
    """Bytes of tensors that training has brought into this process, before the optimizer's second step; and of those of
    them as large as a matrix that ZeRO 3 cuts, when the second step's backward began.
    """
    from megatron_dept.engine.world import start_world
    from megatron_dept.training.setup import build_trainer
    from megatron_dept.training.sources import SourceSet

    torch.set_num_threads(1)
    before = storages()
    overlaps = config.dept.outer.overlap > 0
    world = start_world(launch, Layout.cut(config.parallel, launch.world_size), 60, overlaps=overlaps)
    trainer = build_trainer(config, world, SourceSet(config))
    local = trainer._begin_phase(config.sources[0].name)
    assert local.source is not None
    exchange, silos = trainer._exchange, world.layout.silos
    assert exchange is not None
    if len(config.sources) > silos:
        # As in a silo's second turn: with the delta of the source before.
        exchange.add(trainer._engine.shards.read())
    held: list[int] = []
    whole: list[int] = []
    matrices = _cut_matrices(config)
    backward = trainer._engine.engine.backward
    step = trainer._engine.shards.step

    def weighed(*arguments: Any) -> None:
        held.append(sum(size for address, size in storages().items() if address not in before))
        step(*arguments)

    def counted(*arguments: Any, **options: Any) -> None:
        found = (size for address, size in storages().items() if address not in before)
        whole.append(sum(size for size in found if size in matrices))
        backward(*arguments, **options)

    # The second step is the first that has an optimizer's moments beside its gradients. The less of two: what
    # happens to wait for the collector in one is nothing that a rank holds.
    trainer._engine.shards.step = weighed  # type: ignore[method-assign]
    trainer._engine.engine.backward = counted
    for _ in range(3):
        trainer._step(local, local.source)
        local.step += 1
    world.barrier()
    return min(held[1:]), whole[-1] if whole else 0


def _cut_matrices(config: RunConfig) -> dict[int, int]:
    """Of a layer's parameters that are too large to stay whole under ZeRO 3: bytes of one, and of all that large."""
    width = 2 if config.training.precision == "bf16" else 4
    sizes = (size for size in parameters_of_rank(config.model, 1, 1, False) if size > PERSISTED_ELEMENTS)
    return {size: size * count for size, count in Counter(width * size for size in sizes).items()}


def _planned(config: RunConfig, ranks: int) -> tuple[int, dict[str, int]]:
    plan = build_plan(config, ranks)["variants"]["glob"]["memory"]
    return plan["device"] + plan["host"] + plan["row_table"] - sum(plan[part] for part in TRANSIENT), plan


@pytest.mark.parametrize(
    ("layout", "precision"), [*((layout, "fp32") for layout in LAYOUTS), *((layout, "bf16") for layout in IN_BF16)]
)
def test_the_plan_is_what_a_run_holds(corpus: Corpus, tmp_path: Any, layout: str, precision: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = small_config(
        corpus,
        tmp_path / "run",
        model={"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 16},
        parallel=parallel,
        training={"precision": precision},
        dept={"variant": "glob", "outer": {**NESTEROV, "overlap": int(layout in OVERLAPPED)}},
    )
    planned, plan = _planned(config, ranks)
    held = max(held for held, _ in run_ranks(ranks, _held, config))
    if precision == "fp32" and config.parallel.zero_stage == 1:
        # fp32 gradients have shrunk to the partition by now, or gone to the host; in the backward they were whole.
        planned -= plan["gradients"] - (0 if config.parallel.offload_optimizer else plan["masters"])
    # The embedding's copy in bf16 is gone too.
    assert planned * 0.985 < held < planned * 1.01, f"held {held}, planned {planned}: {plan}"


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_the_plan_knows_what_packed_wires_keep(corpus: Corpus, tmp_path: Any, wire: str) -> None:
    """int8's residuals are a partition and a share; buffers are those of the bytes that travel."""
    config = small_config(
        corpus,
        tmp_path / "run",
        model={"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 16},
        parallel={"silos": 2},
        dept={"variant": "glob", "outer": NESTEROV | {"wire": wire, "bucket_mb": 1.0}},
    )
    planned, plan = _planned(config, 2)
    held = max(held for held, _ in run_ranks(2, _held, config))
    planned -= plan["gradients"] - plan["masters"]
    assert planned * 0.985 < held < planned * 1.01, f"held {held}, planned {planned}: {plan}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_3_cuts_matrices_and_lets_go_of_them(corpus: Corpus, tmp_path: Any, precision: str) -> None:
    """Three of a layer's matrices are too large to stay whole. Were they whole beside the partition, a rank would hold
    a fifth (bf16: a tenth) more than planned before the step; as the backward begins, two layers' at most are there."""
    config = small_config(
        corpus,
        tmp_path / "run",
        model={"num_layers": 6, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 16},
        parallel={"zero_stage": 3},
        training={"precision": precision},
        dept={"variant": "glob", "outer": NESTEROV},
    )
    planned, plan = _planned(config, 2)
    ranks = run_ranks(2, _held, config)
    held = max(held for held, _ in ranks)
    assert planned * 0.985 < held < planned * 1.01, f"held {held}, planned {planned}: {plan}"
    matrices = 6 * sum(_cut_matrices(config).values())
    assert 0 < max(whole for _, whole in ranks) <= plan["gathered"] < 0.45 * matrices
