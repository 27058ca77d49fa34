"""What both bodies share: pre-norm layers in a row, a final norm, and the positions handed to every layer.

Shapes: b batch, s sequence, h hidden.
"""

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.positions import PositionCache, Positions, alibi_bias, rope_rotation


def positions_of(config: ModelConfig, length: int, device: torch.device, dtype: torch.dtype) -> Positions:
    """The positions a body of `config` hands to its layers for sequences of `length` tokens."""
    if config.position_embedding == "alibi":
        return Positions(bias=alibi_bias(config.num_attention_heads, length, device, dtype))
    if config.position_embedding == "rope":
        cosine, sine = rope_rotation(config.head_size, config.rope_theta, length, device)
        return Positions(cosine=cosine, sine=sine)
    return Positions()


class Layer(nn.Module):
    """One pre-norm block: hidden + attention(norm(hidden)), then hidden + mlp(norm(hidden))."""

    def __init__(self, attention_norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        """[b, s, h] -> [b, s, h] in the same dtype."""
        hidden = hidden + self.attention(self.attention_norm(hidden), positions)
        return hidden + self.mlp(self.mlp_norm(hidden))


class Transformer(nn.Module):
    """A body: `layers`, then `final_norm`. Holds no embedding, so its shapes are the same for every source."""

    def __init__(
        self, config: ModelConfig, layers: list[Layer], final_norm: nn.Module, activation_checkpointing: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.layers = nn.ModuleList(layers)
        self.final_norm = final_norm
        self._positions = PositionCache(functools.partial(positions_of, config))

    def forward(self, hidden: Tensor) -> Tensor:
        """Embedded tokens [b, s, h] -> normed hidden states [b, s, h], in the dtype of the parameters."""
        positions = self._positions(hidden)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                # No dropout anywhere: the random state need not be kept for the second forward.
                hidden = checkpoint(layer, hidden, positions, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(hidden, positions)
        return self.final_norm(hidden)
