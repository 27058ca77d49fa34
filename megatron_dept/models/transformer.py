"""What both bodies share: pre-norm layers in a row, a final norm, and the positions handed to every layer.

Shapes: b batch, s sequence, h hidden, T tensor ranks.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.parts import BodyPart
from megatron_dept.models.positions import PositionCache, Positions, alibi_bias, alibi_slopes, rope_rotation


def positions_of(
    config: ModelConfig, part: BodyPart, length: int, device: torch.device, dtype: torch.dtype
) -> Positions:
    """The positions this part of a body of `config` hands to its layers for sequences of `length` tokens."""
    if config.position_embedding == "alibi":
        mine = config.num_attention_heads // part.tensor.size
        slopes = alibi_slopes(config.num_attention_heads)[part.tensor.rank * mine : (part.tensor.rank + 1) * mine]
        return Positions(bias=alibi_bias(slopes, length, device, dtype))
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
    """A body, or a part of one: `layers` by their global index, then `final_norm` where the part has it.

    Holds no embedding, so its shapes are the same for every source.
    """

    def __init__(
        self,
        config: ModelConfig,
        make_layer: Callable[[ModelConfig, BodyPart], Layer],
        make_norm: Callable[[int, float, BodyPart], nn.Module],
        activation_checkpointing: bool,
        part: BodyPart,
    ) -> None:
        super().__init__()
        part.check(config)
        self.config = config
        self.part = part
        self.activation_checkpointing = activation_checkpointing
        indices = range(config.num_layers) if part.layers is None else part.layers
        # Keys are global, so that a parameter is called the same whatever part of the body is here.
        self.layers = nn.ModuleDict({str(index): make_layer(config, part) for index in indices})
        self.final_norm = make_norm(config.hidden_size, config.norm_epsilon, part) if part.final_norm else None
        # Attention sees whole sequences, however the hidden states between the blocks are split.
        split = part.tensor.size if part.splits_sequence else 1
        self._positions = PositionCache(functools.partial(positions_of, config, part), split)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [b, s, h] before the part -> those after it, normed where the last norm is here.

        In the dtype of the parameters; [b, s/T, h] on each tensor rank where the sequence is split.
        """
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers.values():
            positions = self._positions(hidden)
            if recompute:
                # No dropout anywhere: the random state need not be kept for the second forward.
                hidden = checkpoint(layer, hidden, positions, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = layer(hidden, positions)
        return hidden if self.final_norm is None else self.final_norm(hidden)
