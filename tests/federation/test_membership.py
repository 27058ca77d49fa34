"""Agreement over a store alone: silos as threads, or one thread in several silos' shoes, and no process group."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dept.common.errors import FederationError
from megatron_dept.federation import membership
from megatron_dept.federation.membership import Keys, Leaving, Membership, Standing, stage_name
from tests.support.distributed import free_port

SILENCE = 1.0
LONG = 60.0
STAGE = stage_name("exchange", 4, 0)


def never() -> bool:
    return False


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life come ten times within the silence that means death."""
    monkeypatch.setattr(membership, "BEAT_SECONDS", SILENCE / 10)
    monkeypatch.setattr(membership, "POLL_SECONDS", SILENCE / 100)


@contextmanager
def federation(silos: int, store: dist.Store | None = None) -> Iterator[list[Membership]]:
    store = store or dist.HashStore()
    members = [Membership(store, silo, silos, SILENCE) for silo in range(silos)]
    for member in members:
        member.enter()
    try:
        yield members
    finally:
        for member in members:
            member.close()


def at_once(*actions: Callable[[], Any]) -> list[Any]:
    """What the actions return, each called by a thread of its own; an error of one is raised."""
    results: list[Any] = [None] * len(actions)

    def call(index: int) -> None:
        try:
            results[index] = actions[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def everyone(members: list[Membership]) -> dict[int, int]:
    return {member.silo: member.generation for member in members}


def gathering(
    member: Membership, expected: dict[int, int], limit: float = LONG, stage: str = STAGE
) -> Callable[[], Any]:
    round = int(stage.split(":")[1])
    return lambda: member.gather(stage, round, expected, {"of": member.silo}, limit, never)


@pytest.mark.parametrize("over_tcp", [False, True])
def test_all_who_are_there_stand(over_tcp: bool) -> None:
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False) if over_tcp else None
    with federation(3, store) as members:
        found = at_once(*(gathering(member, everyone(members)) for member in members))
        expected = Standing({0: 1, 1: 1, 2: 1}, {silo: {"of": silo} for silo in range(3)}, {})
        assert found == [expected] * 3


def test_a_silo_without_a_sign_of_life_is_lost_and_finds_itself_left_out() -> None:
    with federation(3) as members:
        members[1].close()
        began = time.monotonic()
        found = at_once(*(gathering(members[silo], everyone(members)) for silo in (0, 2)))
        assert time.monotonic() - began > SILENCE
        assert found[0] == found[1]
        assert found[0].members == {0: 1, 2: 1} and found[0].missing[1].startswith("no sign of life for ")
        assert gathering(members[1], everyone(members))() is None


def test_a_silo_that_lives_is_waited_for_up_to_the_limit() -> None:
    with federation(2) as members:
        began = time.monotonic()
        found = gathering(members[0], everyone(members), limit=2 * SILENCE)()
        assert 2 * SILENCE <= time.monotonic() - began < 10 * SILENCE
        assert found.members == {0: 1} and found.missing == {1: "late by more than 2 s"}


def test_a_silo_that_left_is_not_waited_for() -> None:
    with federation(2) as members:
        members[1].leave(finished=False)
        began = time.monotonic()
        assert gathering(members[0], everyone(members))().missing == {1: "left"}
        assert time.monotonic() - began < SILENCE


def test_a_silo_that_reported_and_was_lost_does_not_stand() -> None:
    with federation(3) as members:
        members[1]._keys.put(f"{STAGE}/ready-1", [1, {}])
        members[1].leave(finished=False)
        found = at_once(*(gathering(members[silo], everyone(members)) for silo in (0, 2)))
        assert found[0].members == {0: 1, 2: 1}


def test_a_silo_started_again_is_not_the_one_that_was_a_member() -> None:
    """Though its sign of life goes on."""
    with federation(2) as members:
        expected = everyone(members)
        members[1].ask_to_join()
        assert gathering(members[0], expected)().missing == {1: "joins again"}
        assert gathering(members[1], expected)() is None


def test_whoever_is_asked_to_stop_waits_no_more() -> None:
    with federation(2) as members, pytest.raises(Leaving):
        members[0].gather(STAGE, 4, everyone(members), {}, LONG, lambda: True)


def test_work_counts_only_where_all_voted_for_it() -> None:
    with federation(3) as members:
        expected = everyone(members)

        def settle(member: Membership, stage: str, fine: bool) -> Callable[[], bool]:
            def voted() -> bool:
                member.vote(stage, fine)
                return member.settle(stage, expected, LONG)

            return voted

        assert at_once(*(settle(member, STAGE, True) for member in members)) == [True] * 3
        other = stage_name("exchange", 4, 1)
        assert at_once(*(settle(member, other, member.silo != 1) for member in members)) == [False] * 3


def test_a_silo_lost_before_its_vote_decides_against_and_one_lost_after_it_does_not() -> None:
    with federation(2) as members:
        expected, other = everyone(members), stage_name("exchange", 4, 1)
        members[1].vote(other, True)
        members[1].leave(finished=False)
        members[0].vote(STAGE, True)
        began = time.monotonic()
        assert members[0].settle(STAGE, expected, LONG) is False
        assert time.monotonic() - began < LONG / 2
        members[0].vote(other, True)
        assert members[0].settle(other, expected, LONG) is True
        assert members[1].decision(other) is True and members[1].decision("exchange:4:2") is None


def test_a_silo_that_lives_and_does_not_vote_decides_against_after_the_limit() -> None:
    with federation(2) as members:
        members[0].vote(STAGE, True)
        assert members[0].settle(STAGE, everyone(members), 0.2) is False
        members[1].vote(STAGE, True)
        assert members[1].settle(STAGE, everyone(members), LONG) is False


def test_the_next_round_has_the_survivors_and_those_who_ask() -> None:
    with federation(4) as members:
        expected = everyone(members)
        members[3].ask_to_join()
        members[1].leave(finished=False)
        found = at_once(*(lambda m=members[silo]: m.advance(5, expected | {3: 99}, 0, never) for silo in (0, 2)))
        assert found[0] == found[1]
        assert found[0].members == {0: 1, 2: 1} and found[0].gone == {1: "left", 3: "joins again"}
        del expected[3]
        asked = at_once(*(lambda m=members[silo]: m.advance(6, expected, 0, never) for silo in (0, 2)))
        assert asked[0].joiners == {3: 2} and members[3].await_admission(never) == asked[0]


def test_at_the_end_those_who_live_are_given_time_to_ask() -> None:
    with federation(3) as members:
        expected = {0: 1}
        members[2].leave(finished=True)
        threading.Timer(0.5, members[1].ask_to_join).start()
        assert members[0].advance(5, expected, LONG, never).joiners == {1: 2}
        assert members[0].advance(6, expected | {1: 2}, LONG, never).joiners == {}


def test_nobody_left_to_let_a_silo_in_is_an_error() -> None:
    """Others that wait too cannot help."""
    with federation(3) as members:
        members[0].leave(finished=True)
        for silo in (1, 2):
            members[silo].ask_to_join()
        end = time.monotonic() + 20 * SILENCE
        with pytest.raises(FederationError, match="silo 1 finds no silo in training that could let it in"):
            members[1].await_admission(lambda: time.monotonic() > end)


def test_the_beginning_is_the_first_silos_view_and_the_furthest_give() -> None:
    with federation(3) as members:
        expected = everyone(members)
        found = at_once(*(lambda m=m: m.start({0: 2, 1: 3, 2: 3}, expected) for m in members))
        assert found[0] == found[1] == found[2]
        assert (found[0].round, found[0].members, found[0].joiners) == (3, {1: 1, 2: 1}, {0: 1})
        assert members[0].start({0: 7, 1: 7, 2: 7}, expected) == found[0]


def test_a_place_is_free_where_nobody_shows_life() -> None:
    store = dist.HashStore()
    first, second = (Membership(store, 1, 2, SILENCE) for _ in range(2))
    assert not first.is_taken()
    first.enter()
    assert second.is_taken()
    first.close()
    assert not second.is_taken()
    second.enter()
    assert second.generation == 2
    second.leave(finished=False)
    began = time.monotonic()
    assert not first.is_taken() and time.monotonic() - began < SILENCE


def test_keys_of_rounds_long_past_are_deleted_and_who_looks_for_them_is_left_out() -> None:
    store = dist.HashStore()
    with federation(1, store) as (member,):
        for round in range(8):
            stage = stage_name("exchange", round, 0)
            standing = member.gather(stage, round, {0: 1}, {}, LONG, never)
            assert standing is not None
            member.vote(stage, True)
            assert member.settle(stage, standing.members, LONG)
            member.advance(round + 1, standing.members, 0, never)
        kept = {int(key.split(":")[1]) for key in store.list_keys() if key.startswith("exchange:")}
        assert kept == {5, 6, 7}
        assert member.gather(stage_name("exchange", 1, 0), 1, {0: 1}, {}, LONG, never) is None
        assert store.num_keys() < 40


def test_the_last_waits_for_the_others() -> None:
    with federation(3) as members:
        members[1].leave(finished=True)
        threading.Timer(0.5, lambda: members[2].leave(finished=False)).start()
        began = time.monotonic()
        members[0].await_others()
        assert 0.4 < time.monotonic() - began < 10
        members[0].await_others(limit=0)


class GoneStore(dist.HashStore):
    """What a TCP store is whose server has ended."""

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer\nwith a C++ stack")


def test_a_store_that_is_gone_is_told_in_one_line() -> None:
    with pytest.raises(FederationError, match=r"is gone \(Connection reset by peer\); start the silo or tool"):
        Keys(GoneStore()).look("x")
