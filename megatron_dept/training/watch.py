"""Noticing that a rank has failed or is gone, which one and in which phase, and ending all ranks that share its store.

Every rank leaves signs of life in the store, with the phase it is in, and looks after its neighbour in rank order: a
few small requests a second and rank, however many ranks there are, and of ranks that die together the first has a
living neighbour. What is found is written down once, and all ranks end with it.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_dept.common.errors import EXIT_USER_ERROR, REMEDY_OF_LOSS, first_line
from megatron_dept.training.processes import has_ended, own_process

Phase = Literal[
    "start-up",
    "round",
    "inner step",
    "meeting",
    "pack",
    "exchange",
    "row exchange",
    "source store",
    "validation",
    "save",
    "end",
]

_ALARM, _VERDICT, _HEARD, _KEEPER, _LEFT = (f"watch/{what}" for what in ("alarm", "verdict", "heard", "keeper", "left"))
_GOODBYE = "goodbye"
BEAT_SECONDS = 0.5
RANKS_A_SECOND = 1000
"""So many ranks at most speak to the one store in a second, four small requests each: a tenth of what it can answer.
Of more ranks each speaks less often."""
SILENCE_SECONDS = 15.0
"""A rank that shows no life for so long is gone, though nothing else is wrong. Half of the 30 s in which a run must
have ended; long enough for a machine that is busy with something else."""
ALARM_BEATS = 4
"""After an alarm something is known to be wrong, and a rank of another machine that misses so many beats is it."""
GRACE_SECONDS = 3.0
"""After another rank's failure the main thread has this long to find out itself and leave in good order."""


@dataclass(frozen=True)
class Roster:
    """Who shares a store: how the ranks are called, and which this process is."""

    rank: int
    names: tuple[str, ...]
    """By rank."""
    keeps_store: bool
    """Whether the store ends with this process."""
    keeper: int | None = None
    """The rank whose process keeps it, where that is known; else that rank tells the others."""
    note: Path | None = None
    """Where that process notes its phase for those who share its disk: they cannot ask its store when it is gone."""
    machine: range = range(0)
    """Ranks that run on this one's machine, as far as known."""


class FailureWatch:
    """Ends this process when any rank of the roster has failed or is gone, whatever the main thread is waiting for.

    A rank deep in its local steps meets the other silos hours later, and one inside a GPU collective whose peer has
    died may never return to Python. So one thread speaks with the store, and a second, which never waits for anything,
    ends the process when there is cause, also where the store no longer answers.
    """

    def __init__(self, store: dist.Store | None, roster: Roster) -> None:
        """`store`: of all ranks that end together, at least two of them; None for a process alone."""
        self._roster = roster
        self._phase: Phase = "start-up"
        self._interval = max(BEAT_SECONDS, len(roster.names) / RANKS_A_SECOND)
        self._silence = max(SILENCE_SECONDS, 3 * ALARM_BEATS * self._interval)
        self._verdict: str | None = None
        self._own_failure: str | None = None
        self._suspects = self._raised = self._alarmed = self._unanswered = False
        self._beats = self._answers = self._hearers = 0
        self._found, self._wake, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._keeper = None if roster.keeper is None else _Pulse(roster.keeper)
        self._neighbour = _Pulse((roster.rank + 1) % len(roster.names))
        self._near = [_Pulse(rank) for rank in roster.machine if rank not in (roster.rank, self._neighbour.rank)]
        # A connection of its own: another thread's long wait must not look like death.
        self._store = store.clone() if store is not None else None  # type: ignore[attr-defined]  # torch's stubs lack it
        self._speaker = threading.Thread(target=self._speak, name="signs of life", daemon=True)
        if self._store is not None:
            self._speaker.start()
            threading.Thread(target=self._watch, name="failure watch", daemon=True).start()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What this rank does meanwhile; an exception leaves it so, as where it happened."""
        before = self._phase
        self._enter(name)
        yield
        self._enter(before)

    def close(self) -> None:
        """Say goodbye: the run has ended well, or its end has been explained."""
        self._closed.set()
        self._wake.set()
        if self._speaker.is_alive() and not self._unanswered:
            self._speaker.join(2 * self._patience)
        if self._roster.note is not None and self._roster.keeps_store:
            with suppress(OSError):
                self._roster.note.unlink()

    def tell(self, message: str) -> None:
        """Tell all ranks that this one has failed; a store that is gone has told them already."""
        own = self._roster.names[self._roster.rank]
        self._own_failure = f"{own} failed in phase {self._phase} ({message})"
        self.close()

    def explain(self, what: str) -> str:
        """Which rank it was, where this one has lost a peer: waits until it is known, for as long as that may take.

        `what`: how this rank noticed. Where no rank is gone, what it noticed is the failure that all others end with.
        """
        if self._store is None:
            return f"{what}; {REMEDY_OF_LOSS}"
        self._suspects = True
        self._wake.set()
        self._found.wait(self._patience)
        if self._verdict is None:
            self.tell(what)
            return f"{what}; {REMEDY_OF_LOSS}"
        self.close()
        return self._story(self._verdict, what)

    @property
    def _patience(self) -> float:
        """After an alarm: until all have heard of it, a rank has missed its beats, and all have heard of that."""
        return (2 * ALARM_BEATS + 2) * self._interval

    def _story(self, verdict: str, what: str) -> str:
        return f"{verdict}; noticed in phase {self._phase}: {what}; {REMEDY_OF_LOSS}"

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        if self._store is not None:
            try:
                # At once: the rank may not live to its next beat.
                self._show_life(self._store)
            except RuntimeError:
                return  # the speaker finds out
            self._keep_note()

    def _keep_note(self) -> None:
        """A disk that refuses is for those to tell who write what counts."""
        note = self._roster.note
        if note is not None and self._roster.keeps_store:
            with suppress(OSError):
                note.write_text(self._phase)

    def _show_life(self, store: dist.Store) -> None:
        store.set(_life(self._roster.rank), f"{self._beats} {self._phase}")

    def _speak(self) -> None:
        store = self._store
        assert store is not None
        try:
            if self._roster.keeps_store:
                store.set(_KEEPER, str(self._roster.rank))
            process = own_process()
            if process is not None:
                store.set(_home(self._roster.rank), process)
            before = time.monotonic()
            while True:
                now = time.monotonic()
                # A process that was itself stopped for long has not listened, so it has missed nothing.
                passed, before = min(now - before, 2 * self._interval), now
                if self._closed.is_set():
                    self._take_leave(store)
                    return
                self._beat(store, passed)
                self._wake.wait(self._interval)
                self._wake.clear()
        except RuntimeError as error:
            self._settle(self._keeper_gone(f"is gone ({first_line(error)})"))

    def _beat(self, store: dist.Store, passed: float) -> None:
        self._beats += 1
        self._show_life(store)
        if self._suspects and not self._raised:
            self._raised = True
            store.add(_ALARM, 1)
        self._alarmed = store.add(_ALARM, 0) > 0
        if self._alarmed and self._verdict is None and store.check([_VERDICT]):
            self._hear(store, store.get(_VERDICT).decode())
        if self._keeper is None and store.check([_KEEPER]):
            self._keeper = _Pulse(int(store.get(_KEEPER)))
        if self._keeper is not None:
            self._keeper.feel(store, passed)
        limit = ALARM_BEATS * self._interval if self._alarmed else self._silence
        # After an alarm each looks at all ranks of its machine: some launchers leave them no second for it.
        for pulse in [self._neighbour, *(self._near if self._alarmed else [])]:
            pulse.feel(store, passed)
            cause = pulse.cause_of_death(limit, self._silence)
            if cause is not None and self._verdict is None:
                name = self._roster.names[pulse.rank]
                self._write_down(store, f"{name} is gone ({pulse.last_seen}; {cause})", gone=1)
        self._answers += 1

    def _take_leave(self, store: dist.Store) -> None:
        if self._own_failure is not None and self._verdict is None:
            self._write_down(store, self._own_failure)
        else:
            store.set(_life(self._roster.rank), f"{_GOODBYE} {self._phase}")
        # What was only sent may be lost with the process; an answer says that it has come.
        store.add(_LEFT, 1)
        end = time.monotonic() + self._patience
        while self._roster.keeps_store and time.monotonic() < end:
            # Without the store the others would take this rank for the one that was lost, or say that they lost it.
            if self._verdict is None:
                done = store.add(_LEFT, 0) >= len(self._roster.names)
            else:
                done = store.add(_HEARD, 0) >= self._hearers
            if done:
                return
            time.sleep(BEAT_SECONDS / 10)

    def _write_down(self, store: dist.Store, verdict: str, gone: int = 0) -> None:
        """The first to write counts, for all. `gone`: ranks that nobody has to wait for, as they cannot hear of it."""
        standing = store.compare_set(_VERDICT, "", f"{gone} {verdict}").decode()
        store.add(_ALARM, 1)
        self._hear(store, standing)

    def _hear(self, store: dist.Store, standing: str) -> None:
        gone, _, verdict = standing.partition(" ")
        self._hearers = len(self._roster.names) - int(gone)
        store.add(_HEARD, 1)
        self._settle(verdict)

    def _settle(self, verdict: str) -> None:
        self._verdict = self._verdict or verdict
        self._found.set()

    def _keeper_gone(self, what: str) -> str:
        if self._keeper is None:
            return f"what keeps the store of all ranks {what}"
        seen, note = self._keeper.last_seen, self._roster.note
        with suppress(OSError):
            seen = f"last seen in phase {note.read_text()}" if note is not None else seen
        name = self._roster.names[self._keeper.rank]
        return f"{name}, which keeps the store of all ranks, {what}, {seen}"

    def _watch(self) -> None:
        before, answers, waited = time.monotonic(), 0, 0.0
        while not self._closed.wait(self._interval / 2):
            now = time.monotonic()
            waited, before = waited + min(now - before, self._interval), now
            if answers != self._answers:
                answers, waited = self._answers, 0.0
            if waited > self._silence:
                self._unanswered = True
                self._settle(self._keeper_gone(f"has not answered for {waited:.0f} s"))
            if self._verdict is None:
                continue
            if self._closed.wait(GRACE_SECONDS):
                return
            name = self._roster.names[self._roster.rank]
            sys.stderr.write(f"error: {name}: {self._story(self._verdict, 'it was waiting or at work')}\n")
            sys.stderr.flush()
            self.close()
            os._exit(EXIT_USER_ERROR)


class _Pulse:
    """What one rank is seen of."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._last: str | None = None
        self._process: str | None = None
        self._silent = 0.0
        self._changed = time.monotonic()

    def feel(self, store: dist.Store, passed: float) -> None:
        """Look again, `passed` seconds after the last time."""
        life = _life(self.rank)
        now = store.get(life).decode() if self._last is not None or store.check([life]) else None
        self._silent += passed
        if now != self._last:
            self._last, self._silent, self._changed = now, 0.0, time.monotonic()
        if self._process is None and store.check([_home(self.rank)]):
            self._process = store.get(_home(self.rank)).decode()

    @property
    def last_seen(self) -> str:
        phase = "start-up" if self._last is None else self._last.partition(" ")[2]
        return f"last seen in phase {phase} {time.monotonic() - self._changed:.0f} s ago"

    def cause_of_death(self, limit: float, limit_where_it_runs: float) -> str | None:
        """Why the rank is taken for gone; None where it lives or has said goodbye.

        A rank of this machine, whose process is known to run, may be silent for `limit_where_it_runs` seconds, others
        for `limit`.
        """
        if self._last is not None and self._last.startswith(_GOODBYE):
            return None
        ended = has_ended(self._process) if self._process is not None else None
        if ended:
            return "its process has ended"
        if self._silent > (limit if ended is None else limit_where_it_runs):
            return "no sign of life since"
        return None


def _life(rank: int) -> str:
    """The key of a rank's signs of life: a count, or goodbye, and its phase."""
    return f"watch/life-{rank}"


def _home(rank: int) -> str:
    """The key of what a rank's process is called on its machine."""
    return f"watch/process-{rank}"
