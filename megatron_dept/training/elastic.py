"""A silo's rounds where silos may be lost: the end of a round with those who are there, and how others come in again.

Between the ends of rounds a silo is a world of its own. At the end it meets those who are left
(`federation.membership`), exchanges with them in the background while it watches for their loss, and takes the step
only where all of them voted for it; what fails is tried again with the survivors, from unchanged value, delta and
momentum. All ranks of a silo call everything here together; its first rank speaks for it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_dept.common.errors import FederationError
from megatron_dept.config.schema import RunConfig
from megatron_dept.dept.averaging import RowMean
from megatron_dept.dept.outer import OuterRule
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World
from megatron_dept.federation.background import Job
from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.federation.exchange import Handed
from megatron_dept.federation.links import Link, Linker
from megatron_dept.federation.membership import POLL_SECONDS, Leaving, Members, NextRound, Standing, stage_name
from megatron_dept.federation.named_exchange import NamedBodyExchange
from megatron_dept.federation.replicated_rows import ReplicatedRowTable
from megatron_dept.federation.shares import Packing, refuse_packed
from megatron_dept.training.body_hash import agree_on_body
from megatron_dept.training.joining import ElasticJoin
from megatron_dept.training.metrics import Metrics
from megatron_dept.training.progress_state import RunProgress
from megatron_dept.training.signals import StopRequest

ATTEMPTS = 4
"""An exchange that fails so often though nobody is lost will not succeed."""
FAREWELL_SECONDS = 10.0
"""A silo that is asked to stop, and serves the store, waits so long for others that may have been asked too."""
ROW_KINDS: Mapping[str, str] = {"token": "embedding", "position": "position"}


def own_exchange(
    world: World, joined: ElasticJoin, engine: SiloEngine, rule: OuterRule, packing: Packing
) -> "BodyExchange | NamedBodyExchange":
    """The body of a silo by itself, of the kind that the federation's shapes ask for; collective within the silo."""
    shards = engine.shards
    if joined.layout.equal:
        return BodyExchange(world.peers, shards.read(), rule, everyone_keeps_momentum=True, packing=packing)
    refuse_packed(packing)
    return NamedBodyExchange(
        world.silo, shards.read(), shards.segments, engine.body_shapes, rule, joined.silo, everyone_keeps_momentum=True
    )


class Elastic:
    """What the trainer's rounds end with. `members`: who is in training with this silo, and their generations."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        joined: ElasticJoin,
        engine: SiloEngine,
        exchange: BodyExchange | NamedBodyExchange,
        tables: Mapping[str, ReplicatedRowTable],
        metrics: Metrics,
        stop: StopRequest,
    ) -> None:
        """`exchange` and `tables`: of this silo alone, with its whole state."""
        self._config = config
        self._world = world
        self._joined = joined
        self._silo = joined.silo
        self._membership = joined.membership
        self._engine = engine
        self._exchange = exchange
        self._tables = tables
        self._metrics = metrics
        self._stop = stop
        place = replace(world.place, silo=joined.silo)
        self._linker = Linker(joined.store, joined.layout, place, world.ledger)
        self._link: Link | None = None
        self._given_up: list[Job] = []
        self._round_seconds: float | None = None
        self._began = time.monotonic()
        self._skipped = 0
        self.members: Members = {}
        self.body_hash = ""
        self.told_bytes: dict[str, int] = {}

    def begin(self, progress: RunProgress) -> bool:
        """Take the place among the others, and their state where they are further on; False where asked to stop."""
        try:
            start = self._lead(self._own_start)
            if start is None or not self._take_over(progress, start):
                self._come_again(progress)
        except Leaving:
            return False
        return True

    def end_round(self, progress: RunProgress) -> dict[str, object] | None:
        """End the round: new global body and shared rows, `progress` at the next round, which may be a later one.

        Returns what the round's log entry says, None where this silo was asked to stop meanwhile.
        """
        try:
            return self._end_round(progress)
        except Leaving:
            return None

    def leave(self, finished: bool) -> None:
        """Say goodbye; where this silo serves the store, stay until the others have ended."""
        for job in self._given_up:
            job.join(self._limit)
        if not self._world.leads_silo:
            return
        try:
            self._membership.leave(finished)
            if self._joined.serves:
                self._membership.await_others(None if finished else FAREWELL_SECONDS)
        except FederationError:
            # Whoever served the store has left first: nobody is left to be told.
            self._membership.close()

    @property
    def _limit(self) -> float:
        """Seconds that others are waited for: as the federation's last round lasted, or as at the start."""
        federation = self._config.federation
        if self._round_seconds is None:
            return federation.join_timeout_seconds
        return max(federation.straggler_minimum_seconds, federation.straggler_factor * self._round_seconds)

    def _asked(self) -> bool:
        return self._stop.asked

    def _lead(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on the silo's first rank, told to all; the others wait as long as it takes."""
        told = None
        if self._world.leads_silo:
            try:
                told = (True, action())
            except Leaving:
                told = (False, None)
        self._world.silo.wait_for_all(self._asked)
        fine, result = self._world.silo.all_gather_object(told)[0]
        if not fine:
            raise Leaving
        return result

    def _own_start(self) -> NextRound | None:
        """How the federation began, if this silo, as it is now, was there."""
        start, membership = self._joined.start, self._membership
        assert start is not None
        everyone = start.members | start.joiners
        return start if everyone.get(self._silo) == membership.generation else None

    def _end_round(self, progress: RunProgress) -> dict[str, object]:
        number, expected = progress.round, self.members
        report = self._report(progress)
        outcome, attempt = None, 0
        while outcome is None:
            stage = stage_name("exchange", number, attempt)
            limit = self._limit
            standing = self._lead(partial(self._membership.gather, stage, number, expected, report, limit, self._asked))
            if standing is None:
                return self._catch_up(progress)
            self._check_bodies(standing)
            self._tell_missing(number, standing.members, standing.missing)
            work = partial(self._prepare, stage, standing, self._link, limit)
            outcome = self._attempt(stage, standing.members, work, limit)
            attempt = self._next_attempt(attempt, expected, standing.members, outcome is not None)
            expected = standing.members
        prepared, totals, told, self._link = outcome
        self._exchange.commit(prepared)
        for part, table in self._tables.items():
            table.commit(totals[part])
        self.told_bytes = self._summed(told)
        self._round_seconds = max(of["seconds"] for of in standing.reports.values())
        entry = self._merge(progress, standing)
        patience = self._limit if progress.round == self._config.dept.rounds else 0.0
        agreed = self._lead(partial(self._advance, progress.round, standing.members, patience))
        if agreed is None or not self._take_over(progress, agreed):
            self._come_again(progress)
        return entry | {"body_hash": self.body_hash}

    def _report(self, progress: RunProgress) -> dict[str, Any]:
        """What this silo has trained in the round, and from which body."""
        return {
            "trained": {name: [progress.steps[name], progress.cursors[name]] for name in progress.done},
            "dropped": list(progress.dropped),
            "skipped": progress.skipped - self._skipped,
            "body_hash": self.body_hash,
            "seconds": time.monotonic() - self._began,
        }

    def _prepare(
        self, stage: str, standing: Standing, link: Link | None, limit: float
    ) -> tuple[Any, dict[str, RowMean], dict[str, int], Link]:
        """In the background: the members' mean deltas of body and rows; changes nothing here.

        `link`: the last round's, which serves again where the same silos take part. Returns it, or a new one, too.
        """
        reports = standing.reports.values()
        sources = sum(len(of["trained"]) - len(of["dropped"]) for of in reports)
        if link is None or link.silos != tuple(sorted(standing.members)):
            link = self._linker.connect(stage, list(standing.members), limit)
        body = self._exchange.among(link.body)
        told = {"body": body.round_bytes if sources else 0}
        prepared, totals = body.prepare(sources), {}
        for part, table in self._tables.items():
            joined = table.among(link.rows, link.row_silos, self._silo)
            told[ROW_KINDS[part]] = joined.round_bytes()
            totals[part] = joined.prepare()
        return prepared, totals, told, link

    def _merge(self, progress: RunProgress, standing: Standing) -> dict[str, object]:
        """The members' counts become everyone's; what the round's log entry says of them."""
        trained: list[str] = []
        dropped: list[str] = []
        progress.skipped = self._skipped
        for report in standing.reports.values():
            for name, (steps, cursor) in report["trained"].items():
                progress.steps[name], progress.cursors[name] = steps, cursor
                trained.append(name)
            dropped += report["dropped"]
            progress.skipped += report["skipped"]
        progress.end_round()
        return {"sources": sorted(trained), "dropped": sorted(dropped), "members": sorted(standing.members)}

    def _advance(self, round: int, members: Members, patience: float) -> NextRound | None:
        """Who begins `round`; None where the others took this silo for lost."""
        agreed = self._membership.advance(round, members, patience, self._asked)
        return agreed if agreed.members.get(self._silo) == self._membership.generation else None

    def _catch_up(self, progress: RunProgress) -> dict[str, object]:
        """This silo has been left out of the round: what it trained in it is lost, and it comes again."""
        number = progress.round
        if self._world.leads_silo:
            self._metrics.warn(
                f"left out of round {number + 1}: the other silos have gone on without this one, which was late or "
                "gave no sign of life; it joins again with their state"
            )
            self._metrics.write("membership", round=number, members=[], reason="left out")
        self._come_again(progress)
        return {"sources": [], "dropped": [], "members": sorted(self.members), "body_hash": self.body_hash}

    def _come_again(self, progress: RunProgress) -> None:
        """Ask to be let in until it has worked. Raises `Leaving`."""

        def ask() -> NextRound:
            self._membership.ask_to_join()
            return self._membership.await_admission(self._asked)

        while True:
            self._link = None
            self._exchange.commit(None)
            for table in self._tables.values():
                table.pending.reset()
            if self._take_over(progress, self._lead(ask)):
                return

    def _take_over(self, progress: RunProgress, agreed: NextRound) -> bool:
        """Begin a round as agreed: joiners are given the state. False where this silo is not among them in the end."""
        expected, attempt = agreed.members | agreed.joiners, 0
        joins = self._silo in agreed.joiners
        self._tell_missing(agreed.round, agreed.members, agreed.gone)
        while coming := sorted(set(expected) & set(agreed.joiners)):
            stage, limit = stage_name("transfer", agreed.round, attempt), self._limit
            report = None if joins else progress.dump()
            standing = self._lead(
                partial(self._membership.gather, stage, agreed.round, expected, report, limit, self._asked)
            )
            if standing is None:
                return False
            givers = sorted(set(standing.members) & set(agreed.members))
            if not givers:
                raise FederationError(
                    f"all silos that had the state of round {agreed.round} are lost; start all silos again: they go on "
                    "from their last checkpoints"
                )
            parties = (givers[0], *(silo for silo in coming if silo in standing.members))
            self._tell_missing(agreed.round, standing.members, standing.missing)
            work = partial(self._hand_over, stage, givers[0], parties, limit)
            handed = self._attempt(stage, standing.members, work, limit)
            attempt = self._next_attempt(attempt, expected, standing.members, handed is not None)
            expected = standing.members
            if handed is not None:
                if joins:
                    self._adopt(progress, standing.reports[givers[0]], handed)
                break
        self.members = expected
        if agreed.joiners:
            self._tell_joined(agreed, expected)
        self._begin_round(progress)
        return True

    def _hand_over(self, stage: str, giver: int, parties: tuple[int, ...], limit: float) -> dict[str, Handed]:
        """In the background: the giver's body and rows, with momentum, for those who join; changes nothing here."""
        if self._silo not in parties or len(parties) == 1:
            return {}
        link = self._linker.connect(stage, parties, limit)
        body = self._exchange.among(link.body)
        handed = {"body": body.hand_over(link.silos.index(giver) if isinstance(body, BodyExchange) else giver)}
        for part, table in self._tables.items():
            handed[part] = table.among(link.rows, link.row_silos, self._silo).hand_over(giver)
        return handed

    def _adopt(self, progress: RunProgress, dumped: dict[str, Any], handed: Mapping[str, Handed]) -> None:
        """Take over the giver's state and counters; the traffic of this silo stays its own."""
        self._exchange.accept(handed["body"])
        for part, table in self._tables.items():
            table.accept(handed[part])
        traffic = progress.traffic
        vars(progress).update(vars(RunProgress.load(dumped)))
        progress.traffic = traffic

    def _begin_round(self, progress: RunProgress) -> None:
        self.body_hash = agree_on_body(self._world, self._engine, self._exchange.value, progress.round)
        self._skipped = progress.skipped
        self._began = time.monotonic()

    def _attempt(self, stage: str, members: Members, work: Callable[[], Any], limit: float) -> Any:
        """Do `work` in the background and vote on it: what it returned where it counts for all, else None."""
        membership, leads = self._membership, self._world.leads_silo
        job = Job(work, self._world.device)
        job.start()
        next_look = 0.0

        def decided() -> bool | None:
            nonlocal next_look
            if time.monotonic() < next_look:
                return None
            next_look = time.monotonic() + POLL_SECONDS
            return membership.watch(stage, members) if leads else membership.decision(stage)

        while job.is_alive() and decided() is not False:
            job.join(POLL_SECONDS / 10)
        fault = "given up" if job.is_alive() else job.fault
        if job.is_alive():
            self._given_up.append(job)
        # While other ranks of this silo are still at it, their peers may be lost.
        self._world.silo.wait_for_all(decided)
        fine = not any(self._world.silo.all_gather_object(fault))

        def settle() -> bool:
            membership.vote(stage, fine)
            return membership.settle(stage, members, limit)

        if self._lead(settle):
            return job.result
        self._link = None
        return None

    def _next_attempt(self, attempt: int, expected: Members, members: Members, done: bool) -> int:
        """The number of the next attempt. Raises `FederationError` where it would fail like the last."""
        silos = len(self._joined.layout.shapes)
        if not done and expected == members and attempt + 1 >= ATTEMPTS + silos:
            raise FederationError(
                f"silo {self._silo} could not exchange with {_listed(members)} in {attempt + 1} attempts though none "
                "of them is lost; check that every silo can reach every other, then start all again"
            )
        return attempt + 1

    def _check_bodies(self, standing: Standing) -> None:
        bodies = {silo: report["body_hash"] for silo, report in standing.reports.items()}
        if len(set(bodies.values())) != 1:
            raise FederationError(
                f"silos began the round with different bodies: {bodies}; this is a fault of memory or network, or of "
                "checkpoints that are not of one run; start again from checkpoints of one run"
            )

    def _summed(self, told: dict[str, int]) -> dict[str, int]:
        every = self._world.silo.all_gather_object(told)
        return {kind: sum(of.get(kind, 0) for of in every) for kind in ("body", *ROW_KINDS.values())}

    def _tell_missing(self, number: int, members: Members, missing: Mapping[int, str]) -> None:
        if not self._world.leads_silo:
            return
        for silo, reason in missing.items():
            what = f"is lost ({reason}) in round {number + 1}"
            if reason.startswith("late"):
                what = f"is left out of round {number + 1} ({reason})"
            text = f"silo {silo} {what}; going on with {_listed(members)}"
            self._metrics.warn(text)
            self._metrics.write("membership", round=number, members=sorted(members), reason=text)

    def _tell_joined(self, agreed: NextRound, members: Members) -> None:
        joined = [silo for silo in agreed.joiners if silo in members]
        if self._world.leads_silo and joined:
            text = f"{_listed(joined)} joined at round {agreed.round + 1}"
            self._metrics.say(f"{text}; going on with {_listed(members)}")
            self._metrics.write("membership", round=agreed.round, members=sorted(members), reason=text)


def _listed(silos: Mapping[int, object] | list[int]) -> str:
    return ("silo " if len(silos) == 1 else "silos ") + ", ".join(str(silo) for silo in sorted(silos))
