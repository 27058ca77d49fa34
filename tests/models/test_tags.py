"""Every parameter says who owns it."""

import copy

import pytest
import torch
from torch import nn

from megatron_dept.models.tags import check_tagged, owner, tag


def test_owner_is_what_was_tagged_and_survives_a_cast():
    linear = nn.Linear(3, 2)
    tag(linear.weight, "body")
    tag(linear.bias, "embedding")
    linear.to(torch.bfloat16)
    assert owner(linear.weight) == "body"
    assert owner(linear.bias) == "embedding"
    check_tagged(linear)


def test_untagged_parameters_are_named():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    for parameter in module[0].parameters():
        tag(parameter, "body")
    with pytest.raises(ValueError, match=r"1\.weight, 1\.bias"):
        check_tagged(module)
    with pytest.raises(ValueError, match="no owner"):
        owner(module[1].weight)


def test_a_foreign_owner_is_named():
    linear = nn.Linear(3, 2, bias=False)
    tag(linear.weight, "embedding")
    with pytest.raises(ValueError, match="not the body's: weight"):
        check_tagged(linear, "body")


def test_unknown_owner_is_refused():
    with pytest.raises(ValueError, match="'head'"):
        tag(nn.Parameter(torch.zeros(1)), "head")  # type: ignore[arg-type]


def test_a_copy_that_lost_its_tags_is_found():
    linear = nn.Linear(3, 2, bias=False)
    tag(linear.weight, "body")
    with pytest.raises(ValueError, match="without an owner: weight"):
        check_tagged(copy.deepcopy(linear))
