"""A tokenizer and small trained-looking models to export."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_dept.config.schema import ModelConfig
from megatron_dept.export.huggingface import TrainedModel
from megatron_dept.models.build import build_body
from megatron_dept.models.initialise import init_rows
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.load import load_tokenizer
from megatron_dept.tokenizers.train import train_sentencepiece

TEXTS = [
    "the river runs to the sea and the sea is wide",
    "il fiume va al mare e il mare è grande",
    "река течёт к морю, и море широко",
]
FAMILIES: dict[str, dict[str, object]] = {
    "gpt": {"family": "gpt", "init_std": 0.2},
    "llama": {"family": "llama", "num_key_value_heads": 2, "init_std": 0.2},
}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(train_sentencepiece(TEXTS, 320, "bpe"))
    return load_tokenizer(file)


@pytest.fixture(scope="session")
def make_model(tokenizer) -> Callable[..., TrainedModel]:
    """make_model(family, ids=all): a model whose logits are far from 0, with rows for `ids` only."""

    def make(family: str = "gpt", ids: np.ndarray | None = None) -> TrainedModel:
        config = ModelConfig.model_validate(
            {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "seq_length": 24,
                "ffn_hidden_size": 56,
                **FAMILIES[family],
            }
        )
        if ids is None:
            ids = np.arange(tokenizer.vocab_size, dtype=np.int64)
        rows = init_rows(0, tokenizer.vocab_size, 32, 0.5, "token")[torch.from_numpy(ids)]
        position = init_rows(0, 24, 32, 0.5, "position") if config.has_position_table else None
        body = {name: parameter.detach() for name, parameter in build_body(config, seed=1).named_parameters()}
        return TrainedModel(config, body, ids, rows, position, tokenizer)

    return make


@pytest.fixture(scope="session")
def kept_ids(tokenizer) -> np.ndarray:
    """What a source's vocabulary keeps: all bytes, all specials, and the ids of one text."""
    used = np.array(tokenizer.encode(TEXTS[0]), dtype=np.int64)
    return np.unique(np.concatenate([tokenizer.byte_ids, tokenizer.special_ids, used]))
