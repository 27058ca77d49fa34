"""Who is in the federation, agreed over its store alone, where silos may be lost, be late, and come again.

A silo shows life by a counter that a thread of its leader raises. At a *stage* (an exchange, a handing over of state)
silos report; the first that sees everyone there, lost or late writes down who stands, and all obey. After the work each
of them votes, and it counts only where all voted for it. What differs between clocks is thereby decided once, by
`compare_set`. A silo's *generation* grows each time it joins: one that was started again is not the one that was lost.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_dept.common.errors import FederationError

BEAT_SECONDS = 1.0
POLL_SECONDS = 0.1
KEPT_ROUNDS = 3
"""A silo that was stopped, not ended, may still look at a round this far back; what is older it finds closed."""

Members = dict[int, int]
"""Silo -> its generation."""


class Leaving(Exception):
    """This silo was asked to stop while it waited for others."""


class Keys:
    """The store's verbs on plain values; `FederationError` for everyone where the store is gone."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def put(self, key: str, value: Any) -> None:
        self._guarded(lambda: self._store.set(key, json.dumps(value)))

    def look(self, key: str) -> Any:
        """The value; None where there is none."""
        return self._guarded(lambda: json.loads(self._store.get(key)) if self._store.check([key]) else None)

    def claim(self, key: str, value: Any) -> Any:
        """Write where nobody has written: what stands then."""
        return json.loads(self._guarded(lambda: self._store.compare_set(key, "", json.dumps(value))))

    def count(self, key: str, step: int = 0) -> int:
        """Add to a counter; its value."""
        return int(self._guarded(lambda: self._store.add(key, step)))

    def forget(self, outdated: Callable[[str], bool]) -> None:
        """Delete all keys that are `outdated`."""
        for key in self._guarded(self._store.list_keys):
            if outdated(key):
                self._guarded(lambda key=key: self._store.delete_key(key))  # type: ignore[misc]

    @staticmethod
    def _guarded(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except RuntimeError as error:
            raise FederationError(
                f"the federation's store at federation.address is gone ({str(error).strip().splitlines()[0]}); start "
                "the silo or tool that serves it, and all silos, again: they go on from their last checkpoints"
            ) from error


@dataclass(frozen=True)
class Standing:
    """Who takes part in a stage: `members` with their `reports`, and of those expected in vain why (`missing`)."""

    members: Members
    reports: dict[int, Any]
    missing: dict[int, str]


@dataclass(frozen=True)
class NextRound:
    """Who begins a round: `members` who have its state, `joiners` who are to be given it, `gone` who were members."""

    round: int
    members: Members
    joiners: Members
    gone: dict[int, str]


class Membership:
    """One silo's hand in the agreement. Only its leader waits, votes and proposes; any rank may look at decisions."""

    def __init__(self, store: dist.Store, silo: int, silos: int, silence_seconds: float) -> None:
        """`silence_seconds`: a silo that shows no life for longer is lost."""
        self._store = store
        self._keys = Keys(store)
        self.silo = silo
        self._silos = silos
        self._silence = silence_seconds
        self.generation = 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def is_taken(self) -> bool:
        """Whether another process is this silo already: waits for a sign of life where one was there before."""
        if self._keys.count(f"arrivals-{self.silo}", 1) == 1:
            return False
        generation = self._keys.count(f"generation-{self.silo}")
        end = time.monotonic() + self._silence + 2 * BEAT_SECONDS
        before = self._keys.count(f"beat-{self.silo}")
        while time.monotonic() < end:
            if self._keys.look(f"left-{self.silo}") == generation:
                return False
            if self._keys.count(f"beat-{self.silo}") != before:
                return True
            time.sleep(POLL_SECONDS)
        return False

    def enter(self) -> None:
        """Take a new generation and begin to show life."""
        self.generation = self._keys.count(f"generation-{self.silo}", 1)
        if self._heart is None:
            # A connection of its own: another thread's long wait must not look like death.
            arguments = (self._store.clone(),)  # type: ignore[attr-defined]  # torch's stubs lack it
            self._heart = threading.Thread(target=self._beat, args=arguments, name="sign of life", daemon=True)
            self._heart.start()

    def start(self, rounds: Mapping[int, int], generations: Members) -> NextRound:
        """Agree on how the federation begins: `rounds` each silo's checkpoint stands at; the furthest give the others.

        The first silo's view counts; one that was started again since is in nobody's and asks to be let in.
        """
        furthest = max(rounds.values())
        own = {
            "round": furthest,
            "members": _packed({silo: generations[silo] for silo in rounds if rounds[silo] == furthest}),
            "joiners": _packed({silo: generations[silo] for silo in rounds if rounds[silo] < furthest}),
            "gone": [],
        }
        return _next_round(self._keys.claim("start", own))

    def lost(self, silo: int, generation: int) -> str | None:
        """Why a silo that was a member as `generation` is one no more; None where it shows life."""
        if silo == self.silo:
            return None if generation == self.generation else "joined again"
        if self._keys.look(f"left-{silo}") == generation:
            return "left"
        if self._keys.count(f"generation-{silo}") != generation:
            return "joins again"
        beat, now = self._keys.count(f"beat-{silo}"), time.monotonic()
        seen, since = self._seen.get(silo, (-1, now))
        if beat != seen:
            self._seen[silo] = (beat, now)
        elif now - since > self._silence:
            return f"no sign of life for {now - since:.0f} s"
        return None

    def gather(
        self, stage: str, round: int, expected: Members, report: Any, limit: float, asked: Callable[[], bool]
    ) -> Standing | None:
        """Report for a stage and learn who takes part; None where this silo has been left out.

        `limit`: seconds that others are waited for from now on. Raises `Leaving` where `asked` says so meanwhile.
        """
        if self._is_past(round):
            return None
        self._keys.put(f"{stage}/ready-{self.silo}", [self.generation, report])
        end = time.monotonic() + limit
        while (standing := self._keys.look(f"{stage}/standing")) is None:
            if asked():
                raise Leaving
            late = None if time.monotonic() < end else f"late by more than {limit:.0f} s"
            self._propose(stage, expected, late)
            if self._keys.look(f"{stage}/standing") is None:
                time.sleep(POLL_SECONDS)
        members = _unpacked(standing["members"])
        if members.get(self.silo) != self.generation or self._is_past(round):
            return None
        reports = {silo: self._keys.look(f"{stage}/ready-{silo}")[1] for silo in members}
        return Standing(members, reports, dict(standing["missing"]))

    def _propose(self, stage: str, expected: Members, late: str | None) -> None:
        """Propose those who are there, once nobody is left to wait for."""
        there, missing = {}, {}
        for silo, generation in expected.items():
            reason = self.lost(silo, generation)
            ready = self._keys.look(f"{stage}/ready-{silo}")
            if reason is None and ready is not None and ready[0] == generation:
                there[silo] = generation
            elif reason is None and late is None:
                return
            else:
                missing[silo] = reason or late
        self._keys.claim(f"{stage}/standing", {"members": _packed(there), "missing": list(missing.items())})

    def vote(self, stage: str, fine: bool) -> None:
        """Say whether this silo is ready to commit."""
        self._keys.put(f"{stage}/vote-{self.silo}", fine)

    def decision(self, stage: str) -> bool | None:
        """Whether a stage counts, where that is decided."""
        value: bool | None = self._keys.look(f"{stage}/decision")
        return value

    def watch(self, stage: str, members: Members) -> bool | None:
        """`decision`, having decided where all have voted, one against it, or one was lost before it voted."""
        decision = self.decision(stage)
        if decision is not None:
            return decision
        votes = {silo: self._keys.look(f"{stage}/vote-{silo}") for silo in members}
        if all(votes.values()):
            return bool(self._keys.claim(f"{stage}/decision", True))
        failed = any(vote is False for vote in votes.values())
        if failed or any(vote is None and self.lost(silo, members[silo]) for silo, vote in votes.items()):
            return bool(self._keys.claim(f"{stage}/decision", False))
        return None

    def settle(self, stage: str, members: Members, limit: float) -> bool:
        """Wait for a stage's decision, at most `limit` seconds: then it counts not."""
        end = time.monotonic() + limit
        while (decision := self.watch(stage, members)) is None:
            if time.monotonic() > end:
                return bool(self._keys.claim(f"{stage}/decision", False))
            time.sleep(POLL_SECONDS)
        return decision

    def advance(self, round: int, members: Members, patience: float, asked: Callable[[], bool]) -> NextRound:
        """Agree on who begins `round`: those of `members` who live, and those who ask to join.

        `patience`: seconds that living silos which are no members are given to ask, at the end of the run.
        """
        end = time.monotonic() + patience
        joiners, hesitant = self._requests(members)
        while hesitant and not asked() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            joiners, hesitant = self._requests(members)
        gone = {silo: reason for silo, of in members.items() if (reason := self.lost(silo, of)) is not None}
        own = {
            "round": round,
            "members": _packed({silo: of for silo, of in members.items() if silo not in gone}),
            "joiners": _packed(joiners),
            "gone": list(gone.items()),
        }
        agreed = _next_round(self._keys.claim(f"next-{round}", own))
        self._close(round)
        for silo, generation in agreed.joiners.items():
            self._keys.put(f"admitted-{silo}-{generation}", _as_plain(agreed))
        return agreed

    def _requests(self, members: Members) -> tuple[Members, bool]:
        """Who asks to join, and whether anybody lives who is no member and has not asked."""
        joiners, hesitant = {}, False
        for silo in range(self._silos):
            if silo in members:
                continue
            generation = self._keys.count(f"generation-{silo}")
            if self._has_ended(silo, generation) or self.lost(silo, generation) is not None:
                continue
            if self._keys.look(f"request-{silo}") == generation:
                joiners[silo] = generation
            else:
                hesitant = True
        return joiners, hesitant

    def ask_to_join(self) -> None:
        """Ask to be let in at the next round, as a new generation."""
        self.enter()
        self._keys.put(f"request-{self.silo}", self.generation)

    def await_admission(self, asked: Callable[[], bool]) -> NextRound:
        """Wait until the others let this silo in.

        Raises `Leaving` where `asked` says so, `FederationError` where nobody is left who could.
        """
        hopeless_since = None
        while (admitted := self._keys.look(f"admitted-{self.silo}-{self.generation}")) is None:
            if asked():
                raise Leaving
            if any(self._can_admit(silo) for silo in range(self._silos) if silo != self.silo):
                hopeless_since = None
            else:
                hopeless_since = hopeless_since or time.monotonic()
                if time.monotonic() - hopeless_since > self._silence:
                    raise FederationError(
                        f"silo {self.silo} finds no silo in training that could let it in: the others have finished, "
                        "are lost or wait too; where the run has not finished, end all silos and what serves "
                        "federation.address, and start all again"
                    )
            time.sleep(POLL_SECONDS)
        return _next_round(admitted)

    def _can_admit(self, silo: int) -> bool:
        generation = self._keys.count(f"generation-{silo}")
        if self._has_ended(silo, generation) or self.lost(silo, generation) is not None:
            return False
        asks = self._keys.look(f"request-{silo}") == generation
        return not asks or self._keys.look(f"admitted-{silo}-{generation}") is not None

    def leave(self, finished: bool) -> None:
        """Say that this silo ends, having done its last round or not, and show no more life."""
        self._keys.put(f"{'finished' if finished else 'left'}-{self.silo}", self.generation)
        self.close()

    def close(self) -> None:
        """Show no more life."""
        self._ended.set()
        if self._heart is not None:
            self._heart.join()

    def await_others(self, limit: float | None = None) -> None:
        """Wait until every other silo has ended or is lost, at most `limit` seconds."""
        end = None if limit is None else time.monotonic() + limit
        others = [silo for silo in range(self._silos) if silo != self.silo]
        while others and (end is None or time.monotonic() < end):
            generations = {silo: self._keys.count(f"generation-{silo}") for silo in others}
            others = [
                silo
                for silo, generation in generations.items()
                if not self._has_ended(silo, generation) and self.lost(silo, generation) is None
            ]
            time.sleep(POLL_SECONDS)

    def _has_ended(self, silo: int, generation: int) -> bool:
        return self._keys.look(f"finished-{silo}") == generation

    def _is_past(self, round: int) -> bool:
        """Whether the federation has gone beyond a round: what was decided in it may be deleted already."""
        return self._keys.count("rounds-closed") > round

    def _close(self, round: int) -> None:
        """Rounds before `round` are over; of those long past no key stays."""
        behind = round - self._keys.count("rounds-closed")
        if behind <= 0 or self._keys.claim(f"closing-{round}", self.silo) != self.silo:
            return
        self._keys.count("rounds-closed", behind)
        self._keys.forget(lambda key: 0 <= _round_of(key) < round - KEPT_ROUNDS)

    def _beat(self, store: dist.Store) -> None:
        while True:
            try:
                store.add(f"beat-{self.silo}", 1)
            except RuntimeError:
                return  # whoever needs the store finds out himself
            if self._ended.wait(BEAT_SECONDS):
                return


def stage_name(what: str, round: int, attempt: int) -> str:
    """A stage's keys all begin with this; `_round_of` finds the round in it."""
    return f"{what}:{round}:{attempt}"


def _round_of(key: str) -> int:
    """The round that a key is of; -1 for those that stay."""
    for prefix in ("next-", "closing-"):
        if key.startswith(prefix):
            return int(key.removeprefix(prefix))
    parts = key.split("/")[0].split(":")
    return int(parts[1]) if len(parts) == 3 else -1


def _packed(members: Members) -> list[list[int]]:
    return [[silo, members[silo]] for silo in sorted(members)]


def _unpacked(pairs: list[list[int]]) -> Members:
    return {silo: generation for silo, generation in pairs}


def _next_round(values: dict[str, Any]) -> NextRound:
    return NextRound(values["round"], _unpacked(values["members"]), _unpacked(values["joiners"]), dict(values["gone"]))


def _as_plain(agreed: NextRound) -> dict[str, Any]:
    return {
        "round": agreed.round,
        "members": _packed(agreed.members),
        "joiners": _packed(agreed.joiners),
        "gone": list(agreed.gone.items()),
    }
