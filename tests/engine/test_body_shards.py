"""A rank's fp32 partition in every ZeRO stage: named once, read, written, and what the next step starts from."""

import numpy as np
import pytest
import torch

from tests.engine.cases import Case
from tests.engine.conftest import Ran
from tests.engine.plain import Plain
from tests.engine.probes import ADAMW, EMBEDDING_RATE, RATE, SGD
from tests.engine.silo import Arrays, Pieces, another_body, batch, joined, joined_tables, share, tables
from tests.support.runs import largest_difference

FP32 = 1e-5
"""Relative L2 per tensor: fp32 sums of some hundred terms in another order differ by about 1e-6."""
BF16 = 0.05
"""Of a gradient: 8 bits through some ten roundings, with more noise than signal left in the smallest tensors' sums."""
BF16_MOVED = 0.03
"""Of three steps' movement, not of the value: rounding errors of micro-batches and steps average out, as long as their
sum is one in fp32. A gradient scaled or averaged wrongly is off by a factor of 2 or more."""
TOLERANCE = {"fp32": FP32, "bf16": BF16}


def plain(case: Case, **optimizer: object) -> Plain:
    return Plain(case.config(**optimizer), *tables(case))


def whole(case: Case, ranks: list[tuple[Pieces, Arrays]]) -> dict[str, torch.Tensor]:
    """The silo's whole body and tables from every rank's (body, embedding)."""
    body = joined(case.config(), [body for body, _ in ranks])
    return body | joined_tables(case, [embedding for _, embedding in ranks])


def assert_moved_alike(
    case: Case, start: dict[str, torch.Tensor], found: dict[str, torch.Tensor], expected: dict
) -> None:
    """fp32: the values agree; bf16: the movements from `start` do."""
    if case.precision == "fp32":
        assert largest_difference(found, expected) < FP32
    else:
        moved = {name: found[name] - start[name] for name in found}
        assert largest_difference(moved, {name: expected[name] - start[name] for name in expected}) < BF16_MOVED


def test_segments_name_every_element_once(ran: Ran) -> None:
    """`joined` finds elements named twice or by nobody; places within a partition must not overlap either."""
    reports = ran.of("written")
    joined(ran.case.config(), [report["built"] for report in reports])
    for report in reports:
        taken = np.zeros(report["numel"], int)
        for segment in report["segments"]:
            taken[segment.place] += 1
        assert taken.max() == 1


def test_partitions_are_of_one_size(ran: Ran) -> None:
    """What the outer exchange's prediction rests on: every data rank's partition is equally long, padding included."""
    assert len({report["numel"] for report in ran.of("written")}) == 1


def test_padding_reads_as_zero(ran: Ran) -> None:
    """Padding is no part of the body: no norm or hash may depend on what stands there in DeepSpeed's buffers.

    The probe has written 1e30 into it. On 3 ranks there is some.
    """
    named = sum(len(piece) for report in ran.of("written") for piece in report["built"].values())
    padded = sum(report["numel"] for report in ran.of("written"))
    assert padded > named or ran.case.data < 3
    assert [report["padding"] for report in ran.of("written")] == [0.0] * ran.case.shape.size


def test_read_is_the_built_body(ran: Ran) -> None:
    built = joined(ran.case.config(), [report["built"] for report in ran.of("written")])
    reference = plain(ran.case, **SGD).body
    assert all(torch.equal(built[name], parameter) for name, parameter in reference.named_parameters())


def test_what_was_written_is_read_and_used_by_the_next_forward(ran: Ran) -> None:
    """Low-precision copies are refreshed: the forward's losses are those of plain torch with the written body.

    1e-5 of their norm in fp32, where only the loss's chunks differ; 0.02 in bf16, where a logit is good to 8 bits. The
    losses of the body before the write are further away than that.
    """
    config = ran.case.config(**SGD)
    written = another_body(config)
    read = joined(config, [report["read"] for report in ran.of("written")])
    assert all(torch.equal(read[name], written[name]) for name in written)
    reference = plain(ran.case, **SGD)
    reference.body.load_state_dict(written)
    tolerance = FP32 if ran.case.precision == "fp32" else 0.02
    for rank, report in enumerate(ran.of("written")):
        mine = share(ran.case, 9, rank // ran.case.tensor)[0]
        with torch.no_grad():
            expected = reference.token_losses(mine[:, :-1], mine[:, 1:]).numpy()
        size = np.linalg.norm(expected)
        assert np.linalg.norm(report["losses"] - expected) < tolerance * size
        assert np.linalg.norm(report["built losses"] - expected) > 5 * tolerance * size


def test_the_next_step_starts_from_what_was_written(ran: Ran) -> None:
    """Masters, not only weights: an SGD step after a write is one plain step from the written body."""
    reference = plain(ran.case, **SGD)
    reference.body.load_state_dict(another_body(ran.case.config(**SGD)))
    start = reference.state()
    loss, _ = reference.step(batch(ran.case, 0), RATE, EMBEDDING_RATE)
    reports = ran.of("written")
    found = whole(ran.case, [report["stepped"] for report in reports])
    assert_moved_alike(ran.case, start, found, reference.state())
    for report in reports:
        assert report["loss"] == pytest.approx(loss, rel=1e-5 if ran.case.precision == "fp32" else 0.01)


def test_optimizer_state_saved_and_loaded_goes_on_to_the_bit(ran: Ran) -> None:
    for report in ran.of("optimizer state"):
        assert report["went on"] != report["loaded"]
        assert report["went on"] == report["went on again"]


def test_optimizer_state_is_known_by_name(ran: Ran) -> None:
    """Empty at the start; after two steps torch's moments, cut and named like the body itself, and its step count."""
    reports = ran.of("optimizer state")
    config = ran.case.config(**ADAMW)
    reference = plain(ran.case, **ADAMW)
    for number in range(2):
        reference.step(batch(ran.case, number), RATE)
    for report in reports:
        assert report["at start"] == []
        assert report["steps"] == ([2.0], [2.0])
    for moment in ("exp_avg", "exp_avg_sq"):
        found = joined(config, [report["saved"][moment] for report in reports])
        expected = {
            name: reference.optimizer.state[parameter][moment] for name, parameter in reference.body.named_parameters()
        }
        if ran.case.precision == "fp32":
            # Squares double a gradient's relative error.
            assert largest_difference(found, expected) < 2 * FP32
        else:
            assert largest_difference(found, expected) < 2 * BF16


def test_reset_optimizer_starts_like_a_fresh_one(ran: Ran) -> None:
    """Bias correction included: after a reset the next update is a first update."""
    reports = ran.of("optimizer state")
    reference = plain(ran.case, **ADAMW)
    before = whole(ran.case, [report["before reset step"] for report in reports])
    with torch.no_grad():
        for name in ("token", "position"):
            if name in before:
                getattr(reference, name).copy_(before.pop(name))
        reference.body.load_state_dict(before)
    start = reference.state()
    reference.step(batch(ran.case, 2), RATE)
    found = whole(ran.case, [report["after reset step"] for report in reports])
    assert_moved_alike(ran.case, start, found, reference.state())
    for report in reports:
        assert report["at reset"] == ([], [])
        assert report["steps after reset"] == [1.0]
