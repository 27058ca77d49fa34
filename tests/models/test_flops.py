"""Closed forms against what is built and against the paper's sizes."""

import pytest

from megatron_dept.config.presets import PRESETS
from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.build import build_body
from megatron_dept.models.flops import body_parameters, flops_per_token


def test_body_parameters_are_those_built(config):
    assert body_parameters(config) == sum(parameter.numel() for parameter in build_body(config, 1).parameters())


@pytest.mark.parametrize(("preset", "paper"), [("dept-125m", 86.4e6), ("dept-350m", 298e6), ("dept-1.3b", 1.2e9)])
def test_presets_are_of_the_papers_sizes(preset, paper):
    # The paper rounds, and does not say whether its position table is counted in the body.
    assert body_parameters(ModelConfig.model_validate(PRESETS[preset])) == pytest.approx(paper, rel=0.02)


def test_flops_by_hand():
    config = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, ffn_hidden_size=12, seq_length=5)
    matrices = 2 * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 12)
    assert flops_per_token(config, vocabulary=100) == 6 * (matrices + 100 * 8) + 12 * 2 * 8 * 5


def test_grouped_queries_and_swiglu_by_hand():
    config = ModelConfig(
        family="llama",
        num_layers=1,
        hidden_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        ffn_hidden_size=12,
        seq_length=5,
    )
    matrices = (8 + 4 + 4) * 8 + 8 * 8 + 3 * 8 * 12
    assert flops_per_token(config, vocabulary=100) == 6 * (matrices + 100 * 8) + 12 * 8 * 5
    assert body_parameters(config) == matrices + 3 * 8
