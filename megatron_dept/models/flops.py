"""How many parameters a body has and how many operations a token costs, in closed form: nothing is built.

h hidden, f ffn, a query heads, g key-value heads, d head size, l layers, s sequence, V vocabulary.
"""

from megatron_dept.config.schema import ModelConfig


def body_parameters(config: ModelConfig) -> int:
    """Elements of the body: matrices, biases and norms; neither token nor position table."""
    h, f = config.hidden_size, config.ffn_size
    if config.family == "llama":
        norms_and_biases = 2 * h
        final = h
    else:
        norms_and_biases = 4 * h + _qkv_rows(config) + h + f + h
        final = 2 * h
    return config.num_layers * (_matrices_per_layer(config) + norms_and_biases) + final


def flops_per_token(config: ModelConfig, vocabulary: int) -> int:
    """Floating-point operations to train one token, forward and backward, at `config.seq_length`.

    The count of Chowdhery et al. (PaLM, appendix B), which is what MFU is usually quoted in: 6 for each element of a
    matrix the token is multiplied by (2 forward, 4 backward), the tied head's V x h among them, plus 12 l h s for
    attention's two products, counted over the whole sequence although the causal half would do. Look-ups, norms,
    activations, biases and recomputation under activation checkpointing are not counted.
    """
    return config.num_layers * layer_flops_per_token(config) + head_flops_per_token(config, vocabulary)


def layer_flops_per_token(config: ModelConfig) -> int:
    """One layer's part of `flops_per_token`."""
    return 6 * _matrices_per_layer(config) + 12 * config.hidden_size * config.seq_length


def head_flops_per_token(config: ModelConfig, vocabulary: int) -> int:
    """The tied head's part of `flops_per_token`."""
    return 6 * vocabulary * config.hidden_size


def _qkv_rows(config: ModelConfig) -> int:
    return (config.num_attention_heads + 2 * config.kv_heads) * config.head_size


def _matrices_per_layer(config: ModelConfig) -> int:
    h = config.hidden_size
    mlp_matrices = 3 if config.family == "llama" else 2
    return _qkv_rows(config) * h + h * h + mlp_matrices * h * config.ffn_size
