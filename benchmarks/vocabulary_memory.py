"""What a rank really holds of an embedding under each variant: live tensors and resident memory in training.

Built by the run's own `EmbeddingBroker` in a process of its own a variant: shared table, rows of the round's start, the
embedding in training, its gradients and the moments of its AdamW after a step. One silo alone, so its share of the
shared table is all of it; between S silos it is one S-th.
"""

import gc
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_dept.checkpoint.store import SourceStore
from megatron_dept.common.seeding import generator_for
from megatron_dept.config.load import validate_config
from megatron_dept.config.presets import PRESETS
from megatron_dept.config.schema import RunConfig, Variant
from megatron_dept.data.remap import VocabularyMap
from megatron_dept.dept.outer import OuterRule
from megatron_dept.engine.world import start_world
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout
from megatron_dept.training.embeddings import EmbeddingBroker


@dataclass(frozen=True)
class Held:
    """Counts of elements and bytes on one rank."""

    parameters: int
    """Elements of the token table in training."""
    positions: int
    weights: int
    """Bytes of both tables in training; so the next three."""
    gradients: int
    moments: int
    host: int
    """Of everything else that is live: rows of the round's start, the shared table, its pending sums."""
    resident: int
    """Bytes by which the process has grown."""


def config_of(variant: Variant, preset: str, directory: Path) -> RunConfig:
    """A run that trains one source; its datasets are not looked at."""
    return validate_config(
        {
            "run_dir": str(directory),
            "model": PRESETS[preset],
            "sources": [{"name": "source", "data": "data", "own_data": "data"}],
            "dept": {"variant": variant, "rounds": 1, "n_local": 1},
            "training": {"threads_per_rank": 1},
        },
        "benchmark",
    )


def measure(launch: Launch, variant: Variant, preset: str, vocabulary: int, rows: int, trains: bool) -> Held:
    """One embedding of `rows` rows under a tokenizer of `vocabulary` ids; `trains`: with gradients and moments too."""
    with tempfile.TemporaryDirectory(prefix="vocabulary-") as directory:
        config = config_of(variant, preset, Path(directory))
        world = start_world(launch, Layout.cut(config.parallel, 1), 60)
        ids = np.sort(generator_for("benchmark", "ids").choice(vocabulary, rows, replace=False))
        before, resident = live_bytes(), resident_bytes()
        broker = EmbeddingBroker(config, world, SourceStore(Path(directory)), vocabulary, OuterRule("fedavg", 1.0, 0.0))
        held = broker.acquire("source", VocabularyMap(ids, vocabulary), 0)
        assert held is not None
        owner = held.owner
        parameters = list(owner.module.parameters())
        gradients = moments = 0
        if trains:
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 1e-3)
            # As `EmbeddingOwner.step` does, which lets go of the gradients then.
            owner._optimizer.step()
            gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
            moments = sum(
                value.nbytes
                for state in owner._optimizer.state.values()
                for value in state.values()
                if value.numel() > 1
            )
        weights = sum(parameter.nbytes for parameter in parameters)
        everything = live_bytes() - before
        return Held(
            parameters=owner.module.token.numel(),
            positions=0 if owner.module.position is None else owner.module.position.numel(),
            weights=weights,
            gradients=gradients,
            moments=moments,
            host=everything - weights - gradients - moments,
            resident=resident_bytes() - resident,
        )


def live_bytes() -> int:
    """Of all tensors' storages that Python knows, each once."""
    gc.collect()
    storages: dict[int, int] = {}
    for each in gc.get_objects():
        if isinstance(each, Tensor) and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if each.grad_fn is None and each.grad is not None:
                storage = each.grad.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
