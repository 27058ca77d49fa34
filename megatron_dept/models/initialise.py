"""First values of parameters and embedding rows: pure functions of (seed, name), never of order, rank or layout.

Shapes: h hidden. numpy's generators are used: their numbers are the same on every machine and thread count.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from megatron_dept.common.seeding import generator_for
from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.tags import tag
from megatron_dept.tensor_parallel.shards import shard_of, take

ROWS_PER_BLOCK = 1024
# Projections that end a residual branch: two of them a layer.
_RESIDUAL_OUTPUTS = ("attention.projection.weight", "mlp.down.weight")


def initialise_body(body: nn.Module, config: ModelConfig, seed: int, prefix: str = "") -> None:
    """Fill `body`'s fp32 parameters in place and tag them `body`; `prefix` goes before names, where body is a part.

    GPT-2's and Megatron's rule: weights N(0, init_std), those that end a residual branch N(0, init_std /
    sqrt(2 num_layers)), biases 0, norms 1. Each weight's generator is seeded by (seed, "body", its name) and draws the
    whole weight, of which a tensor rank keeps its shard.
    """
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            tag(parameter, "body")
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = config.init_std
                if name.endswith(_RESIDUAL_OUTPUTS):
                    std /= math.sqrt(2 * config.num_layers)
                generator = generator_for(seed, "body", prefix + name)
                shard = shard_of(parameter)
                parameter.copy_(take(_normal(generator, shard.shape, std), shard))


def init_rows(start: int, stop: int, hidden: int, std: float, *seed_parts: str | int) -> Tensor:
    """Rows start..stop-1 of a table of N(0, std) rows: [stop - start, h] fp32.

    Rows come in fixed blocks, each with a seed of its own (seed_parts, block), so that any range can be made anywhere,
    without the rest of the table, and equals the same range of the whole.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"rows {start}..{stop} are no range of a table")
    rows = torch.empty(stop - start, hidden)
    for block in range(start // ROWS_PER_BLOCK, -(-stop // ROWS_PER_BLOCK)):
        first = block * ROWS_PER_BLOCK
        low, high = max(start, first), min(stop, first + ROWS_PER_BLOCK)
        # Numbers are drawn row by row, so a block is drawn only as far as it is needed.
        values = _normal(generator_for(*seed_parts, "rows", block), (high - first, hidden), std)
        rows[low - start : high - start] = values[low - first :]
    return rows


def _normal(generator: np.random.Generator, shape: tuple[int, ...], std: float) -> Tensor:
    """fp32 N(0, std) of `shape`."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).mul_(std)
