"""Stages: the best cut there is, against every cut; and parts of a body that make up the whole."""

import itertools

import pytest
import torch

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.build import body_shapes, build_body
from megatron_dept.models.flops import flops_per_token
from megatron_dept.models.parts import BodyPart
from megatron_dept.models.pipeline import stage_layers


def model(layers: int) -> ModelConfig:
    return ModelConfig(num_layers=layers, hidden_size=16, num_attention_heads=2, seq_length=8)


def largest_stage(config: ModelConfig, counts: list[int], vocabulary: int) -> int:
    """Operations of the largest stage, by the count of a model of as many layers as the stage has."""
    loads = []
    for stage, count in enumerate(counts):
        rows = vocabulary if stage == len(counts) - 1 else 0
        # A model has at least one layer: a stage of none is the head alone.
        one, two = (flops_per_token(config.model_copy(update={"num_layers": n}), rows) for n in (1, 2))
        loads.append(one + (count - 1) * (two - one))
    return max(loads)


@pytest.mark.parametrize("vocabulary", [1, 97, 400, 2000, 20_000])
@pytest.mark.parametrize(("layers", "stages"), [(1, 1), (1, 2), (5, 1), (4, 2), (7, 2), (5, 3), (8, 4), (3, 4), (9, 4)])
def test_no_cut_has_a_smaller_largest_stage(layers, stages, vocabulary):
    config = model(layers)
    found = stage_layers(config, stages, vocabulary)
    assert [layer for stage in found for layer in stage] == list(range(layers)) and len(found) == stages
    counts = [len(stage) for stage in found]
    assert all(counts[:-1])
    every = [
        cut
        for cut in itertools.product(range(layers + 1), repeat=stages)
        if sum(cut) == layers and all(cut[:-1]) and (stages > 1 or cut[0] == layers)
    ]
    assert largest_stage(config, counts, vocabulary) == min(largest_stage(config, list(c), vocabulary) for c in every)


def test_cuts_by_hand():
    """A layer costs 6 x 12 x 16^2 + 12 x 16 x 8 = 19,968, a row of the head 96: 208 rows are one layer."""
    assert stage_layers(model(8), 4, 1) == (range(0, 2), range(2, 4), range(4, 6), range(6, 8))
    assert stage_layers(model(8), 4, 416) == (range(0, 2), range(2, 5), range(5, 8), range(8, 8))
    assert stage_layers(model(8), 2, 2 * 208) == (range(0, 5), range(5, 8))
    assert stage_layers(model(4), 2, 100 * 208) == (range(0, 4), range(4, 4)), "the head alone is the largest stage"


def test_more_stages_than_layers_are_refused():
    assert [len(stage) for stage in stage_layers(model(3), 4, 97)] == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="3 layers cannot be cut into 5 pipeline stages.*use 1 to 4 stages"):
        stage_layers(model(3), 5, 97)
    with pytest.raises(ValueError, match="0 pipeline stages"):
        stage_layers(model(3), 0, 97)


@pytest.mark.parametrize("recompute", [False, True])
def test_parts_one_after_another_are_the_whole(config, recompute):
    whole = build_body(config, seed=5)
    parts = [
        build_body(config, 5, recompute, BodyPart(layers=range(0, 1), final_norm=False)),
        build_body(config, 5, recompute, BodyPart(layers=range(1, 2), final_norm=False)),
        build_body(config, 5, recompute, BodyPart(layers=range(2, 2))),
    ]
    hidden = torch.randn(2, 6, config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = whole(hidden)
    found = hidden
    for part in parts:
        found = part(found)
    assert torch.equal(found, expected)  # the same kernels on the same numbers
    expected.sum().backward()
    found.sum().backward()
    named = [item for part in parts for item in part.named_parameters()]
    assert [name for name, _ in named] == list(body_shapes(config))
    for (name, parameter), (_, wanted) in zip(named, whole.named_parameters(), strict=True):
        assert torch.equal(parameter, wanted) and torch.equal(parameter.grad, wanted.grad), name


def test_a_part_of_nothing_passes_on_what_it_gets(config):
    part = build_body(config, 5, part=BodyPart(layers=range(0), final_norm=False))
    hidden = torch.randn(1, 3, config.hidden_size)
    assert part(hidden) is hidden and not list(part.parameters())


def test_layers_that_are_not_there_are_refused(config):
    with pytest.raises(ValueError, match=r"range\(1, 3\) are not layers of a body of 2"):
        build_body(config, 5, part=BodyPart(layers=range(1, 3)))
