"""config.json and generation_config.json of the stock architecture that computes our model."""

from collections.abc import Iterable

from transformers import GenerationConfig, GPT2Config, LlamaConfig, PretrainedConfig

from megatron_dept.config.schema import ModelConfig
from megatron_dept.export.state import check_exportable


def transformers_config(config: ModelConfig, vocab_size: int, eod_id: int) -> PretrainedConfig:
    """The configuration of GPT2LMHeadModel or LlamaForCausalLM; `UserError` for ALiBi.

    Documents are separated by `eod_id` alone in training, so it begins a text as well as it ends one.
    """
    check_exportable(config)
    shared = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
        "initializer_range": config.init_std,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "dtype": "float32",
    }
    if config.family == "llama":
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.seq_length,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            hidden_act="silu",
            attention_bias=False,
            mlp_bias=False,
            **shared,
        )
    return GPT2Config(
        architectures=["GPT2LMHeadModel"],
        n_positions=config.seq_length,
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_attention_heads,
        n_inner=config.ffn_size,
        activation_function="gelu_new",
        layer_norm_epsilon=config.norm_epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **shared,
    )


def generation_config(eod_id: int, suppressed: Iterable[int]) -> GenerationConfig:
    """Generation stops at `eod_id` and never gives an id of `suppressed` (ids without an embedding row)."""
    return GenerationConfig(
        bos_token_id=eod_id,
        eos_token_id=eod_id,
        pad_token_id=eod_id,
        suppress_tokens=[int(index) for index in suppressed] or None,
    )
