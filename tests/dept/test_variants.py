"""The table of variants says what the paper's algorithm 1 and its baselines say."""

import dataclasses
from typing import get_args

import pytest

from megatron_dept.config.schema import Variant
from megatron_dept.dept.variants import VARIANTS

# variant: vocabulary, token rows, position rows, averages body, synchronous, resets embedding
PAPER = {
    "glob": ("global", "shared", "shared", True, False, False),
    "trim": ("trimmed", "shared", "shared", True, False, False),
    "spec": ("trimmed", "local", "local", True, False, False),
    "spec_opt": ("own", "local", "local", True, False, False),
    "std": ("global", "resident", "resident", False, True, False),
    "act": ("global", "resident", "resident", False, True, True),
}


def test_each_rule_is_the_papers():
    assert {name: dataclasses.astuple(rule) for name, rule in VARIANTS.items()} == PAPER


def test_every_variant_a_configuration_may_name_has_a_rule():
    assert set(get_args(Variant)) == set(VARIANTS)


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        VARIANTS["glob"] = VARIANTS["std"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["glob"].synchronous = True
