"""Inner steps of a silo against plain torch in one process: accumulation, data ranks, one clip norm, skipped steps."""

import math

import pytest
import torch

from tests.engine.conftest import Ran
from tests.engine.probes import ADAMW, CLIP, EMBEDDING_RATE, POISONS, RATE, SGD
from tests.engine.silo import batch, joined
from tests.engine.test_body_shards import BF16, FP32, assert_moved_alike, plain


def states(ran: Ran, probe: str) -> list[dict[str, torch.Tensor]]:
    """Per rank: the silo's whole body and this rank's embedding."""
    body = joined(ran.layout.config(), [report["state"][0] for report in ran.of(probe)])
    return [
        body | {name: torch.from_numpy(table) for name, table in report["state"][1].items()} for report in ran.of(probe)
    ]


@pytest.mark.parametrize(("probe", "optimizer"), [("sgd", SGD), ("adamw", {**ADAMW, "clip_grad": CLIP})])
def test_several_steps_are_one_process_with_the_whole_batch(ran: Ran, probe: str, optimizer: dict) -> None:
    """Losses, norms and every parameter after three accumulated, data-parallel steps, body and embedding."""
    reference = plain(ran, **optimizer)
    start = reference.state()
    expected = [reference.step(batch(number), RATE, EMBEDDING_RATE) for number in range(3)]
    tolerance = FP32 if ran.layout.precision == "fp32" else BF16
    for report, state in zip(ran.of(probe), states(ran, probe), strict=True):
        assert report["losses"] == pytest.approx([loss for loss, _ in expected], rel=tolerance)
        assert report["norms"] == pytest.approx([norm for _, norm in expected], rel=tolerance)
        assert_moved_alike(ran, start, state, reference.state())


def test_one_clip_norm_over_body_and_embedding(ran: Ran) -> None:
    """torch.nn.utils.clip_grad_norm_ over all parameters in one process; clipping by parts moves them otherwise."""
    reference = plain(ran, **SGD, clip_grad=CLIP)
    start = reference.state()
    norms = [reference.step(batch(number), 10 * RATE, 10 * EMBEDDING_RATE)[1] for number in range(2)]
    assert min(norms) > 2 * CLIP, "the clip must bite"
    by_part = plain(ran, **SGD)
    by_part.backward(batch(0))
    parts = [list(by_part.body.parameters()), by_part.embedding_parameters()]
    shares = [float(torch.nn.utils.get_total_norm([p.grad for p in part])) / norms[0] for part in parts]
    assert max(shares) < 0.98, "both parts must weigh in the norm"
    for report, state in zip(ran.of("clipped"), states(ran, "clipped"), strict=True):
        assert report["norms"] == pytest.approx(norms, rel=FP32 if ran.layout.precision == "fp32" else BF16)
        assert_moved_alike(ran, start, state, reference.state())


@pytest.mark.parametrize("where", POISONS)
def test_a_gradient_that_is_not_finite_moves_nothing(ran: Ran, where: str) -> None:
    """The step is skipped on every rank, whichever rank and part the bad gradient was in; the next is as if without."""
    for report in ran.of("poisoned"):
        seen = report[where]
        assert seen["skipped"] == (True, False)
        assert not math.isfinite(seen["norm"])
        assert seen["after"] == seen["before"]
        assert seen["next"] == report["never"]["next"]


def test_a_rank_asked_to_stop_tells_its_silo_in_the_same_step(ran: Ran) -> None:
    assert ran.of("asked to stop") == [{"stops": [False, True], "without": False}] * ran.layout.ranks


def test_data_ranks_hold_one_embedding(ran: Ran) -> None:
    """Replicas stay equal to the bit, so any of them may speak for the silo."""
    for probe in ("sgd", "adamw", "clipped"):
        first = ran.of(probe)[0]["state"][1]
        for report in ran.of(probe):
            assert all((report["state"][1][name] == table).all() for name, table in first.items())
