"""The paper's body: GPT-2's block (Radford et al., 2019), pre-LN, tanh GELU, biases, no dropout.

Learned positions are added by the embedding; with ALiBi the bias is in the attention. With learned positions,
`transformers`' GPT2LMHeadModel computes exactly this.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.attention import Attention
from megatron_dept.models.norm import layer_norm
from megatron_dept.models.parts import WHOLE, BodyPart
from megatron_dept.models.transformer import Layer, Transformer
from megatron_dept.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_dept.tensor_parallel.mappings import enter_ranks


class GPTMLP(nn.Module):
    """up [ffn, h], GELU (tanh), down [ffn, h] (input-major)."""

    def __init__(self, config: ModelConfig, part: BodyPart = WHOLE) -> None:
        super().__init__()
        self._part = part
        self.up = ColumnParallelLinear(config.hidden_size, config.ffn_size, True, part.tensor)
        self.down = RowParallelLinear(config.ffn_size, config.hidden_size, True, part.tensor, part.splits_sequence)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h], or of this rank's part of the sequence."""
        hidden = enter_ranks(hidden, self._part.tensor, self._part.splits_sequence)
        return self.down(F.gelu(self.up(hidden), approximate="tanh"))


def gpt_layer(config: ModelConfig, part: BodyPart = WHOLE) -> Layer:
    """One GPT-2 block, its parameters not yet initialised."""
    size, epsilon = config.hidden_size, config.norm_epsilon
    return Layer(
        layer_norm(size, epsilon, part),
        Attention(config, part),
        layer_norm(size, epsilon, part),
        GPTMLP(config, part),
    )


class GPTBody(Transformer):
    """A part's GPT-2 blocks, and the final LayerNorm where the part has it."""

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False, part: BodyPart = WHOLE) -> None:
        super().__init__(config, gpt_layer, layer_norm, activation_checkpointing, part)
