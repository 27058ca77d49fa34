"""The second body: Llama's block (Touvron et al., 2023): RMSNorm, SwiGLU, RoPE, grouped-query attention, no biases.

`transformers`' LlamaForCausalLM computes exactly this.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.attention import Attention
from megatron_dept.models.norm import rms_norm
from megatron_dept.models.parts import WHOLE, BodyPart
from megatron_dept.models.transformer import Layer, Transformer
from megatron_dept.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_dept.tensor_parallel.mappings import enter_ranks


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up [ffn, h], down [ffn, h] (input-major)."""

    def __init__(self, config: ModelConfig, part: BodyPart = WHOLE) -> None:
        super().__init__()
        self._part = part
        self.gate = ColumnParallelLinear(config.hidden_size, config.ffn_size, False, part.tensor)
        self.up = ColumnParallelLinear(config.hidden_size, config.ffn_size, False, part.tensor)
        self.down = RowParallelLinear(config.ffn_size, config.hidden_size, False, part.tensor, part.splits_sequence)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h], or of this rank's part of the sequence."""
        hidden = enter_ranks(hidden, self._part.tensor, self._part.splits_sequence)
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


def llama_layer(config: ModelConfig, part: BodyPart = WHOLE) -> Layer:
    """One Llama block, its parameters not yet initialised."""
    size, epsilon = config.hidden_size, config.norm_epsilon
    return Layer(
        rms_norm(size, epsilon, part),
        Attention(config, part),
        rms_norm(size, epsilon, part),
        LlamaMLP(config, part),
    )


class LlamaBody(Transformer):
    """A part's Llama blocks, and the final RMSNorm where the part has it."""

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False, part: BodyPart = WHOLE) -> None:
        super().__init__(config, llama_layer, rms_norm, activation_checkpointing, part)
