"""What a rank makes of another's signs of life; real deaths are in test_failures."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_dept.training import watch
from megatron_dept.training.processes import has_ended, own_process
from megatron_dept.training.watch import FailureWatch, Roster


def process_of(pid: int) -> str:
    """What that process would call itself."""
    own = own_process()
    assert own is not None
    start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return " ".join([*own.split()[:2], str(pid), start])


def test_a_process_that_was_killed_has_ended_before_and_after_it_is_reaped() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = process_of(child.pid)
    assert has_ended(process) is False
    child.send_signal(signal.SIGSTOP)
    assert has_ended(process) is False
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(process) is True, "its parent has not asked after it"
    child.wait()
    assert has_ended(process) is True


def test_a_process_of_that_number_which_began_at_another_time_is_another() -> None:
    own = own_process()
    assert own is not None and has_ended(own) is False
    assert has_ended(own[:-1] + str((int(own[-1]) + 1) % 10)) is True


def test_of_another_machine_nothing_is_known() -> None:
    own = own_process()
    assert own is not None and has_ended("other" + own) is None


class Calls:
    """A store that counts requests, and has nothing."""

    def __init__(self) -> None:
        self.requests = 0

    def clone(self) -> "Calls":
        return self

    def set(self, key: str, value: str) -> None:
        self.requests += 1

    def add(self, key: str, step: int) -> int:
        self.requests += 1
        return 0

    def get(self, key: str) -> bytes:
        self.requests += 1
        return b"elsewhere 1 2"

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        return True


@pytest.mark.parametrize("ranks", [2, 400, 1000, 10_000])
def test_however_many_ranks_one_store_is_not_overrun(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """At most 1,000 ranks a second, or two beats of fewer; each has a few requests, whatever their number."""
    monkeypatch.setattr(watch.threading.Thread, "start", lambda self: None)
    store = Calls()
    each = FailureWatch(store, Roster(5 % ranks, tuple(map(str, range(ranks))), keeps_store=False, keeper=0))  # type: ignore[arg-type]
    each._beat(store, 0.1)  # type: ignore[arg-type]
    store.requests = 0
    each._beat(store, 0.1)  # type: ignore[arg-type]
    assert store.requests <= 5
    assert ranks / each._interval <= 1000
    assert each._interval == max(0.5, ranks / 1000)
    # Noticed late enough to be sure, and, up to 1,000 ranks, early enough to end within 30 s.
    assert each._silence >= 12 * each._interval
    if ranks <= 1000:
        assert each._silence + 2 * each._interval + watch.GRACE_SECONDS + each._patience <= 30


def test_a_process_alone_watches_nobody() -> None:
    alone = FailureWatch(None, Roster(0, ("silo 0, rank 0",), keeps_store=True))
    with alone.phase("exchange"):
        assert alone.explain("lost a peer") == (
            "lost a peer; look at that rank's log, then start again: the run resumes from its last checkpoint"
        )
    alone.tell("a failure")
    alone.close()


def test_a_loss_that_no_rank_accounts_for_is_told_as_it_was_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both live, the line between them is broken: the one that noticed says so, and the other hears it."""
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    both = Roster(0, ("silo 0, rank 0", "silo 1, rank 1"), keeps_store=False, keeper=0)
    first, second = FailureWatch(store, both), FailureWatch(store, replace(both, rank=1))
    with first.phase("exchange"):
        assert first.explain("lost a peer").startswith("lost a peer; look at")
    with second.phase("meeting"):
        heard = second.explain("lost another")
    assert heard.startswith(
        "silo 0, rank 0 failed in phase exchange (lost a peer); noticed in phase meeting: lost another;"
    )
