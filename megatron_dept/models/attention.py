"""Causal self-attention of both families, on torch's scaled_dot_product_attention.

Shapes: b batch, s sequence, h hidden, a query heads, g key-value heads, d head size.

The fused weight `qkv` [g * (a/g + 2) * d, h] keeps Megatron's layout: for each key-value head in turn its a/g query
heads, then its key, then its value. A contiguous block of rows is then whole groups, so a tensor-parallel rank's shard
is one slice. `projection` is split by columns the same way.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.positions import Positions, rotate


class Attention(nn.Module):
    """Multi-head or grouped-query attention; `qkv` and `projection` have biases in family gpt."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.family == "gpt"
        self.groups = config.kv_heads
        self.heads = config.num_attention_heads
        self.head_size = config.head_size
        rows = (self.heads + 2 * self.groups) * self.head_size
        self.qkv = nn.Linear(config.hidden_size, rows, bias=bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        """[b, s, h] -> [b, s, h] in the same dtype."""
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


def split_qkv(fused: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the fused `qkv` weight [(a + 2g)d, h] or bias [(a + 2g)d] as query [ad, ..], key and value [gd, ..]."""
    groups, per_group = config.kv_heads, config.num_attention_heads // config.kv_heads
    rows = fused.reshape(groups, per_group + 2, config.head_size, *fused.shape[1:])
    query, key, value = rows.split((per_group, 1, 1), dim=1)
    return tuple(part.reshape(-1, *fused.shape[1:]) for part in (query, key, value))
