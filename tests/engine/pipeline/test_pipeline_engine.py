"""A silo cut into pipeline stages, by tensor and data ranks too, against the same training in plain torch."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests.engine.pipeline.cases import BATCH, SEQUENCE, Case, batch, tables
from tests.engine.pipeline.conftest import Ran
from tests.engine.pipeline.probe import ADAMW, EMBEDDING_RATE, RATE, SCORED, SGD, TURNS_OF_SGD
from tests.engine.plain import Plain
from tests.engine.silo import joined, joined_tables
from tests.support.runs import largest_difference

TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}
"""Relative L2 per tensor, of a gradient or a movement. fp32: sums of some hundred terms in another order differ by
about 1e-6. bf16: activations and their gradients are 8 bits, rounded anew at every layer and tensor rank, 0.03 in two
layers and 0.07 in five; a micro-batch too many or too few, or a tie's missing half, is off by more than 0.3."""
NUMBERS = {"fp32": 1e-5, "bf16": 0.01}
"""Relative, of losses and norms: means over thousands of elements, whose roundings in bf16 mostly cancel."""


class Reference:
    """Plain torch on two sources: one body, each source's own tables."""

    def __init__(self, case: Case, **optimizer: object) -> None:
        self.case = case
        config = case.config(**optimizer)
        self.sources = {source: Plain(config, *tables(config, source)) for source in ("large", "small")}
        self.sources["small"].body = self.sources["large"].body
        self.sources["small"].reset_optimizer()

    def step(self, number: int, source: str) -> tuple[float, float, float]:
        """Loss, gradient norm, and mean norm of the output on each data rank's last micro-batch, before the step."""
        last = batch(source, number)[-2 * self.case.data :, :-1]
        norm = float(self._output(source, last).float().norm(dim=-1).mean())
        return *self.sources[source].step(batch(source, number), RATE, EMBEDDING_RATE), norm

    def token_losses(self, source: str, count: int, data_rank: int) -> np.ndarray:
        """What `Rank.token_losses` is to find."""
        ids = batch(source, 9, count * self.case.data)[data_rank :: self.case.data]
        with torch.no_grad():
            return self.sources[source].token_losses(ids[:, :-1], ids[:, 1:]).numpy()

    @torch.no_grad()
    def _output(self, source: str, inputs: Tensor) -> Tensor:
        plain = self.sources[source]
        rows = plain.token[inputs] if plain.position is None else plain.token[inputs] + plain.position
        weights = {name: parameter.to(plain.dtype) for name, parameter in plain.body.named_parameters()}
        return functional_call(plain.body, weights, (rows.to(plain.dtype),))


def whole(case: Case, ranks: list[tuple[dict, dict]]) -> dict[str, Tensor]:
    """The silo's body and tables from every rank's; the tied table must be the same to the bit on both ends."""
    ends = case.data * case.tensor
    first, last = (joined_tables(case, [tables for _, tables in part]) for part in (ranks[:ends], ranks[-ends:]))
    assert list(last) == ["token"] and torch.equal(first["token"], last["token"])
    assert not any(tables for _, tables in ranks[ends:-ends])
    return joined(case.config(), [body for body, _ in ranks]) | first


def assert_alike(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Movements from `start` agree; in fp32 values do: what a weight has moved is few of its bits."""
    if case.precision == "bf16":
        found = {name: found[name] - start[name] for name in found}
        expected = {name: expected[name] - start[name] for name in expected}
    assert largest_difference(found, expected) < TOLERANCE[case.precision]


def test_the_stages_hold_the_body_as_it_is_built(ran: Ran) -> None:
    """Every element once (`joined` looks), its values those of the whole body; partitions of a stage of one size."""
    reports = ran.of("sgd")
    built = joined(ran.case.config(), [report["built"] for report in reports])
    expected = Reference(ran.case, **SGD).sources["large"].body
    assert all(torch.equal(built[name], parameter) for name, parameter in expected.named_parameters())
    for stage in range(ran.case.pipe):
        numbers = {report["numel"] for report in reports if report["stage"] == stage}
        assert len(numbers) == 1 or ran.case.tensor > 1


def test_loss_norm_and_activation_norm_of_every_step(ran: Ran) -> None:
    """Equal on all ranks, and plain torch's: the norm counts the tied table and every copy once."""
    reference = Reference(ran.case, **SGD)
    reports = ran.of("sgd")
    for number, source in enumerate(TURNS_OF_SGD):
        result, *others = [report["results"][number] for report in reports]
        assert all(other == result for other in others)
        found = (result.loss, result.gradient_norm, result.activation_norm)
        assert found == pytest.approx(reference.step(number, source), rel=NUMBERS[ran.case.precision])
        assert not result.skipped


def test_every_gradient_of_every_step(ran: Ran) -> None:
    """Averaged over micro-batches and data ranks, the embedding's as the body's, the tie's two parts summed."""
    reference = Reference(ran.case, **SGD)
    reports = ran.of("sgd")
    for number, source in enumerate(TURNS_OF_SGD):
        reference.step(number, source)
        found = whole(ran.case, [report["gradients"][number] for report in reports])
        expected = reference.sources[source].gradients()
        assert largest_difference(found, expected) < TOLERANCE[ran.case.precision], number


def test_every_parameter_after_every_step(ran: Ran) -> None:
    """Turns between sources of different vocabularies too: the body goes on, each source has its own tables."""
    reference = Reference(ran.case, **SGD)
    reports = ran.of("sgd")
    starts = {source: plain.state() for source, plain in reference.sources.items()}
    for number, source in enumerate(TURNS_OF_SGD):
        reference.step(number, source)
        found = whole(ran.case, [report["states"][number] for report in reports])
        assert_alike(ran.case, found, reference.sources[source].state(), starts[source])


def test_token_losses_between_the_steps(ran: Ran) -> None:
    """Known on every rank of a data rank's pipeline, also of batches of other shapes than the training's."""
    reference = Reference(ran.case, **SGD)
    data, tensor = ran.case.data, ran.case.tensor
    for number, source in enumerate(TURNS_OF_SGD):
        reference.step(number, source)
        for rank, report in enumerate(ran.of("sgd")):
            for count in SCORED:
                found = report["scores"][number][count]
                assert found.shape == (count, SEQUENCE) and found.dtype == np.float32
                expected = reference.token_losses(source, count, rank // tensor % data)
                size = np.linalg.norm(expected)
                assert np.linalg.norm(found - expected) < 2 * NUMBERS[ran.case.precision] * size


def test_clipped_adamw_steps(ran: Ran) -> None:
    """One clip over all stages and both ends: a norm that counted anything twice would clip more."""
    reference = Reference(ran.case, **ADAMW)
    reports = ran.of("adamw")
    start = reference.sources["large"].state()
    for number in range(3):
        expected = reference.step(number, "large")
        result = reports[0]["results"][number]
        assert (result.loss, result.gradient_norm) == pytest.approx(expected[:2], rel=NUMBERS[ran.case.precision])
        assert result.gradient_norm > 2 * ADAMW["clip_grad"]
        found = whole(ran.case, [report["states"][number] for report in reports])
        assert_alike(ran.case, found, reference.sources["large"].state(), start)


def test_optimizer_state_saved_and_loaded_goes_on_to_the_bit(ran: Ran) -> None:
    for report in ran.of("adamw"):
        assert report["went on"] != report["put back"]
        assert report["went on"] == report["went on again"]


def test_a_gradient_spoilt_on_one_stage_moves_nothing_on_any(ran: Ran) -> None:
    """Nor does it linger: the next step is the one that follows from the state before."""
    for report in ran.of("adamw"):
        assert report["poisoned"] == dict.fromkeys(range(ran.case.pipe), (True, True))
        assert report["stepped after all"] == (False, report["went on"])


def test_turning_between_sources_leaves_nothing_behind(ran: Ran) -> None:
    """No embedding of an earlier turn is alive; no file, connection or thread more than after the first two turns."""
    for report in ran.of("turned"):
        assert report["alive"] == 0
        assert report["counts"][-1] == report["counts"][1]


def test_what_stages_send_each_other_is_charged(ran: Ran) -> None:
    """Hidden states forward, their gradients back: between stages every rank but the ends' sends both ways.

    At least the training's own; scoring and what tensor ranks tell one another come on top.
    """
    case = ran.case
    element = 4 if case.precision == "fp32" else 2
    hidden = case.config().model.hidden_size
    length = SEQUENCE // case.tensor if case.sequence_parallel else SEQUENCE
    one_way = len(TURNS_OF_SGD) * BATCH // case.data * length * hidden * element
    for report in ran.of("sgd"):
        ways = (report["stage"] > 0) + (report["stage"] < case.pipe - 1)
        assert report["ledger"]["silo/activation"] >= ways * one_way
