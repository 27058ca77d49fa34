"""Our parameters under the names and in the layouts of transformers' GPT2LMHeadModel and LlamaForCausalLM.

Shapes: h hidden, v rows that exist, V ids of the tokenizer, L positions.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from megatron_dept.common.errors import UserError
from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.attention import split_qkv


def check_exportable(config: ModelConfig) -> None:
    """Raise `UserError` where no stock architecture computes what this model computes."""
    if config.position_embedding == "alibi":
        raise UserError(
            "model.position_embedding alibi cannot be exported: no stock architecture of transformers holds it "
            "exactly; train with learned positions or family llama"
        )


def to_transformers_state(
    config: ModelConfig, body: Mapping[str, Tensor], table: Tensor, position: Tensor | None
) -> dict[str, Tensor]:
    """State dict of the stock architecture: from `body` (names of `build_body`), table [V, h], position [L, h] or None.

    The head is tied to the table there as here, so it has no tensor of its own. Raises `UserError` for ALiBi.
    """
    check_exportable(config)
    if config.family == "llama":
        state = dict(_llama_body(config, body))
        state["model.embed_tokens.weight"] = table
    else:
        assert position is not None, "family gpt without ALiBi has a position table"
        state = dict(_gpt_body(config, body))
        state["transformer.wte.weight"] = table
        state["transformer.wpe.weight"] = position
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def dense_table(ids: np.ndarray, rows: Tensor, vocab_size: int) -> Tensor:
    """Table [V, h] with `rows` [v, h] at `ids` [v] and zeros where no row exists.

    A zero row's logit is 0 for any hidden state, so the absent ids must be suppressed in generation.
    """
    table = torch.zeros(vocab_size, rows.shape[1], dtype=rows.dtype)
    table[torch.from_numpy(ids)] = rows
    return table


def absent_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids of 0..V-1 that have no row, ascending int64."""
    present = np.zeros(vocab_size, dtype=bool)
    present[ids] = True
    return np.flatnonzero(~present)


def _gpt_body(config: ModelConfig, body: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"transformer.h.{layer}."
        for norm, name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            yield f"{theirs}{name}.weight", body[f"{ours}{norm}.weight"]
            yield f"{theirs}{name}.bias", body[f"{ours}{norm}.bias"]
        # GPT-2's Conv1D keeps [in, out], as our row-parallel weights do, and all queries, then all keys, all values.
        yield f"{theirs}attn.c_attn.weight", torch.cat(split_qkv(body[f"{ours}attention.qkv.weight"], config)).t()
        yield f"{theirs}attn.c_attn.bias", torch.cat(split_qkv(body[f"{ours}attention.qkv.bias"], config))
        yield f"{theirs}attn.c_proj.weight", body[f"{ours}attention.projection.weight"]
        yield f"{theirs}mlp.c_fc.weight", body[f"{ours}mlp.up.weight"].t()
        yield f"{theirs}mlp.c_proj.weight", body[f"{ours}mlp.down.weight"]
        linears = (("attention.projection", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj"))
        for linear, name in linears:
            yield f"{theirs}{name}.bias", body[f"{ours}{linear}.bias"]
    yield "transformer.ln_f.weight", body["final_norm.weight"]
    yield "transformer.ln_f.bias", body["final_norm.bias"]


def _llama_body(config: ModelConfig, body: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        yield f"{theirs}input_layernorm.weight", body[f"{ours}attention_norm.weight"]
        yield f"{theirs}post_attention_layernorm.weight", body[f"{ours}mlp_norm.weight"]
        qkv = split_qkv(body[f"{ours}attention.qkv.weight"], config)
        for name, rows in zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True):
            yield f"{theirs}self_attn.{name}.weight", rows
        yield f"{theirs}self_attn.o_proj.weight", body[f"{ours}attention.projection.weight"].t()
        for name in ("gate", "up"):
            yield f"{theirs}mlp.{name}_proj.weight", body[f"{ours}mlp.{name}.weight"]
        yield f"{theirs}mlp.down_proj.weight", body[f"{ours}mlp.down.weight"].t()
    yield "model.norm.weight", body["final_norm.weight"]
