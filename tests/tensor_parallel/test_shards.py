"""What a parameter says of its shard: runs by hand, values taken, and marks that DeepSpeed reads."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.attention import Attention
from megatron_dept.models.parts import BodyPart
from megatron_dept.tensor_parallel.group import ALONE
from megatron_dept.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_dept.tensor_parallel.shards import (
    ParameterShard,
    Rows,
    Run,
    cut_by_rows,
    mark,
    replicated,
    shard_of,
    take,
)


@dataclass(frozen=True)
class Place:
    """A rank of a group that is never asked for anything."""

    rank: int
    size: int


def test_an_unmarked_parameter_is_whole_and_primary():
    assert shard_of(nn.Parameter(torch.zeros(3, 4))) == ParameterShard((3, 4), (Run(0, 0, 12, True),))


def test_column_parallel_rows_by_hand():
    layer = ColumnParallelLinear(5, 12, True, Place(1, 4))
    assert layer.weight.shape == (3, 5) and layer.bias.shape == (3,)
    assert shard_of(layer.weight) == ParameterShard((12, 5), (Run(0, 15, 15, True),))
    assert shard_of(layer.bias) == ParameterShard((12,), (Run(0, 3, 3, True),))


def test_row_parallel_weight_is_input_major_and_its_bias_is_a_copy():
    layer = RowParallelLinear(12, 5, True, Place(2, 4))
    assert layer.weight.shape == (3, 5) and layer.bias.shape == (5,)
    assert shard_of(layer.weight) == ParameterShard((12, 5), (Run(0, 30, 15, True),))
    assert shard_of(layer.bias) == ParameterShard((5,), (Run(0, 0, 5, False),))


def test_row_parallel_is_x_times_weight_plus_bias():
    layer = RowParallelLinear(4, 3, True)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    hidden = torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(hidden), hidden @ layer.weight + layer.bias)


def test_only_what_is_cut_is_marked_for_deepspeed():
    column, row = ColumnParallelLinear(4, 4, True, Place(0, 2)), RowParallelLinear(4, 4, True, Place(0, 2))
    for parameter in (column.weight, column.bias, row.weight):
        assert parameter.tensor_model_parallel and parameter.model_parallel
    alone = ColumnParallelLinear(4, 4, True, ALONE)
    for parameter in (row.bias, alone.weight, alone.bias):
        assert not hasattr(parameter, "tensor_model_parallel") and not hasattr(parameter, "model_parallel")


@pytest.mark.parametrize("make", [ColumnParallelLinear, RowParallelLinear])
def test_what_does_not_divide_is_refused(make):
    with pytest.raises(ValueError, match="6 rows cannot be cut evenly over 4 tensor ranks"):
        make(6, 6, False, Place(0, 4))


def test_grouped_queries_by_hand():
    """Eight heads of size 2, two groups of [4 queries, key, value], four ranks: two share each group."""
    config = ModelConfig(
        family="llama", num_layers=1, hidden_size=16, num_attention_heads=8, num_key_value_heads=2, ffn_hidden_size=8
    )
    row = 16
    expected = [
        (Run(0, 0, 4 * row, True), Run(4 * row, 8 * row, 4 * row, True)),
        # Neighbours, but not both primary: two runs.
        (Run(0, 4 * row, 4 * row, True), Run(4 * row, 8 * row, 4 * row, False)),
        (Run(0, 12 * row, 4 * row, True), Run(4 * row, 20 * row, 4 * row, True)),
        (Run(0, 16 * row, 4 * row, True), Run(4 * row, 20 * row, 4 * row, False)),
    ]
    for rank, runs in enumerate(expected):
        attention = Attention(config, BodyPart(Place(rank, 4)))
        assert shard_of(attention.qkv.weight) == ParameterShard((24, 16), runs)
        assert attention.qkv.weight.shape == (8, 16)
    whole_groups = Attention(config, BodyPart(Place(1, 2)))
    assert shard_of(whole_groups.qkv.weight) == ParameterShard((24, 16), (Run(0, 12 * row, 12 * row, True),))


def test_adjacent_rows_merge_and_empty_ones_vanish():
    rows = (Rows(2, 4), Rows(4, 4), Rows(4, 5), Rows(7, 8))
    assert cut_by_rows((9, 3), rows).runs == (Run(0, 6, 9, True), Run(9, 21, 3, True))


@pytest.mark.parametrize("shape", [(9,), (9, 2), (9, 2, 3)])
def test_take_gives_the_rows_in_their_order(shape):
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    shard = cut_by_rows(shape, (Rows(6, 8), Rows(1, 2, primary=False)))
    assert torch.equal(take(whole, shard), whole[[6, 7, 1]])
    assert torch.equal(take(whole, replicated(shape, Place(1, 2))), whole)


def test_a_mark_of_another_shape_is_a_bug():
    with pytest.raises(AssertionError):
        mark(nn.Parameter(torch.zeros(4, 3)), cut_by_rows((9, 3), (Rows(0, 3),)))


def test_marks_stay_through_a_cast():
    layer = ColumnParallelLinear(4, 4, False, Place(1, 2))
    layer.to(torch.bfloat16)
    assert shard_of(layer.weight).runs == (Run(0, 8, 8, True),) and layer.weight.model_parallel


@pytest.mark.parametrize(
    ("heads", "groups", "ffn", "ranks", "message"),
    [
        (6, 6, 8, 4, "num_attention_heads 6 is not divisible by 4 tensor ranks"),
        (8, 8, 6, 4, "ffn_hidden_size 6 is not divisible by 4 tensor ranks"),
        (12, 6, 8, 4, "num_key_value_heads 6 is neither a multiple nor a divisor of 4 tensor ranks"),
    ],
)
def test_bodies_that_cannot_be_cut_are_refused(heads, groups, ffn, ranks, message):
    config = ModelConfig(
        family="llama",
        num_layers=1,
        hidden_size=48,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        ffn_hidden_size=ffn,
    )
    with pytest.raises(ValueError, match=message):
        BodyPart(Place(0, ranks)).check(config)


def test_every_legal_cut_passes():
    for groups, ranks in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        config = ModelConfig(
            family="llama", num_layers=1, hidden_size=16, num_attention_heads=8, num_key_value_heads=groups
        )
        BodyPart(Place(ranks - 1, ranks)).check(config)
