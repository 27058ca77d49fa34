"""The second body: Llama's block (Touvron et al., 2023): RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases.

`transformers`' LlamaForCausalLM computes exactly this.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.attention import Attention
from megatron_dept.models.norm import rms_norm
from megatron_dept.models.transformer import Layer, Transformer


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up [ffn, h], down [h, ffn]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


def llama_layer(config: ModelConfig) -> Layer:
    """One Llama block, its parameters not yet initialised."""
    size, epsilon = config.hidden_size, config.norm_epsilon
    return Layer(rms_norm(size, epsilon), Attention(config), rms_norm(size, epsilon), LlamaMLP(config))


class LlamaBody(Transformer):
    """`num_layers` Llama blocks and the final RMSNorm."""

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False) -> None:
        layers = [llama_layer(config) for _ in range(config.num_layers)]
        super().__init__(config, layers, rms_norm(config.hidden_size, config.norm_epsilon), activation_checkpointing)
