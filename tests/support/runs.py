"""A small run's configuration over the test corpus, and running it on forked ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_dept.checkpoint.reader import Checkpoint, committed
from megatron_dept.config.load import validate_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from tests.support.corpus import Corpus
from tests.support.distributed import free_port, run_ranks


def small_config(corpus: Corpus, run_dir: Path, **sections: Any) -> RunConfig:
    """Two layers, 32 wide; `sections` are merged over: `small_config(c, d, dept={"variant": "trim"})`."""
    names = sections.pop("source_names", list(corpus.data))
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "tokenizer": str(corpus.tokenizer),
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 32},
        "sources": [
            {"name": name, "data": str(corpus.data[name]), "own_data": str(corpus.own_data[name])} for name in names
        ],
        "dept": {"variant": "glob", "rounds": 2, "n_local": 3},
        "optimizer": {"warmup_steps": 2, "learning_rate": 3e-3},
        "training": {"micro_batch_size": 2, "global_batch_size": 4, "threads_per_rank": 1, "timeout_seconds": 60},
        "evaluation": {"interval_rounds": 0},
        "logging": {"peak_tflops": 1.0},
    }
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return validate_config(values, "test")


def train(config: RunConfig, ranks: int = 1) -> list[bool]:
    """Run the whole program's `run` on forked ranks; what each returned."""
    return run_ranks(ranks, train_rank, config)


def run_that_greek_left(corpus: Corpus, directory: Path, variant: str) -> Path:
    """A finished run of two rounds of a step; after the first one greek has left latin alone."""
    run_dir = directory / "run"
    same = {"dept": {"variant": variant, "rounds": 2, "n_local": 1}}
    train(small_config(corpus, run_dir, source_names=["latin", "greek"], **same))
    # Back to the first round's end: a run that has ended has two checkpoints.
    shutil.rmtree(committed(run_dir / "checkpoints")[-1])
    train(small_config(corpus, run_dir, source_names=["latin"], **same))
    return run_dir


def train_rank(launch: Launch, config: RunConfig) -> bool:
    """One rank of `train`."""
    from megatron_dept.training.setup import run

    return run(config, launch)


def train_sites(configs: list[RunConfig], ranks: list[int]) -> list[bool]:
    """Each configuration as a launch of its own, of so many ranks, all at once; what each rank returned."""
    ports = [free_port() for _ in configs]
    return run_ranks(sum(ranks), train_site_rank, configs, ranks, ports)


def train_site_rank(launch: Launch, configs: list[RunConfig], ranks: list[int], ports: list[int]) -> bool:
    """One rank of `train_sites`."""
    rank = launch.rank
    for config, size, port in zip(configs, ranks, ports, strict=True):
        if rank < size:
            return train_rank(Launch(rank, size, rank, size, "127.0.0.1", port), config)
        rank -= size
    raise AssertionError("ranks are counted")


def metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """All silos' metrics lines of a kind, in the order of silos and writing."""
    lines = []
    for file in sorted(run_dir.glob("metrics.silo*.jsonl")):
        lines += [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    """(source, sequential step) -> loss; of a step trained twice (resumed), the last."""
    return {(line["source"], line["step"]): line["loss"] for line in metrics(run_dir, "step")}


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Body and tables of a run's newest checkpoint, by name."""
    checkpoint = Checkpoint.open(run_dir)
    state = {f"body/{name}": value for name, value in checkpoint.body().items()}
    if "token" in checkpoint.index:
        state["token"] = checkpoint.index.read("token")
        if "position" in checkpoint.index:
            state["position"] = checkpoint.index.read("position")
    for name in checkpoint.manifest["sources"]:
        for part in ("token", "position"):
            if f"source/{name}/{part}" in checkpoint.index:
                state[f"source/{name}/{part}"] = checkpoint.index.read(f"source/{name}/{part}")
    return state


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest |a - b| / |b| (L2 over a tensor) of two states with the same names."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    return max(
        float(
            torch.linalg.vector_norm(left[name] - right[name]) / torch.linalg.vector_norm(right[name]).clamp(min=1e-12)
        )
        for name in left
    )
