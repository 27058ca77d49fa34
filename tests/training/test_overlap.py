"""outer.overlap: a round's body exchange in the background of the next, its update applied after so many steps."""

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from megatron_dept.training.plan import print_plan
from tests.support.corpus import Corpus
from tests.support.distributed import run_ranks
from tests.support.faults import dies_in_exchange, together
from tests.support.mortals import run_to_end
from tests.support.runs import (
    final_state,
    largest_difference,
    losses,
    metrics,
    small_config,
    train,
    train_rank,
    train_sites,
)
from tests.training.conftest import Finished
from tests.training.interrupts import Stop, assert_same_run, killed, stopped
from tests.training.plain_run import by_checkpoint_name, plain_run, source_batch, vocabulary_size
from tests.training.test_failures import survivors
from tests.training.test_identities import PLAIN_SGD, SMOOTH, TOLERANCE
from tests.training.test_rounds import whole_hash
from tests.training.test_sites import site_configs, sources

NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}
SELDOM = {"save_interval": 0}
"""A save waits for the exchange: only the end is saved."""
TWO = ["latin", "greek"]
BF16 = 0.03
"""Relative L2 of a state after nine steps: a bf16 gradient is 8 bits, and ranks sum their parts in another order."""


def overlapped(overlap: int = 2, rounds: int = 3, **outer: Any) -> dict[str, Any]:
    return {"dept": {"rounds": rounds, "outer": {**NESTEROV, "overlap": overlap, **outer}}, "checkpoint": SELDOM}


def merged(sections: dict[str, Any], **dept: Any) -> dict[str, Any]:
    """`sections` with more of the section dept."""
    return {**sections, "dept": {**sections["dept"], **dept}}


@pytest.mark.parametrize("overlap", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_run_is_the_delayed_rule_in_plain_torch(finished: Finished, corpus: Corpus, overlap: int) -> None:
    """GLOB with plain SGD, three sources, three rounds: phases begin with theta_t, add theta_(t+1) - theta_t after
    `overlap` steps, and are held against theta_(t+1). Shared rows, which every source holds here, are never late.
    """
    sections = merged(overlapped(overlap), variant="glob")
    sections["optimizer"] = {**PLAIN_SGD["optimizer"], "learning_rate": 0.1}
    run_dir = finished(2, **sections, parallel={"silos": 2})
    config = small_config(corpus, run_dir, **sections)
    expected = _plain_delayed(config, overlap)
    assert largest_difference(final_state(run_dir), expected) < TOLERANCE
    at_once = finished(2, **merged(sections, outer=NESTEROV), parallel={"silos": 2})
    assert largest_difference(final_state(at_once), expected) > 100 * TOLERANCE, "the delay must tell"


def _plain_delayed(config: RunConfig, overlap: int) -> dict[str, torch.Tensor]:
    """The final state of `config` under the delayed rule, by checkpoint name."""
    local = plain_run(config, vocabulary_size(config))
    new = {name: value.clone() for name, value in by_checkpoint_name(local).items()}
    momentum = {name: torch.zeros_like(value) for name, value in new.items()}
    parameters = dict(zip(new, [*local.body.parameters(), local.token, local.position], strict=True))
    old = new
    for round in range(config.dept.rounds):
        deltas = []
        for source in config.sources:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(old[name] if name.startswith("body/") else new[name])
            for step in range(config.dept.n_local):
                local.step(source_batch(config, source.name, round * config.dept.n_local + step), 0.1)
                if step + 1 == overlap:
                    with torch.no_grad():
                        for name, parameter in parameters.items():
                            parameter += new[name] - old[name] if name.startswith("body/") else 0
            deltas.append({name: new[name] - parameter.detach() for name, parameter in parameters.items()})
        old, new = new, {}
        for name, value in old.items():
            mean = sum(delta[name] for delta in deltas) / len(deltas)
            momentum[name] = 0.9 * momentum[name] + mean
            new[name] = value - 0.7 * (mean + 0.9 * momentum[name])
    return new


def further(names: Iterable[str], *kept: str) -> list[Any]:
    """Parameters: what is not `kept` for make test is for make test-long."""
    return [pytest.param(name, marks=[pytest.mark.long] * (name not in kept)) for name in names]


@pytest.mark.parametrize("variant", further(["trim", "spec_opt"], "trim"))
def test_two_silos_are_one_process_to_the_bit(finished: Finished, variant: str) -> None:
    same = {"source_names": TWO, **merged(overlapped(), variant=variant, inner_state="keep")}
    one, two = finished(**same), finished(2, **same, parallel={"silos": 2})
    assert largest_difference(final_state(one), final_state(two)) == 0
    assert losses(one) == losses(two)
    assert hashes(one)[0] == hashes(two)[0]


def hashes(run_dir: Path) -> dict[int, dict[int, str]]:
    """By silo and round."""
    found: dict[int, dict[int, str]] = {}
    for line in metrics(run_dir, "round"):
        assert line["round"] not in found.setdefault(line["silo"], {}), "a round is written down once"
        found[line["silo"]][line["round"]] = line["body_hash"]
    return found


@dataclass(frozen=True)
class Case:
    ranks: int
    parallel: dict[str, Any]
    variant: str = "trim"
    training: dict[str, Any] = field(default_factory=dict)

    def sections(self, parallel: dict[str, Any]) -> dict[str, Any]:
        return {
            **merged(overlapped(), variant=self.variant),
            "optimizer": SMOOTH,
            "parallel": parallel,
            "training": self.training,
            "evaluation": {"interval_rounds": 2, "max_tokens": 200},
        }


CASES = {
    "2 silos x data 2, ZeRO 3, bf16": Case(4, {"silos": 2, "zero_stage": 3}, "glob", {"precision": "bf16"}),
    "2 silos x tensor 2": Case(4, {"silos": 2, "tensor_model_parallel_size": 2}),
    "2 silos x pipe 2": Case(4, {"silos": 2, "pipeline_model_parallel_size": 2}, "spec"),
    "tensor 2 beside data 2": Case(4, {"shapes": [{"tensor_model_parallel_size": 2}, {"data_parallel_size": 2}]}),
}


@pytest.mark.parametrize("name", further(CASES, "2 silos x pipe 2", "tensor 2 beside data 2"))
def test_any_layout_is_one_process(finished: Finished, name: str) -> None:
    """Three sources: on two silos one idles in the second slot, when the update is long known. The second of three
    rounds is validated, with the body that its exchange, waited for, has made; the ledger is as foretold."""
    case = CASES[name]
    one, many = finished(1, **case.sections({})), finished(case.ranks, **case.sections(case.parallel))
    tolerance = BF16 if case.training else TOLERANCE
    assert largest_difference(final_state(many), final_state(one)) < tolerance
    assert losses(many) == pytest.approx(losses(one), rel=tolerance)
    scores = [{line["source"]: line["loss"] for line in metrics(run_dir, "validation")} for run_dir in (many, one)]
    assert scores[0] == pytest.approx(scores[1], rel=tolerance) and len(scores[0]) == 3
    assert_ledger_as_foretold(many, rounds=3)


def assert_ledger_as_foretold(run_dir: Path, rounds: int) -> None:
    """By round and kind: a body exchange is its own round's, though it ends in the next one's time."""
    entries = json.loads((run_dir / "ledger.json").read_text())["per_round"]
    assert [entry["round"] for entry in entries] == list(range(rounds))
    for entry in entries:
        assert entry["predicted"]["body"] > 0
        assert {kind: entry["kinds"][kind] for kind in entry["predicted"]} == entry["predicted"]


def test_launches_of_their_own_are_silos_of_one(finished: Finished, corpus: Corpus, tmp_path: Path) -> None:
    same = {**merged(overlapped(), variant="trim"), "optimizer": SMOOTH}
    one = finished(2, **same, sources=sources(corpus), parallel={"silos": 2})
    configs = site_configs(corpus, tmp_path, [{}, {}], **same)
    assert train_sites(configs, [1, 1]) == [True, True]
    expected = final_state(one)
    for config in configs:
        assert largest_difference(final_state(config.run_dir), expected) < TOLERANCE
        assert_ledger_as_foretold(config.run_dir, rounds=3)


def _paced(launch: Launch, config: RunConfig, slow: bool) -> list[bool]:
    """A run whose exchanges end only when the silo has trained the steps that may hide them, or (not `slow`) before it
    trains any; whether each was still under way as the first step of the next round ended."""
    from megatron_dept.engine.silo_engine import SiloEngine
    from megatron_dept.federation.body_exchange import BodyExchange
    from megatron_dept.federation.overlapped_exchange import OverlappedExchange

    trained, seen = threading.Event(), []
    rounds = steps = 0
    current: list[OverlappedExchange] = []
    finish, begin, step = BodyExchange.finish, OverlappedExchange.finish, SiloEngine.train_step

    def finishing(self: BodyExchange, sources: int) -> None:
        last = rounds == config.dept.rounds
        assert not slow or last or trained.wait(30), "nobody trains while the exchange runs"
        finish(self, sources)

    def beginning(self: OverlappedExchange, sources: int) -> None:
        nonlocal rounds, steps
        rounds, steps = rounds + 1, 0
        trained.clear()
        current[:] = [self]
        begin(self, sources)
        if not slow:
            self.wait()

    def stepping(self: SiloEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        result = step(self, *args, **kwargs)
        steps += 1
        if steps == 1 and current:
            job = current[0]._job
            seen.append(job is not None and job.is_alive())
        if steps == config.dept.outer.overlap:
            trained.set()
        return result

    BodyExchange.finish = finishing  # type: ignore[method-assign]
    OverlappedExchange.finish = beginning  # type: ignore[method-assign]
    SiloEngine.train_step = stepping  # type: ignore[method-assign]
    assert train_rank(launch, config)
    return seen


@pytest.mark.parametrize("slow", [True, False])
def test_no_number_depends_on_when_the_exchange_is_done(
    finished: Finished, corpus: Corpus, tmp_path: Path, slow: bool
) -> None:
    sections = {**overlapped(wire="int8", bucket_mb=0.01), "parallel": {"silos": 2}}
    config = small_config(corpus, tmp_path / "run", **sections)
    assert run_ranks(2, _paced, config, slow) == [[slow] * 2] * 2
    assert_same_run(config.run_dir, finished(2, **sections))


STOPS = {
    "before the update": Stop(0, 7),
    "in the step after which the update comes, int8": Stop(0, 8),
    "after the update": Stop(1, 6),
    "in the second slot, beside an idle silo": Stop(0, 11),
    "at a round's last step": Stop(0, 12),
}


@pytest.mark.parametrize("name", further(STOPS, "before the update", "in the step after which the update comes, int8"))
def test_a_stopped_run_goes_on_as_if_never_stopped(
    finished: Finished, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    """In the second of three rounds of three steps; two silos, three sources. The exchange of the first is over by then
    or waited for, and the round it belongs to is written down. What an int8 wire owes after it is saved."""
    outer = overlapped(wire="int8" if "int8" in name else "fp32")
    sections = {**merged(outer, inner_state="keep", variant="trim"), "parallel": {"silos": 2}}
    config = small_config(corpus, tmp_path / "run", **sections)
    checkpoint = stopped(config, 2, STOPS[name])
    assert checkpoint.manifest["round"] == 1 and checkpoint.manifest["progress"]["flights"]
    assert hashes(config.run_dir)[0].keys() == {0}
    assert bool(checkpoint.index.paths("residual/")) == ("int8" in name)
    assert train(config, 2) == [True] * 2
    assert_same_run(config.run_dir, finished(2, **sections))
    assert_ledger_rounds(config.run_dir, finished(2, **sections))


def assert_ledger_rounds(run_dir: Path, never_stopped: Path) -> None:
    """The body's bytes are what they would have been, round by round."""
    found, expected = (
        [entry["kinds"]["body"] for entry in json.loads((run / "ledger.json").read_text())["per_round"]]
        for run in (run_dir, never_stopped)
    )
    assert found == expected


@pytest.mark.parametrize(
    ("save", "checkpoint"),
    [(1, {"save_interval": 1}), (2, {"save_interval": 2, "save_interval_unit": "steps"})],
    ids=["at a round's end", "within a round"],
)
def test_a_killed_run_goes_on_from_its_last_save(
    finished: Finished, corpus: Corpus, tmp_path: Path, save: int, checkpoint: dict[str, Any]
) -> None:
    """To the bits of a run that was saved at its end alone: a save waits for the exchange and changes nothing."""
    sections = {**merged(overlapped(), inner_state="keep"), "parallel": {"silos": 2}}
    config = small_config(corpus, tmp_path / "run", **{**sections, "checkpoint": checkpoint})
    assert killed(config, 2, after_save=save).manifest["round"] == 1 or save == 2
    assert train(config, 2) == [True] * 2
    assert_same_run(config.run_dir, finished(2, **sections))


def test_a_checkpoint_has_the_newest_body_and_the_one_before(finished: Finished) -> None:
    """Every round saved: what local phases begin with is the body that was newest a round ago; the last has none."""
    sections = {**overlapped(), "checkpoint": {"save_interval": 1, "keep_last": 9}}
    run_dir = finished(2, **sections, parallel={"silos": 2})
    checkpoints = [Checkpoint.open(path) for path in sorted((run_dir / "checkpoints").iterdir())]
    bodies = [checkpoint.body() for checkpoint in checkpoints]
    written = hashes(run_dir)[1]
    assert [whole_hash(body) for body in bodies] == [written[round] for round in range(3)]
    start = {name: checkpoints[1].index.read(f"start/{name}") for name in bodies[0]}
    assert all(torch.equal(start[name].view_as(value), value) for name, value in bodies[0].items())
    assert checkpoints[2].index.paths("start/") == []


RELAYOUTS: dict[str, tuple[tuple[int, dict[str, Any]], tuple[int, dict[str, Any]], Stop | None]] = {
    "two silos to one process, before the update": ((2, {"silos": 2}), (1, {"zero_stage": 3}), Stop(0, 7)),
    "one process to two silos of two, after the update": (
        (1, {}),
        (4, {"silos": 2, "tensor_model_parallel_size": 2}),
        Stop(0, 14),
    ),
    "two silos to unequal ones, at the boundary": (
        (2, {"silos": 2}),
        (3, {"shapes": [{"data_parallel_size": 2}, {}]}),
        None,
    ),
}


@pytest.mark.parametrize("name", further(RELAYOUTS, "two silos to one process, before the update"))
def test_another_layout_takes_over(finished: Finished, corpus: Corpus, tmp_path: Path, name: str) -> None:
    (ranks, parallel), (other_ranks, other), stop = RELAYOUTS[name]
    sections = {**merged(overlapped(), inner_state="keep", variant="trim"), "optimizer": SMOOTH}
    sections["checkpoint"] = {"save_interval": 0 if stop else 1}
    before = small_config(corpus, tmp_path / "run", **sections, parallel=parallel)
    saved = killed(before, ranks, after_save=1) if stop is None else stopped(before, ranks, stop)
    assert saved.manifest["round"] == 1 and saved.index.paths("start/")
    after = small_config(corpus, tmp_path / "run", **sections, parallel=other)
    assert train(after, other_ranks) == [True] * other_ranks
    never_stopped = finished(ranks, **sections, parallel=parallel)
    assert losses(before.run_dir) == pytest.approx(losses(never_stopped), rel=TOLERANCE)
    assert largest_difference(final_state(before.run_dir), final_state(never_stopped)) < TOLERANCE


def test_a_peer_that_dies_in_the_background_is_named(corpus: Corpus, tmp_path: Path) -> None:
    """The other silo trains on, finds out as it comes for the update, and says what a blocking exchange would say."""
    sections = {**overlapped(), "parallel": {"silos": 2}, "training": {"timeout_seconds": 600}}
    config = small_config(corpus, tmp_path / "run", source_names=TWO, **sections)
    (error,) = survivors(run_to_end([config], [2], dies_in_exchange(1, 1)), 1)
    assert ": silo 1, rank 1 is gone (last seen in phase " in error
    assert "; noticed in phase exchange: rank 0 of 2 lost a peer in another silo while exchanging body (" in error


@pytest.mark.parametrize("interval", [0, 1])
def test_a_run_that_can_hide_nothing_says_so(corpus: Corpus, tmp_path: Path, interval: int) -> None:
    sections = {**overlapped(rounds=2), "checkpoint": {"save_interval": interval}}
    config = small_config(corpus, tmp_path / "run", source_names=TWO, **sections)
    (end,) = run_to_end([config], [1], together())
    assert end.code == 0
    assert ("dept.outer.overlap hides nothing" in end.stderr) == bool(interval)


def test_a_dry_run_says_what_can_be_hidden(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of five rounds the third is validated, the second and fourth are saved, and the last has nothing after it."""
    sections = merged(overlapped(rounds=5)) | {
        "checkpoint": {"save_interval": 2},
        "evaluation": {"interval_rounds": 3, "max_tokens": 100},
    }
    print_plan(small_config(corpus, tmp_path / "run", **sections), 1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "may run on in the first 2 of the next one's 3 steps (dept.outer.overlap); 4 of 5 rounds wait" in printed
