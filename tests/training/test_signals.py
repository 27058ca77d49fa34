"""Asked to stop, on whichever rank: all of them end together, within a step, at a checkpoint."""

import signal

import pytest

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.common.errors import FederationError
from megatron_dept.training.signals import StopRequest
from tests.support.commands import run_command
from tests.support.faults import is_sent
from tests.support.runs import metrics, small_config, train


@pytest.fixture
def handlers():
    """Signal handlers as they were, after a test that sets them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("rank", [0, 3])
def test_one_rank_of_four_is_asked_and_all_stop(corpus, tmp_path, number, rank):
    """Two silos of two ranks; only the one that was asked knows at first, and it leads its silo or does not."""
    dept = {"rounds": 2, "n_local": 200}
    config = small_config(corpus, tmp_path / "run", source_names=["latin", "greek"], parallel={"silos": 2}, dept=dept)
    outcomes = run_command(config, 4, fault=is_sent(number, rank, step=3))
    assert [(outcome.code, outcome.stderr) for outcome in outcomes] == [(0, "")] * 4
    assert "stopped as asked; the same command goes on from" in outcomes[0].stdout
    steps = {source: 0 for source in ("latin", "greek")}
    for line in metrics(config.run_dir, "step"):
        steps[line["source"]] += 1
    # The silo that was asked stops with the step it was asked in; the other hears of it at the start of one of its own.
    assert steps[("latin", "greek")[rank // 2]] == 4
    assert 1 <= steps[("greek", "latin")[rank // 2]] < 200
    progress = Checkpoint.open(config.run_dir).manifest["progress"]
    assert (
        progress["steps"] == steps and {name: flight["step"] for name, flight in progress["flights"].items()} == steps
    )


def test_a_second_ctrl_c_does_not_wait(corpus, tmp_path):
    config = small_config(corpus, tmp_path / "run")
    (outcome,) = run_command(config, 1, fault=is_sent(signal.SIGINT, rank=0, step=1, times=2))
    assert (outcome.code, outcome.stderr) == (130, "stopped by the user\n")
    assert not (config.run_dir / "checkpoints").exists()
    train(config)
    assert Checkpoint.open(config.run_dir).manifest["round"] == 2


def test_a_store_that_is_gone_is_a_lost_rank(handlers):
    class Gone:
        def check(self, keys):
            raise RuntimeError("Connection reset by peer\nframe #0: ...")

        set = check

    request = StopRequest(Gone(), polls=True)
    with pytest.raises(FederationError, match=r"rank 0, .* is gone \(Connection reset by peer\); look at "):
        _ = request.asked


def test_only_ranks_that_poll_ask_the_store(handlers):
    class Store:
        def __init__(self):
            self.keys = set()
            self.checks = 0

        def check(self, keys):
            self.checks += 1
            return set(keys) <= self.keys

        def set(self, key, value):
            self.keys.add(key)

    store = Store()
    follower, leader = StopRequest(store, polls=False), StopRequest(store, polls=True)
    assert not follower.asked and not leader.asked and store.checks == 1
    follower._remember(signal.SIGTERM, None)
    assert not leader.asked, "nobody has passed it on yet"
    assert follower.asked and leader.asked
    assert StopRequest(None, polls=True).asked is False
