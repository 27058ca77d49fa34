"""`federation.on_silo_loss: continue`: silos are killed, stopped and late; the others finish with the right mean."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pretrain_dept
from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.common.errors import ConfigError
from megatron_dept.common.files import read_json
from megatron_dept.config.load import dump_config, validate_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.dept.outer import OuterRule
from megatron_dept.federation.background import Job
from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.federation.communicator import Alone
from megatron_dept.topology.launch import Launch
from megatron_dept.training.elastic import Elastic
from tests.support.corpus import Corpus
from tests.support.runs import losses, metrics
from tests.training import silo_faults as fault
from tests.training.interrupts import assert_same_bits, whole_state
from tests.training.silo_faults import run_silos
from tests.training.test_sites import EACH_ITS_OWN, on_another_port, site_configs

TOOL = Path(__file__).resolve().parents[2] / "tools" / "rendezvous.py"
MOMENTUM, RATE = 0.9, 0.7
OUTER = {"optimizer": "nesterov", "learning_rate": RATE, "momentum": MOMENTUM}
TOLERANCE = 1e-6
"""The reference does the same few additions in fp32, fused or not: a unit in the last place of values below 1."""


def elastic_configs(
    corpus: Corpus, root: Path, parallel: list[dict[str, Any]], rounds: int, variant: str = "glob", **federation: Any
) -> list[RunConfig]:
    """Silos that are waited for, once a round was measured, only seconds."""
    return site_configs(
        corpus,
        root,
        parallel,
        homes=EACH_ITS_OWN if len(parallel) == 3 else None,
        dept={"variant": variant, "rounds": rounds, "n_local": 2, "outer": OUTER},
        federation={"on_silo_loss": "continue", "straggler_minimum_seconds": 4, "straggler_factor": 1.0} | federation,
    )


def record(config: RunConfig, round: int) -> dict[str, np.ndarray]:
    with np.load(config.run_dir / f"record.{round}.npz") as values:
        return dict(values)


def nesterov(value: np.ndarray, momentum: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """torch.optim.SGD(nesterov=True)'s step, from the buffer as it was."""
    return value - RATE * (mean + MOMENTUM * (MOMENTUM * momentum + mean))


def assert_mean_of(configs: list[RunConfig], members: list[int], round: int) -> None:
    """The round's step took the mean over exactly these silos' sources, of the body and of every row."""
    records = {silo: record(configs[silo], round) for silo in members}
    first = records[members[0]]
    sources = sum(int(of["sources"]) for of in records.values())
    mean = np.sum([of["before.delta"] for of in records.values()], axis=0, dtype=np.float32) / sources
    assert np.abs(mean).max() > 100 * TOLERANCE
    expected = nesterov(first["before.value"], first["before.momentum"], mean)
    tables = [
        name.removesuffix(".rows").removeprefix("before.")
        for name in first
        if name.startswith("before.") and name.endswith(".rows")
    ]
    for of in records.values():
        np.testing.assert_allclose(of["after.value"], expected, rtol=0, atol=TOLERANCE)
        for part in tables:
            sums = np.sum([other[f"before.{part}.sums"] for other in records.values()], axis=0, dtype=np.float32)
            counts = np.sum([other[f"before.{part}.counts"] for other in records.values()], axis=0)
            stepped = nesterov(
                first[f"before.{part}.rows"], first[f"before.{part}.momentum"], sums / np.maximum(counts, 1)[:, None]
            )
            rows = np.where(counts[:, None] > 0, stepped, first[f"before.{part}.rows"])
            np.testing.assert_allclose(of[f"after.{part}.rows"], rows, rtol=0, atol=TOLERANCE)


def members_by_round(config: RunConfig) -> dict[int, list[int]]:
    return {line["round"]: line["members"] for line in metrics(config.run_dir, "round")}


def hashes(config: RunConfig) -> dict[int, str]:
    return {line["round"]: line["body_hash"] for line in metrics(config.run_dir, "round")}


@pytest.mark.parametrize("parallel", [[{}, {}], [{"tensor_model_parallel_size": 2}, {}]])
def test_where_nobody_is_lost_the_bits_are_those_of_stop(
    corpus: Corpus, tmp_path: Path, parallel: list[dict[str, Any]]
) -> None:
    """And the ledger has to the byte what was foretold, of cursors, losses and bodies nothing differs."""
    ranks = [part.get("tensor_model_parallel_size", 1) for part in parallel]
    configs = elastic_configs(corpus, tmp_path / "continue", parallel, rounds=2, variant="trim")
    stop = elastic_configs(corpus, tmp_path / "stop", parallel, rounds=2, variant="trim", on_silo_loss="stop")
    assert run_silos(configs, ranks) == run_silos(stop, ranks) == [True] * sum(ranks)
    for config, expected in zip(configs, stop, strict=True):
        assert_same_bits(Checkpoint.open(config.run_dir), Checkpoint.open(expected.run_dir))
        assert losses(config.run_dir) == losses(expected.run_dir) and hashes(config) == hashes(expected)
        assert metrics(config.run_dir, "membership") == []
        for entry in read_json(config.run_dir / "ledger.json")["per_round"]:
            sent = entry["kinds"]
            assert {kind: sent[kind] for kind in ("body", "embedding", "position")} == {
                kind: entry["predicted"][kind] for kind in ("body", "embedding", "position")
            }
            assert sent["body"] > 0


LOSSES = {
    "step, then rows": (fault.dies_in_step(2), fault.dies_exchanging_rows(2), "trim", [[0, 1], [0]]),
    "pack, then save": (fault.dies_packing(1), fault.dies_saving(1), "spec_opt", [[0, 1], [0]]),
    "exchange, then step": (fault.dies_exchanging(1), fault.dies_in_step(4), "glob", [[0, 1], [0]]),
}


@pytest.mark.parametrize("phases", LOSSES)
def test_the_others_finish_with_the_mean_of_those_who_are_left(corpus: Corpus, tmp_path: Path, phases: str) -> None:
    """Silo 2 is killed in round 1 and silo 1 at the end of it or in round 2; silo 0 finishes alone."""
    second, first, variant, (in_round_1, in_round_2) = LOSSES[phases]
    configs = elastic_configs(corpus, tmp_path, [{}, {}, {}], rounds=3, variant=variant)
    assert run_silos(configs, [1, 1, 1], {2: second, 1: first}, dying=(1, 2)) == [True, None, None]
    assert members_by_round(configs[0]) == {0: [0, 1, 2], 1: in_round_1, 2: in_round_2}
    assert_mean_of(configs, [0, 1, 2], 0)
    assert_mean_of(configs, in_round_1, 1)
    assert_mean_of(configs, in_round_2, 2)
    told = metrics(configs[0].run_dir, "membership")
    assert [line["members"] for line in told] == [[0, 1], [0]]
    assert "silo 2 is lost (no sign of life for" in told[0]["reason"] and "in round 2" in told[0]["reason"]


def test_the_late_and_the_stopped_come_back(corpus: Corpus, tmp_path: Path) -> None:
    """Silo 1 is late in round 1, silo 2 is stopped in round 3 and goes on later: each is left out of that round alone.

    The others end the round before each return only when they are asked, so that the rounds of the return are known.
    """
    configs = elastic_configs(corpus, tmp_path, [{}, {}, {}], rounds=6, variant="trim")
    for_1, for_2 = fault.waits_for_joiner(2), fault.waits_for_joiner(4)
    waking = fault.wakes(4, configs[2].run_dir / "pid.0")
    faults = {
        0: fault.both(for_1, for_2, waking),
        1: fault.both(for_2, fault.sleeps(2, 8)),
        2: fault.both(for_1, fault.stops(6)),
    }
    assert run_silos(configs, [1, 1, 1], faults) == [True, True, True]
    everyone, without_1, without_2 = [0, 1, 2], [0, 2], [0, 1]
    assert members_by_round(configs[0]) == {
        0: everyone,
        1: without_1,
        2: without_1,
        3: without_2,
        4: without_2,
        5: everyone,
    }
    assert_mean_of(configs, without_1, 1)
    assert_mean_of(configs, without_2, 4)
    assert_mean_of(configs, everyone, 5)
    # What a silo writes of a round that it was let in after is the others' state.
    for config in configs[1:]:
        assert hashes(config).items() <= hashes(configs[0]).items()
    assert sorted(hashes(configs[1])) == [0, 2, 3, 4, 5] and sorted(hashes(configs[2])) == [0, 1, 2, 4, 5]
    # What they trained in the round that they were left out of is gone, and adds to no later one.
    for silo, round in ((1, 1), (2, 3)):
        left = record(configs[silo], round)
        assert left["before.delta"].any() and left["before.token.counts"].any()
        assert not any(left[f"after.{what}"].any() for what in ("delta", "token.sums", "token.counts"))
    reasons = [line["reason"] for line in metrics(configs[0].run_dir, "membership")]
    assert reasons == [
        "silo 1 is left out of round 2 (late by more than 4 s); going on with silos 0, 2",
        "silo 1 joined at round 4",
        reasons[2],
        "silo 2 joined at round 6",
    ]
    # Both limits are the same few seconds, and which of them is found first is a matter of when they began.
    assert reasons[2].startswith(("silo 2 is lost (no sign of life for", "silo 2 is left out of round 4 (late"))
    assert_same_state(configs)


def assert_same_state(configs: list[RunConfig]) -> None:
    """All silos' last checkpoints: the same body, momentum and shared rows to the bit, the same counters."""
    found = [Checkpoint.open(config.run_dir) for config in configs]
    states = [whole_state(checkpoint) for checkpoint in found]
    names = [{n for n in state if n.split("/")[0] in ("body", "outer", "token", "token.momentum")} for state in states]
    assert names[0] and all(of == names[0] for of in names)
    for state, checkpoint in zip(states, found, strict=True):
        assert [name for name in names[0] if not torch.equal(state[name], states[0][name])] == []
        for counter in ("round", "cursors", "steps", "skipped"):
            assert checkpoint.manifest["progress"][counter] == found[0].manifest["progress"][counter], counter


@pytest.mark.parametrize("parallel", [[{}, {}], [{"tensor_model_parallel_size": 2}, {"zero_stage": 2}]])
def test_a_lost_silo_started_again_is_let_in(corpus: Corpus, tmp_path: Path, parallel: list[dict[str, Any]]) -> None:
    """Its second launch asks as soon as its first is found dead; unequal silos hand the state over by name."""
    ranks = [part.get("tensor_model_parallel_size", 1) for part in parallel]
    configs = elastic_configs(corpus, tmp_path, parallel, rounds=4)
    again = fault.waits_for_file(configs[0].run_dir / "record.1.npz")
    faults = {0: fault.waits_for_joiner(2), 1: fault.dies_in_step(2), 2: again}
    assert run_silos([*configs, configs[1]], [*ranks, ranks[1]], faults, dying=(1,)) == [
        *[True] * ranks[0],
        *[None] * ranks[1],
        *[True] * ranks[1],
    ]
    assert members_by_round(configs[0]) == {0: [0, 1], 1: [0], 2: [0], 3: [0, 1]}
    assert hashes(configs[1]).items() <= hashes(configs[0]).items()
    assert metrics(configs[0].run_dir, "membership")[1]["reason"] == "silo 1 joined at round 4"
    assert_same_state(configs)


def test_silos_that_stand_at_different_rounds_begin_with_the_furthest(corpus: Corpus, tmp_path: Path) -> None:
    """Silo 1 leaves when it is asked to, silo 0 a round later; started again, both go on from silo 0."""
    configs = elastic_configs(corpus, tmp_path / "first", [{}, {}], rounds=3, variant="spec_opt")
    assert run_silos(configs, [1, 1], {1: fault.is_asked_to_stop(2), 0: fault.stops_after(1)}) == [False, False]
    assert [Checkpoint.open(config.run_dir).manifest["round"] for config in configs] == [2, 1]
    assert members_by_round(configs[0]) == {0: [0, 1], 1: [0]}
    assert metrics(configs[0].run_dir, "membership")[0]["reason"].startswith("silo 1 is lost (left) in round 2")
    again = on_another_port(configs)
    assert run_silos(again, [1, 1]) == [True, True]
    assert members_by_round(configs[0]) == {0: [0, 1], 1: [0], 2: [0, 1]}
    assert sorted(hashes(configs[1])) == [0, 2]
    assert_same_state(configs)


@pytest.mark.parametrize(
    ("on_silo_loss", "told"),
    [
        ("continue", "left the federation as asked; the round in progress is not saved: the same command joins again"),
        ("stop", "stopped as asked; the same command goes on from"),
    ],
)
def test_a_silo_that_was_asked_to_stop_says_what_is_saved(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on_silo_loss: str,
    told: str,
) -> None:
    config, _ = elastic_configs(corpus, tmp_path, [{}, {}], rounds=2, on_silo_loss=on_silo_loss)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    monkeypatch.setattr("megatron_dept.training.setup.run", lambda config, launch: False)
    assert pretrain_dept.main([str(file)], Launch(0, 1, 0, 1, "127.0.0.1", 0)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(told) and str(config.run_dir / "checkpoints") in line


class Stalled:
    """A giver's silo of one, that sends only when it is woken: `Link.body` and the like of a joiner."""

    rank, size, members = 1, 2, (0, 1)

    def __init__(self) -> None:
        self.woken = threading.Event()

    def broadcast(self, value: torch.Tensor, source: int, kind: str) -> None:
        assert self.woken.wait(20)
        value.fill_(7)


def test_a_transfer_given_up_changes_nothing_when_it_ends_after_all() -> None:
    """The joiner has gone on with another giver's state by then."""
    exchange = BodyExchange(Alone(), torch.zeros(4), OuterRule("nesterov", RATE, MOMENTUM), True)
    assert exchange.momentum is not None
    link = SimpleNamespace(body=Stalled(), silos=(0, 1))
    joiner = SimpleNamespace(_silo=1, _linker=SimpleNamespace(connect=lambda *_: link), _exchange=exchange, _tables={})
    job = Job(lambda: Elastic._hand_over(joiner, "transfer:1:0", 0, (0, 1), 1.0), torch.device("cpu"))  # type: ignore[arg-type]
    job.start()
    exchange.value.fill_(1)
    link.body.woken.set()
    job.join(20)
    assert (exchange.value == 1).all() and not exchange.momentum.any()
    assert job.fault is None and (job.result["body"][0] == 7).all() and (job.result["body"][1] == 7).all()
    exchange.accept(job.result["body"])
    assert (exchange.value == 7).all() and (exchange.momentum == 7).all()


def test_nobody_goes_on_without_the_store(corpus: Corpus, tmp_path: Path) -> None:
    """Silo 0, which serves it, is killed: the other says so and ends."""
    configs = elastic_configs(corpus, tmp_path, [{}, {}], rounds=3)
    killed, told = run_silos(configs, [1, 1], {0: fault.dies_in_step(2)}, dying=(0,))
    assert killed is None
    assert told.startswith("FederationError: the federation's store at federation.address is gone")


def test_a_silo_that_is_there_already_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    """The same index twice: the second finds the first alive, and the first trains on."""
    configs = elastic_configs(corpus, tmp_path, [{}, {}], rounds=2)
    second = configs[1].model_copy(update={"run_dir": tmp_path / "second"})
    faults = {1: fault.sleeps(0, 7), 2: fault.waits_for_file(configs[0].run_dir / "plan.json")}
    results = run_silos([*configs, second], [1, 1, 1], faults)
    assert results[:2] == [True, True]
    assert (
        results[2]
        == "FederationError: silo 1 is in the federation already; start each launch with a federation.silo of its own"
    )


def test_any_silo_may_be_lost_where_none_serves_the_store(corpus: Corpus, tmp_path: Path) -> None:
    """`tools/rendezvous.py` serves it, and silo 0 is killed."""
    configs = elastic_configs(corpus, tmp_path, [{}, {}], rounds=3, serve=False)
    address = configs[0].federation.address
    assert address is not None
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    tool = subprocess.Popen([sys.executable, str(TOOL), address], stdout=subprocess.DEVNULL, env=environment)
    try:
        assert run_silos(configs, [1, 1], {0: fault.dies_in_step(4)}, dying=(0,)) == [None, True]
    finally:
        tool.kill()
        tool.wait()
    assert members_by_round(configs[1]) == {0: [0, 1], 1: [1], 2: [1]}
    assert_mean_of([configs[0], configs[1]], [1], 1)


def test_saving_within_rounds_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    (config, _) = elastic_configs(corpus, tmp_path, [{}, {}], rounds=2)
    values = config.model_dump(mode="json")
    values["checkpoint"]["save_interval_unit"] = "steps"
    with pytest.raises(ConfigError, match="set checkpoint.save_interval_unit: rounds"):
        validate_config(values, "test")
