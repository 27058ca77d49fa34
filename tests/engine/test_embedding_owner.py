"""The embedding's gradients over data ranks and the two ends of a pipeline, which hold the same table twice."""

from typing import Any

import numpy as np
import torch

from megatron_dept.common.seeding import seed_for
from megatron_dept.config.schema import OptimizerConfig
from megatron_dept.engine.embedding_owner import EmbeddingOwner
from megatron_dept.engine.world import start_world
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.initialise import init_rows
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout
from tests.support.distributed import run_ranks

ROWS, WIDTH, POSITIONS = 13, 6, 8
STAGES, DATA = 3, 2
RATE, COEFFICIENT = 0.5, 0.25


def gradient(table: str, pipe: int, data: int) -> torch.Tensor:
    """What a rank's backward would leave: of numbers that sum exactly in no order but their own."""
    rows = ROWS if table == "token" else POSITIONS
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed_for(table, pipe, data)))


def _train(launch: Launch, looks_up: bool) -> dict[str, Any]:
    """Two SGD steps with the same gradients; `looks_up`: whether the first stage's token table has one at all."""
    world = start_world(launch, Layout.of_equal(1, STAGES, DATA, 1), 60)
    if not (world.first_stage or world.last_stage):
        return {}
    position = init_rows(0, POSITIONS, WIDTH, 1.0, "position") if world.first_stage else None
    module = SourceEmbedding(init_rows(0, ROWS, WIDTH, 1.0, "token"), position, torch.float32, 7)
    owner = EmbeddingOwner(module, OptimizerConfig(optimizer="sgd"), world)
    squares = []
    for _ in range(2):
        for name, table in module.named_parameters():
            if looks_up or name == "position" or world.last_stage:
                table.grad = gradient(name, world.place.pipe, world.place.data)
        squares.append(owner.reduce_gradients())
        owner.step(RATE, COEFFICIENT)
    return {
        "squares": squares,
        "tables": {name: table.detach().numpy() for name, table in module.named_parameters()},
        "left": [name for name, table in module.named_parameters() if table.grad is not None],
    }


def test_both_ends_step_the_sum_of_their_gradients() -> None:
    for looks_up in (True, False):
        reports = run_ranks(STAGES * DATA, _train, looks_up)
        ends = (0, STAGES - 1) if looks_up else (STAGES - 1,)
        expected = {
            "token": sum(gradient("token", pipe, data) for pipe in ends for data in range(DATA)) / DATA,
            "position": sum(gradient("position", 0, data) for data in range(DATA)) / DATA,
        }
        first, last = reports[:DATA], reports[-DATA:]
        assert reports[DATA:-DATA] == [{}] * (len(reports) - 2 * DATA)
        # One sum of four numbers in another order: 1e-6 of each.
        for name, mean in expected.items():
            rows = len(mean)
            moved = init_rows(0, rows, WIDTH, 1.0, name) - 2 * RATE * COEFFICIENT * mean
            np.testing.assert_allclose(first[0]["tables"][name], moved.numpy(), rtol=1e-5, atol=1e-6)
        for report in first + last:
            for name, table in report["tables"].items():
                assert (table == first[0]["tables"][name]).all(), "copies differ"
            assert report["left"] == []
        # Each element once, by the first stage's first data rank.
        total = sum(float(mean.double().square().sum()) for mean in expected.values())
        np.testing.assert_allclose(first[0]["squares"], [total, total], rtol=1e-6)
        assert [report["squares"] for report in first[1:] + last] == [[0.0, 0.0]] * (2 * DATA - 1)
