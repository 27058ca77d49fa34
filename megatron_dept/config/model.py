"""The configuration of the body, and the base of all sections."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(Section):
    """The transformer body (DEPT paper, its recipe) and the embedding's width."""

    family: Literal["gpt", "llama"] = Field("gpt", description="gpt: LayerNorm, GELU, biases; llama: RMSNorm, SwiGLU")
    num_layers: int = Field(4, gt=0)
    hidden_size: int = Field(128, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int | None = Field(None, gt=0, description="llama only: grouped-query attention")
    ffn_hidden_size: int | None = Field(None, gt=0, description="default: 4h (gpt), 8/3 h rounded up to 64 (llama)")
    seq_length: int = Field(128, gt=1, description="tokens a sequence, and rows of the position table")
    position_embedding: Literal["learned", "alibi", "rope"] | None = Field(
        None, description="default: learned (gpt), rope (llama)"
    )
    norm_epsilon: float = Field(1e-5, gt=0)
    init_std: float = Field(0.02, gt=0)
    rope_theta: float = Field(10000.0, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "set one to a multiple of the other"
            )
        if self.family == "gpt":
            if self.num_key_value_heads not in (None, self.num_attention_heads):
                raise ValueError("num_key_value_heads is for family llama; remove it or choose llama")
            if self.position_embedding == "rope":
                raise ValueError("position_embedding rope needs family llama; choose learned or alibi for gpt")
        elif self.position_embedding in ("learned", "alibi"):
            raise ValueError(
                f"position_embedding {self.position_embedding} needs family gpt; set rope, or leave it out, for llama"
            )
        elif self.head_size % 2:
            raise ValueError(
                f"head size {self.head_size} (hidden_size / num_attention_heads) is odd, and rope turns pairs; "
                "set num_attention_heads so that it is even"
            )
        defaults = {
            "position_embedding": "learned" if self.family == "gpt" else "rope",
            "num_key_value_heads": self.num_attention_heads,
            "ffn_hidden_size": 4 * self.hidden_size
            if self.family == "gpt"
            else -(-8 * self.hidden_size // 3 // 64) * 64,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.kv_heads}; set num_key_value_heads to a divisor"
            )
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        assert self.ffn_hidden_size is not None, "filled in by the validator"
        return self.ffn_hidden_size

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def has_position_table(self) -> bool:
        """Whether there is a learned position table (psi in the paper) beside the token table."""
        return self.position_embedding == "learned"
