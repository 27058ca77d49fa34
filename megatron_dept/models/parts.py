"""Which part of a body a rank holds: its layers along the pipeline, its share of each along the tensor ranks."""

from dataclasses import dataclass

from megatron_dept.config.schema import ModelConfig
from megatron_dept.tensor_parallel.group import ALONE, TensorGroup


@dataclass(frozen=True)
class BodyPart:
    """`layers`: global indices, None for all; `final_norm`: whether the last norm is here.

    With `sequence_parallel` hidden states between the blocks are split along the sequence over the tensor ranks.
    """

    tensor: TensorGroup = ALONE
    sequence_parallel: bool = False
    layers: range | None = None
    final_norm: bool = True

    @property
    def splits_sequence(self) -> bool:
        """Whether hidden states between the blocks are [b, s/T, h]: a lone rank splits nothing."""
        return self.sequence_parallel and self.tensor.size > 1

    def check(self, config: ModelConfig) -> None:
        """Raise `ValueError` where the heads or the feed-forward layer of `config` cannot be cut over the ranks."""
        ranks, heads, groups = self.tensor.size, config.num_attention_heads, config.kv_heads
        for name, count in (("num_attention_heads", heads), ("ffn_hidden_size", config.ffn_size)):
            if count % ranks:
                raise ValueError(f"{name} {count} is not divisible by {ranks} tensor ranks")
        if groups % ranks and ranks % groups:
            raise ValueError(
                f"num_key_value_heads {groups} is neither a multiple nor a divisor of {ranks} tensor ranks"
            )
        if self.layers is not None and (self.layers.step != 1 or not set(self.layers) <= set(range(config.num_layers))):
            raise ValueError(f"{self.layers} are not layers of a body of {config.num_layers}")


WHOLE = BodyPart()
