"""Causal self-attention of both families, on torch's scaled_dot_product_attention.

Shapes: b batch, s sequence, h hidden, a query heads, g key-value heads, d head size, T tensor ranks.

The fused weight `qkv` [g * (a/g + 2) * d, h] keeps Megatron's layout: for each key-value head in turn its a/g query
heads, then its key, then its value. A contiguous block of rows is then whole groups: a tensor rank's share where T
divides g. Where g divides T, a rank has a/T query heads of one group and a copy of that group's key and value.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.parts import WHOLE, BodyPart
from megatron_dept.models.positions import Positions, rotate
from megatron_dept.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_dept.tensor_parallel.mappings import enter_ranks
from megatron_dept.tensor_parallel.shards import Rows


class Attention(nn.Module):
    """Multi-head or grouped-query attention; `qkv` and `projection` have biases in family gpt."""

    def __init__(self, config: ModelConfig, part: BodyPart = WHOLE) -> None:
        super().__init__()
        bias = config.family == "gpt"
        self._part = part
        self.groups = max(1, config.kv_heads // part.tensor.size)
        self.heads = config.num_attention_heads // part.tensor.size
        self.head_size = config.head_size
        self.qkv = _fused(config, part, bias)
        self.projection = RowParallelLinear(
            config.hidden_size, config.hidden_size, bias, part.tensor, part.splits_sequence
        )

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        """[b, s, h] -> [b, s, h] in the same dtype; [b, s/T, h] -> [b, s/T, h] where the sequence is split."""
        hidden = enter_ranks(hidden, self._part.tensor, self._part.splits_sequence)
        batch, length, _ = hidden.shape
        per_group = self.heads // self.groups
        fused = self.qkv(hidden).view(batch, length, self.groups, per_group + 2, self.head_size)
        query, key, value = fused.split((per_group, 1, 1), dim=3)
        query, key, value = (
            part.reshape(batch, length, -1, self.head_size).transpose(1, 2) for part in (query, key, value)
        )
        if positions.cosine is not None and positions.sine is not None:
            query = rotate(query, positions.cosine, positions.sine)
            key = rotate(key, positions.cosine, positions.sine)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=positions.bias,
            is_causal=positions.bias is None,
            enable_gqa=self.groups != self.heads,
        )
        return self.projection(attended.transpose(1, 2).reshape(batch, length, -1))


def _fused(config: ModelConfig, part: BodyPart, bias: bool) -> ColumnParallelLinear:
    """The layer of queries, keys and values, of which this tensor rank has whole groups or a share of one group."""
    tensor, groups, size = part.tensor, config.kv_heads, config.head_size
    outputs = (config.num_attention_heads + 2 * groups) * size
    if groups % tensor.size == 0:
        return ColumnParallelLinear(config.hidden_size, outputs, bias, tensor)
    holders = tensor.size // groups
    group, holder = divmod(tensor.rank, holders)
    first = group * (outputs // groups)
    queries = config.num_attention_heads // tensor.size * size
    keys = first + holders * queries
    rows = (
        Rows(first + holder * queries, first + (holder + 1) * queries),
        Rows(keys, keys + 2 * size, primary=holder == 0),
    )
    return ColumnParallelLinear(
        config.hidden_size, outputs, bias, tensor, rows, copied_rows=2 * size, copy=group, copies=groups
    )


def split_qkv(fused: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the fused `qkv` weight [(a + 2g)d, h] or bias [(a + 2g)d] as query [ad, ..], key and value [gd, ..]."""
    groups, per_group = config.kv_heads, config.num_attention_heads // config.kv_heads
    rows = fused.reshape(groups, per_group + 2, config.head_size, *fused.shape[1:])
    query, key, value = rows.split((per_group, 1, 1), dim=1)
    return tuple(part.reshape(-1, *fused.shape[1:]) for part in (query, key, value))
