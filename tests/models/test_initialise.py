"""First values are pure functions of (seed, name), with GPT-2's spreads."""

import math

import pytest
import torch

from megatron_dept.models.build import build_body
from megatron_dept.models.initialise import ROWS_PER_BLOCK, init_rows, initialise_body


def test_same_seed_same_body_whatever_the_global_random_state(config):
    torch.manual_seed(1)
    first = build_body(config, seed=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_body(config, seed=7)
    assert torch.equal(torch.get_rng_state(), state), "building draws nothing from the global generator"
    for (name, left), (_, right) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_other_seed_or_name_other_values(make_config):
    first, second = (dict(build_body(make_config(), seed).named_parameters()) for seed in (7, 8))
    assert not torch.equal(first["layers.0.mlp.up.weight"], second["layers.0.mlp.up.weight"])
    assert not torch.equal(first["layers.0.mlp.up.weight"], first["layers.1.mlp.up.weight"])


def test_a_deeper_body_has_the_same_first_layers(make_config):
    shallow, deep = (dict(build_body(make_config(num_layers=n), 7).named_parameters()) for n in (2, 3))
    assert torch.equal(shallow["layers.1.attention.qkv.weight"], deep["layers.1.attention.qkv.weight"])


def test_a_part_of_a_body_is_initialised_as_in_the_whole(make_config):
    config = make_config()
    whole = build_body(config, seed=7)
    part = build_body(config, seed=8).layers["1"]
    initialise_body(part, config, seed=7, prefix="layers.1.")
    for (name, left), right in zip(part.named_parameters(), whole.layers["1"].parameters(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_spreads_biases_and_norms(kind, make_config):
    config = make_config(kind, num_layers=8, hidden_size=256, ffn_hidden_size=512, init_std=0.05)
    residual = 0.05 / math.sqrt(16)
    for name, parameter in build_body(config, seed=7).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = residual if name.endswith(("projection.weight", "down.weight")) else 0.05
            # The estimate over at least 65,536 numbers is within 1 % at 3.6 standard deviations.
            assert parameter.std().item() == pytest.approx(expected, rel=0.01), name
            assert abs(parameter.mean().item()) < 0.01 * 0.05 * 2, name


def test_rows_of_any_range_equal_the_whole_tables():
    stop = 3 * ROWS_PER_BLOCK + 17
    whole = init_rows(0, stop, 6, 0.02, 1, "token")
    assert whole.shape == (stop, 6) and whole.dtype == torch.float32
    ranges = [
        (0, 1),
        (5, 5),
        (ROWS_PER_BLOCK - 1, ROWS_PER_BLOCK + 1),
        (ROWS_PER_BLOCK, 2 * ROWS_PER_BLOCK),
        (7, stop - 3),
    ]
    for start, end in ranges:
        assert torch.equal(init_rows(start, end, 6, 0.02, 1, "token"), whole[start:end])


def test_rows_have_the_spread_and_are_all_different():
    rows = init_rows(0, 2 * ROWS_PER_BLOCK, 32, 0.02, 1, "token")
    assert rows.std().item() == pytest.approx(0.02, rel=0.02)  # 65,536 numbers: 0.3 % is one standard deviation
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert not torch.equal(rows, init_rows(0, 2 * ROWS_PER_BLOCK, 32, 0.02, 1, "position"))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3)])
def test_no_range_is_refused(start, stop):
    with pytest.raises(ValueError, match="no range"):
        init_rows(start, stop, 4, 0.02, 1)
