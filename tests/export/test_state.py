"""Tables with absent rows, and what has no stock architecture."""

import numpy as np
import pytest
import torch

from megatron_dept.common.errors import UserError
from megatron_dept.config.schema import ModelConfig
from megatron_dept.export.settings import generation_config, transformers_config
from megatron_dept.export.state import absent_ids, dense_table, to_transformers_state


def test_dense_table_has_rows_at_their_ids_and_zeros_elsewhere():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    table = dense_table(np.array([1, 4]), rows, vocab_size=6)
    assert table.tolist() == [[0, 0], [1, 2], [0, 0], [0, 0], [3, 4], [0, 0]]


def test_absent_ids_are_all_the_others():
    assert absent_ids(np.array([1, 4]), 6).tolist() == [0, 2, 3, 5]
    assert absent_ids(np.arange(6), 6).tolist() == []


def test_alibi_is_refused():
    config = ModelConfig(position_embedding="alibi")
    for refused in (
        lambda: to_transformers_state(config, {}, torch.zeros(1, 1), None),
        lambda: transformers_config(config, 9, 2),
    ):
        with pytest.raises(UserError, match="alibi cannot be exported.*learned positions or family llama"):
            refused()


def test_generation_config_suppresses_only_where_something_is_absent():
    assert generation_config(2, []).suppress_tokens is None
    found = generation_config(2, np.array([5, 9]))
    assert found.suppress_tokens == [5, 9] and found.eos_token_id == 2 and found.pad_token_id == 2


def test_queries_keys_and_values_are_told_apart():
    """Megatron's order (a key-value head's queries, its key, its value) becomes all queries, all keys, all values."""
    config = ModelConfig(
        family="llama", num_layers=1, hidden_size=8, num_attention_heads=4, num_key_value_heads=2, ffn_hidden_size=8
    )
    rows = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]  # each two rows: the head size
    value = {name: float(index) for index, name in enumerate(rows)}
    body = {
        "layers.0.attention.qkv.weight": torch.tensor([value[name] for name in rows])
        .repeat_interleave(2)[:, None]
        .expand(16, 8),
        "final_norm.weight": torch.ones(8),
        "layers.0.attention.projection.weight": torch.zeros(8, 8),
    }
    body |= {f"layers.0.{norm}.weight": torch.ones(8) for norm in ("attention_norm", "mlp_norm")}
    body |= {f"layers.0.mlp.{name}.weight": torch.zeros(8, 8) for name in ("gate", "up", "down")}
    state = to_transformers_state(config, body, torch.zeros(5, 8), None)
    for letter, heads in (("q", 4), ("k", 2), ("v", 2)):
        found = state[f"model.layers.0.self_attn.{letter}_proj.weight"][::2, 0].tolist()
        assert found == [value[f"{letter}{head}"] for head in range(heads)]
