"""Inner steps of a silo against plain torch in one process: accumulation, data ranks, one clip norm, skipped steps."""

import collections
import math

import numpy as np
import pytest
import torch

from tests.engine.conftest import Ran
from tests.engine.probes import ADAMW, CLIP, EMBEDDING_RATE, POISONS, RATE, SGD
from tests.engine.silo import Pieces, batch, share
from tests.engine.test_body_shards import TOLERANCE, assert_moved_alike, plain, whole
from tests.support.runs import largest_difference


def assert_summed_in_fp32(body_gradient: Pieces) -> None:
    """Nearly no sum of several bf16 numbers is itself a bf16 number."""
    for piece in map(torch.from_numpy, body_gradient.values()):
        assert len(piece) < 20 or (piece != piece.bfloat16().float()).float().mean() > 0.5


@pytest.mark.parametrize(("probe", "optimizer"), [("sgd", SGD), ("adamw", {**ADAMW, "clip_grad": CLIP})])
def test_several_steps_are_one_process_with_the_whole_batch(stepped: Ran, probe: str, optimizer: dict) -> None:
    """Losses, norms, every gradient and every parameter in three accumulated, parallel steps, body and embedding.

    Copies on other ranks are the same to the bit (`joined` and `joined_tables` say so), and so is what a step returns.
    """
    case, reports = stepped.case, stepped.of(probe)
    reference = plain(case, **optimizer)
    start = reference.state()
    tolerance = TOLERANCE[case.precision]
    for number in range(3):
        loss, norm = reference.step(batch(case, number), RATE, EMBEDDING_RATE)
        found = whole(case, [report["gradients"][number] for report in reports])
        # The reference has clipped its gradients in place.
        clip = case.config(**optimizer).optimizer.clip_grad
        coefficient = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        expected = {name: gradient / coefficient for name, gradient in reference.gradients().items()}
        assert largest_difference(found, expected) < tolerance
        for report in reports:
            assert report["losses"][number] == pytest.approx(loss, rel=tolerance)
            assert report["norms"][number] == pytest.approx(norm, rel=tolerance)
            if case.precision == "bf16":
                assert_summed_in_fp32(report["gradients"][number][0])
    assert_moved_alike(case, start, whole(case, [report["state"] for report in reports]), reference.state())
    assert all(report["losses"] == reports[0]["losses"] for report in reports)
    assert all(report["norms"] == reports[0]["norms"] for report in reports)
    for rank, report in enumerate(reports):
        mine = share(case, 9, rank // case.tensor)[0]
        with torch.no_grad():
            losses = reference.token_losses(mine[:, :-1], mine[:, 1:]).numpy()
        assert np.linalg.norm(report["token losses"] - losses) < tolerance * np.linalg.norm(losses)


def test_one_clip_norm_over_body_and_embedding(ran: Ran) -> None:
    """torch.nn.utils.clip_grad_norm_ over all parameters in one process; clipping by parts moves them otherwise."""
    case, reports = ran.case, ran.of("clipped")
    reference = plain(case, **SGD, clip_grad=CLIP)
    start = reference.state()
    norms = [reference.step(batch(case, number), 10 * RATE, 10 * EMBEDDING_RATE)[1] for number in range(2)]
    assert min(norms) > 2 * CLIP, "the clip must bite"
    by_part = plain(case, **SGD)
    by_part.backward(batch(case, 0))
    parts = [list(by_part.body.parameters()), by_part.embedding_parameters()]
    shares = [float(torch.nn.utils.get_total_norm([p.grad for p in part])) / norms[0] for part in parts]
    assert max(shares) < 0.99, "both parts must weigh in the norm"
    for report in reports:
        assert report["norms"] == pytest.approx(norms, rel=TOLERANCE[case.precision])
    assert_moved_alike(case, start, whole(case, [report["state"] for report in reports]), reference.state())


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
    assert ran.of("asked to stop") == [{"stops": [False, True], "without": False}] * ran.case.shape.size


def test_the_activation_norm_is_the_silos_and_only_where_asked_for(ran: Ran) -> None:
    """The mean over data ranks of their last micro-batches; no step has moved anything after the first."""
    case, reports = ran.case, ran.of("traced")
    reference = plain(case, **ADAMW)
    reference.step(batch(case, 0), RATE)
    last = torch.cat([share(case, 0, rank)[-1] for rank in range(case.data)])
    with torch.no_grad():
        expected = float(reference.hidden(last[:, :-1]).float().norm(dim=-1).mean())
    for report in reports:
        assert report["activation norms"] == [None, pytest.approx(expected, rel=TOLERANCE[case.precision])]
    assert len({report["activation norms"][1] for report in reports}) == 1


def test_what_a_step_sends_stays_in_its_group(ran: Ran) -> None:
    """The body's gradients and parameters among a tensor rank's data ranks, from DeepSpeed's start-up on; activations
    among a data rank's tensor ranks. Two messages go over the whole silo: the norm, and what a step agrees on."""
    data, tensor = ran.case.data, ran.case.tensor
    for rank, report in enumerate(ran.of("traced")):
        own = {
            "data": tuple(range(rank % tensor, data * tensor, tensor)),
            "tensor": tuple(range(rank // tensor * tensor, rank // tensor * tensor + tensor)),
        }
        groups = {"gradient": own["data"], "parameter": own["data"], "activation": own["tensor"]}
        for entry in report["began"] + report["trained"]:
            assert entry.scope == "silo"
            assert entry.kind == "control" or entry.members == groups[entry.kind], entry
        seen = {entry.kind for entry in report["trained"]}
        assert ("gradient" in seen) == (data > 1) and ("activation" in seen) == (tensor > 1)
        assert ("parameter" in seen) == (data > 1 and ran.case.stage > 0)
        control = collections.Counter(entry.operation for entry in report["trained"] if entry.kind == "control")
        # ZeRO-3 looks in its first forwards, over the whole silo, whether all ranks run the same layers.
        assert (control.pop("broadcast", 0) > 0) == (ran.case.stage == 3 and ran.case.shape.size > 1)
        assert control == ({"all_reduce_sum": 2} if ran.case.shape.size > 1 else {})
