"""The paper's body: GPT-2's block (Radford et al., 2019), pre-LN, tanh GELU, biases, no dropout.

Learned positions are added by the embedding; with ALiBi the bias is in the attention. With learned positions,
`transformers`' GPT2LMHeadModel computes exactly this.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.attention import Attention
from megatron_dept.models.norm import layer_norm
from megatron_dept.models.transformer import Layer, Transformer


class GPTMLP(nn.Module):
    """up [ffn, h], GELU (tanh), down [h, ffn]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.ffn_size)
        self.down = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        return self.down(F.gelu(self.up(hidden), approximate="tanh"))


def gpt_layer(config: ModelConfig) -> Layer:
    """One GPT-2 block, its parameters not yet initialised."""
    size, epsilon = config.hidden_size, config.norm_epsilon
    return Layer(layer_norm(size, epsilon), Attention(config), layer_norm(size, epsilon), GPTMLP(config))


class GPTBody(Transformer):
    """`num_layers` GPT-2 blocks and the final LayerNorm."""

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        layers = [gpt_layer(config) for _ in range(config.num_layers)]
        super().__init__(config, layers, layer_norm(config.hidden_size, config.norm_epsilon), activation_checkpointing)
