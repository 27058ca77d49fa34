"""Small configurations of each kind of body."""

from collections.abc import Callable

import pytest
import torch

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.build import build_body
from megatron_dept.models.transformer import Transformer

KINDS: dict[str, dict[str, object]] = {
    "gpt": {"family": "gpt"},
    "gpt-alibi": {"family": "gpt", "position_embedding": "alibi", "num_attention_heads": 6},
    "llama": {"family": "llama"},
    "llama-gqa": {"family": "llama", "num_key_value_heads": 2, "rope_theta": 500.0},
}


def _config(kind: str = "gpt", **changes: object) -> ModelConfig:
    # Sizes are all different, so that a swapped axis shows.
    sizes = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "seq_length": 16, "ffn_hidden_size": 80}
    return ModelConfig.model_validate({**sizes, **KINDS[kind], **changes})


@pytest.fixture
def make_config() -> Callable[..., ModelConfig]:
    """make_config(kind, **fields): a body of two layers."""
    return _config


@pytest.fixture(params=list(KINDS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Each kind in turn."""
    return _config(request.param)


@pytest.fixture
def randomised() -> Callable[[ModelConfig], Transformer]:
    """randomised(config): a body whose biases and norms have random values too, so that none is forgotten unseen."""

    def make(config: ModelConfig) -> Transformer:
        body = build_body(config, seed=1)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in body.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return body

    return make
