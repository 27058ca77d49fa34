"""Bodies by name that runs are planned for: the paper's three, and two of Llama's shape."""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_dept.config.presets import PRESETS
from megatron_dept.config.schema import ModelConfig

LLAMA_7B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "ffn_hidden_size": 11008,
    "seq_length": 4096,
}
LLAMA_70B = {
    "num_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "ffn_hidden_size": 28672,
    "seq_length": 4096,
}

MODELS: Mapping[str, ModelConfig] = MappingProxyType(
    {name: ModelConfig.model_validate(PRESETS[name]) for name in ("dept-125m", "dept-350m", "dept-1.3b")}
    | {
        # Touvron et al. 2023 (arXiv 2302.13971 and 2307.09288): their bodies; embeddings are tied here.
        "llama-7b": ModelConfig.model_validate({"family": "llama", **LLAMA_7B}),
        "llama-70b": ModelConfig.model_validate({"family": "llama", **LLAMA_70B}),
    }
)
