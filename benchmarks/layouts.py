"""An inner step at each layout beside plain DeepSpeed without DEPT, and the outer step by its parts.

    python -m benchmarks.layouts [--steps 12] [--json FILE]

Same body, same tied embedding, same batches, AdamW and clipping, gloo on CPU ranks of one thread. Plain DeepSpeed has
the embedding among its parameters, tied by TiedLayerSpec in a pipeline, and clips by itself. Steps of both are
interleaved in the same processes; the median and the best of each count. DEPT's step is the trainer's: reading the
batch, training, reporting. Then a round of two silos is run, and its outer step timed: packing deltas, the wire, the
outer optimizer, writing masters and low-precision copies back.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_dept.common.seeding import generator_for
from megatron_dept.config.load import validate_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.embedding_owner import build_optimizer
from megatron_dept.engine.world import World, start_world
from megatron_dept.models.build import build_body
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.initialise import init_rows
from megatron_dept.models.vocabulary_shard import VocabularyShard
from megatron_dept.tokenizers.train import train_sentencepiece
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout
from megatron_dept.training.parts import body_part
from megatron_dept.training.setup import build_trainer
from megatron_dept.training.sources import SourceSet
from megatron_dept.training.trainer import Trainer
from tests.support.corpus import write_dataset
from tests.support.distributed import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank, ZeRO 1": (1, {}),
    "data 2, ZeRO 0": (2, {"zero_stage": 0}),
    "data 2, ZeRO 1": (2, {"zero_stage": 1}),
    "data 2, ZeRO 2": (2, {"zero_stage": 2}),
    "data 2, ZeRO 3": (2, {"zero_stage": 3}),
    "tensor 2, ZeRO 1": (2, {"tensor_model_parallel_size": 2}),
    "tensor 2, sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pipe 2, ZeRO 1": (2, {"pipeline_model_parallel_size": 2}),
}
OUTER: dict[str, tuple[int, dict[str, Any]]] = {
    "2 silos, ZeRO 1": (2, {"silos": 2}),
    "2 silos x data 2, ZeRO 3": (4, {"silos": 2, "zero_stage": 3}),
    "2 silos x tensor 2": (4, {"silos": 2, "tensor_model_parallel_size": 2}),
    "2 silos x pipe 2": (4, {"silos": 2, "pipeline_model_parallel_size": 2}),
}
VOCABULARY = 4000
PARTS = ("pack", "wire", "optimizer", "write back")


def dataset(root: Path) -> Path:
    """A source of seeded words, enough of them for a vocabulary of some thousand pieces."""
    generator = generator_for("benchmark")
    words = [
        "".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), generator.integers(3, 9))) for _ in range(9000)
    ]
    texts = [" ".join(generator.choice(words, 120)) + "\n" for _ in range(600)]
    return write_dataset(root / "words", "words", train_sentencepiece(texts, VOCABULARY), texts[:590], texts[590:])


def config_of(data: Path, run_dir: Path, parallel: dict[str, Any], n_local: int = 1000) -> RunConfig:
    silos = parallel.get("silos", 1)
    return validate_config(
        {
            "run_dir": str(run_dir),
            "model": {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 128},
            "sources": [{"name": f"words{i}", "data": str(data)} for i in range(silos)],
            "dept": {"variant": "glob", "rounds": 2, "n_local": n_local},
            "parallel": parallel,
            "training": {"micro_batch_size": 4, "global_batch_size": 16, "threads_per_rank": 1, "timeout_seconds": 600},
            "evaluation": {"interval_rounds": 0},
            "checkpoint": {"save_interval": 0},
            "logging": {"peak_tflops": 1.0, "interval_steps": 10_000, "norm_interval_steps": 10_000},
        },
        "benchmark",
    )


class PlainModel(nn.Module):
    """Embedding, body and loss in one module, as a user of DeepSpeed alone would write it."""

    def __init__(self, embedding: SourceEmbedding, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body = embedding, body

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.embedding.loss(self.body(self.embedding.embed(inputs, hooked=True)), targets)


class TiedEmbedding(nn.Module):
    """The embedding as TiedLayerSpec wants it: one module on both ends."""

    def __init__(self, make: Callable[[], SourceEmbedding]) -> None:
        super().__init__()
        self.table = make()

    def forward(self, ids: Tensor) -> Tensor:
        return self.table.embed(ids, hooked=True)


def plain_stepper(config: RunConfig, world: World) -> Callable[[list[tuple[Tensor, Tensor]]], None]:
    """A step of plain DeepSpeed at this layout."""
    parallel, training = config.parallel, config.training

    def embedding() -> SourceEmbedding:
        shard = VocabularyShard(world.tensor, VOCABULARY, parallel.sequence_parallel)
        token = init_rows(shard.start, shard.stop, config.model.hidden_size, 0.02, "plain")
        position = init_rows(0, config.model.seq_length, config.model.hidden_size, 0.02, "plain position")
        return SourceEmbedding(
            token, position if world.tensor.rank == 0 else None, torch.float32, training.loss_chunk_tokens, shard
        )

    settings = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": {"stage": parallel.zero_stage},
        "steps_per_print": None,
    }
    part = body_part(config, world, VOCABULARY)
    if world.shape.pipe > 1:
        layers = [LayerSpec(nn.Identity)] * world.shape.pipe
        layers[world.place.pipe] = build_body(config.model, 1, part=part)  # type: ignore[call-overload]
        ends = [
            TiedLayerSpec("table", TiedEmbedding, embedding, tied_weight_attr=["table.token"]),
            TiedLayerSpec(
                "table",
                TiedEmbedding,
                embedding,
                tied_weight_attr=["table.token"],
                forward_fn=lambda module, x: (module, x),
            ),
        ]
        topology = PipeModelDataParallelTopology(world.shape.pipe, world.shape.tensor, world.shape.data)
        module = PipelineModule(
            [ends[0], *layers, ends[1]],
            topology=topology,
            partition_method="uniform",
            loss_fn=lambda output, targets: output[0].table.loss(output[1], targets),
        )
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(list(module.parameters()), config.optimizer),
            config=settings,
            dist_init_required=False,
        )
        return lambda batches: float(engine.train_batch(iter(batches))) and None
    model = PlainModel(embedding(), build_body(config.model, 1, part=part)).to(world.device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(list(model.parameters()), config.optimizer),
        config=settings,
        mpu=world.mpu,
        dist_init_required=False,
    )

    def step(batches: list[tuple[Tensor, Tensor]]) -> None:
        total = torch.zeros((), device=world.device)
        for inputs, targets in batches:
            loss = engine(inputs, targets)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        float(total)

    return step


def trainer_of(launch: Launch, config: RunConfig) -> tuple[World, Trainer]:
    torch.set_num_threads(1)
    world = start_world(launch, Layout.cut(config.parallel, launch.world_size), 600)
    return world, build_trainer(config, world, SourceSet(config))


def inner_steps(launch: Launch, config: RunConfig, steps: int) -> dict[str, list[float]]:
    """Seconds of interleaved steps on this rank; the first two of each are warm-up."""
    world, trainer = trainer_of(launch, config)
    local = trainer._begin_phase("words0")
    assert local.source is not None
    plain = plain_stepper(config, world)
    seconds: dict[str, list[float]] = {"dept": [], "plain": []}
    for _ in range(steps + 2):
        for name in ("dept", "plain"):
            world.barrier()
            began = time.perf_counter()
            if name == "dept":
                trainer._step(local, local.source)
                local.step += 1
            else:
                plain(trainer._micro_batches(local.source, local.step * config.training.global_batch_size))
            seconds[name].append(time.perf_counter() - began)
    return {name: values[2:] for name, values in seconds.items()}


def outer_step(launch: Launch, config: RunConfig) -> dict[str, float]:
    """Seconds of the second round's outer step by part, on this rank."""
    world, trainer = trainer_of(launch, config)
    spent: dict[str, float] = defaultdict(float)
    exchange, shards = trainer._exchange, trainer._engine.shards
    assert exchange is not None

    def timed(target: Any, method: str, part: str, kind: str | None = None) -> None:
        inner = getattr(target, method)

        def wrapper(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = inner(*arguments, **named)
            # The same group carries shared rows too.
            if kind is None or kind in arguments:
                spent[part] += time.perf_counter() - began
            return result

        setattr(target, method, wrapper)

    timed(shards, "read", "pack")
    timed(exchange, "add", "pack")
    timed(exchange, "finish", "finish")
    timed(shards, "write", "write back")
    for method in ("all_to_all", "all_gather"):
        timed(world.peers, method, "wire", "body")
    for _ in range(2):
        spent.clear()
        assert trainer._round()
    return {part: spent["finish"] - spent["wire"] if part == "optimizer" else spent[part] for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps of each kind (default 12)")
    parser.add_argument("--only", default="", help="layouts whose name holds this")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="layouts-"))
    figures: dict[str, Any] = {"inner_step": {}, "outer_step": {}}
    try:
        data = dataset(root)
        print(
            "| layout | plain DeepSpeed s (best) | DEPT s (best) | median / median | best / best |\n" + "|---" * 5 + "|"
        )
        for label, (ranks, parallel) in LAYOUTS.items():
            if arguments.only not in label:
                continue
            config = config_of(data, root / label.replace(" ", "_"), parallel)
            told = run_ranks(ranks, inner_steps, config, arguments.steps, limit=900)[0]
            best, middle = ({name: of(values) for name, values in told.items()} for of in (min, statistics.median))
            cells = [f"{middle[name]:.3f} ({best[name]:.3f})" for name in ("plain", "dept")]
            cells += [f"{of['dept'] / of['plain']:.3f}" for of in (middle, best)]
            print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
            figures["inner_step"][label] = {"median": middle, "best": best}
        print("\n| outer step, ms | " + " | ".join(PARTS) + " |\n" + "|---" * (len(PARTS) + 1) + "|")
        for label, (ranks, parallel) in OUTER.items():
            if arguments.only not in label:
                continue
            config = config_of(data, root / label.replace(" ", "_"), parallel, n_local=1)
            parts = run_ranks(ranks, outer_step, config, limit=900)[0]
            print(f"| {label} | " + " | ".join(f"{1000 * parts[part]:.1f}" for part in PARTS) + " |", flush=True)
            figures["outer_step"][label] = parts
    finally:
        shutil.rmtree(root)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
