"""The same model on 2 and 4 tensor ranks as on one: values, every gradient, and who holds what."""

import functools
import pickle
import re
from typing import Any

import pytest
import torch

from megatron_dept.models.build import body_shapes
from megatron_dept.tensor_parallel.group import ALONE
from tests.support.distributed import run_ranks
from tests.tensor_parallel.case import CASES, Case, Result, compute, join, whole_sequence
from tests.tensor_parallel.world import every_case

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Relative L2 per tensor. fp32: sums of the same terms in another order, through two layers, differ by about 1e-6.
bf16: 2^-9 a rounding, over some dozen roundings that fall elsewhere where sums are cut."""


@functools.cache
def alone(case: Case) -> Result:
    """The case on one rank, in this process."""
    return compute(case.function, ALONE)


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def world(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What every rank saw."""
    return [pickle.loads(seen) for seen in run_ranks(request.param, every_case)]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def results(world: list[dict[str, Any]], case: Case) -> list[Result]:
    return [seen[str(case)] for seen in world]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; NaN, which fails every comparison, where an element was not found."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_values_are_those_of_one_rank(case: Case, results: list[Result]) -> None:
    expected, tolerance = alone(case), TOLERANCE[case.dtype]
    for name in ("embedded", "hidden", "embedded_gradient"):
        for found in whole_sequence(case, results, name):
            assert found.dtype == case.dtype
            # One row and one position are added whatever the ranks: the embedded tokens are the same bits.
            assert distance(found, getattr(expected, name)) <= (0 if name == "embedded" else tolerance), name
    for result in results:
        assert result.loss == pytest.approx(expected.loss, rel=tolerance)
        assert result.loss == results[0].loss
        assert distance(result.token_losses, expected.token_losses) < tolerance


def test_every_gradient_is_that_of_one_rank(case: Case, results: list[Result]) -> None:
    expected = alone(case)
    names = set().union(*(result.gradients for result in results))
    assert names == set(expected.gradients)
    far = {name: distance(join(results, "gradients", name), expected.gradients[name]) for name in names}
    assert all(value < TOLERANCE[case.dtype] for value in far.values()), far


def test_copies_have_the_same_bits(case: Case, results: list[Result]) -> None:
    copies = 0
    for name in results[0].runs:
        whole = join(results, "gradients", name)
        for result in results:
            for run in result.runs.get(name, ()):
                if not run.primary:
                    copies += 1
                    mine = result.gradients[name][run.local : run.local + run.count]
                    assert torch.equal(mine, whole[run.start : run.start + run.count]), (name, run)
    assert copies >= 5 * (len(results) - 1), "four norms and the last one, at least"


def test_first_values_are_those_of_one_rank(case: Case, results: list[Result]) -> None:
    for name, expected in alone(case).initial.items():
        assert torch.equal(join(results, "initial", name), expected), name


def test_every_element_has_one_primary_holder_and_every_local_one_a_run(case: Case, results: list[Result]) -> None:
    whole_shapes = body_shapes(case.config)
    for name, expected in alone(case).gradients.items():
        counts = torch.zeros(len(expected), dtype=torch.int64)
        for result in results:
            at = 0
            for run in result.runs.get(name, ()):
                assert run.local == at and run.count > 0
                at += run.count
                counts[run.start : run.start + run.count] += run.primary
            assert at == len(result.gradients.get(name, ()))
            assert name not in whole_shapes or result.shapes[name] == whole_shapes[name]
        assert (counts == 1).all(), name


def test_traffic_is_charged_as_activations(world: list[dict[str, Any]]) -> None:
    for seen in world:
        assert set(seen["kinds"]) == {"silo/activation"} and seen["kinds"]["silo/activation"] > 0


def test_mappings_and_their_gradients(world: list[dict[str, Any]]) -> None:
    """Rank r's numbers are multiples of 10^r, so that a sum tells who took part."""
    ranks = len(world)
    total = float(sum(10**rank for rank in range(ranks)))
    columns = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    whole = torch.arange(4.0 * ranks).view(2, 2 * ranks)
    for rank, seen in enumerate(world):
        found, mine, part = seen["mappings"], 10.0**rank, slice(2 * rank, 2 * rank + 2)
        assert (found["copy"] == mine).all() and (found["copy gradient"] == total).all()
        assert (found["copy's neighbour"] == mine).all(), "a gradient that autograd shares is not overwritten"
        assert (found["reduce"] == total).all() and (found["reduce gradient"] == mine).all()
        assert torch.equal(found["gather"][..., 0], torch.cat([columns * 10.0**other for other in range(ranks)], dim=1))
        assert torch.equal(found["gather gradient"][..., 0], whole[:, part] * total)
        assert torch.equal(found["scatter"][..., 0], whole[:, part] * total)
        assert torch.equal(found["scatter gradient"], found["gather"])
        assert torch.equal(found["sum"], total * torch.arange(8.0))
        partners = 10.0 ** (rank // 2 * 2) * 11
        assert found["copied rows"].tolist() == [[mine, mine]] * 2 + [[partners, partners]] * 3


@pytest.mark.parametrize("split", [False, True])
def test_the_loss_says_little_and_once_a_chunk(world: list[dict[str, Any]], split: bool) -> None:
    """16 tokens in chunks of 5: a maximum and two sums a token each, then the states' gradient, once."""
    chunks = [call for size in (5, 5, 5, 1) for call in (("max", size), ("sum", 2 * size))]
    states = 16 * 6
    for seen in world:
        if split:
            expected = [("gather", states // len(world)), *chunks, ("scatter", states)]
        else:
            expected = [*chunks, ("sum", states)]
        assert seen["collectives of the loss"][split] == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("id 13", "out of range"),
        ("id -1", "out of range"),
        ("target 13", "out of bounds"),
        ("target -1", "out of bounds"),
        ("odd sequence", "tokens cannot be split over . tensor ranks"),
    ],
)
def test_what_is_outside_is_refused_on_every_rank(world: list[dict[str, Any]], name: str, message: str) -> None:
    for seen in world:
        assert re.search(message, seen["refused"][name])
