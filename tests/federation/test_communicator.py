"""What the collectives return, what they charge to the ledger, and what they say when a peer is gone."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dept.common.errors import FederationError
from megatron_dept.federation.communicator import Alone, Communicator, GroupCommunicator
from megatron_dept.federation.ledger import all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes
from megatron_dept.topology.launch import Launch
from tests.federation.groups import Groups, join_groups, join_silos, meet, over_gloo
from tests.support.distributed import run_ranks

SECONDS_TO_NOTICE = 20.0
"""Far below the groups' timeout of 60 s: a closed connection is noticed at once, a hang is not."""


def _collectives(launch: Launch, staged: bool) -> dict[str, Any]:
    """Each collective once on 3 ranks: (result, bytes that the ledger charged this rank for it).

    `staged`: tensors take the way of a GPU's over gloo, through other memory and back; here it is host memory too.
    """
    connect = over_gloo(meet(launch), launch.rank)
    groups = join_silos(connect, "equal", launch.rank, (1, 1, 1), among_peers=True)
    peers, rank = groups.peers, launch.rank
    if staged:
        assert isinstance(peers, GroupCommunicator)
        peers._reached = torch.clone  # type: ignore[method-assign]
    groups.ledger.trace = []
    seen: dict[str, Any] = {}

    def record(name: str, result: Any) -> None:
        seen[name] = (result, groups.ledger.take())

    # Rank r sends r + 1 rows to every rank, 2 columns each, of value 10 * sender + receiver.
    send = torch.cat([torch.full((rank + 1, 2), float(10 * rank + to)) for to in range(3)])
    record("all_to_all", peers.all_to_all(send, [rank + 1] * 3, [1, 2, 3], "body").tolist())
    record("all_to_all of nothing", peers.all_to_all(torch.empty(0, 2), [0] * 3, [0] * 3, "body").tolist())
    record("all_gather", peers.all_gather(torch.tensor([rank, rank + 10.0]).bfloat16(), "embedding").tolist())
    record("started", _started(peers))
    value = torch.full((6,), float(rank))
    peers.all_reduce_sum(value, "gradient")
    record("all_reduce", value.tolist())
    value = torch.tensor([rank, -rank, 1.0])
    peers.all_reduce_max(value, "activation")
    record("largest", value.tolist())
    record("reduce_scatter", peers.reduce_scatter_sum(torch.arange(6.0) + rank, "gradient").tolist())
    value = torch.full((5,), float(rank))
    peers.broadcast(value, 1, "position")
    record("broadcast", value.tolist())
    peers.broadcast(torch.empty(0), 1, "position")
    record("broadcast of nothing", None)
    record("objects", peers.all_gather_object({"rank": rank, "name": "x" * rank}))
    peers.barrier()
    record("barrier", None)
    peers.wait_for_all(lambda: None)
    record("waiting", None)
    seen["trace"] = groups.ledger.trace
    seen |= _with_a_silo_of_two(join_silos(connect, "unequal", rank, (1, 2), among_peers=False))
    return seen


def _started(peers: Communicator) -> list[list[float]]:
    """Three under way at once, waited for in order: rank r sends r elements to every other, then r + 1, then nothing;
    its own entries stay as they are."""
    seen, pending = [], []
    for extra in (0, 1):
        send = [torch.full((peers.rank + extra,), 10.0 * peers.rank + to) for to in range(peers.size)]
        receive = [torch.full((sender + extra,), -1.0) for sender in range(peers.size)]
        pending.append((peers.start_all_to_all(send, receive, "body"), receive))
    receive = [torch.full((2,), -1.0) for _ in range(peers.size)]
    pending.append((peers.start_all_gather(torch.full((2,), float(peers.rank)), receive, "position"), receive))
    for under_way, received in pending:
        under_way.wait()
        seen.append(torch.cat(received).tolist())
    whole, mine = torch.arange(6.0) + peers.rank, torch.empty(2)
    peers.start_reduce_scatter_sum(whole, mine, "gradient").wait()
    return [*seen, mine.tolist()]


def _with_a_silo_of_two(groups: Groups) -> dict[str, Any]:
    """Slices that ranks 1 and 2 send each other do not leave their silo, though all three are one group."""
    wide, charged = groups.wide, {}
    wide.all_to_all(torch.zeros(9), [2, 3, 4], [2 + wide.rank] * 3, "body")
    charged["to all"] = groups.ledger.take()
    wide.all_gather(torch.zeros(2), "body")
    charged["gathered"] = groups.ledger.take()
    wide.broadcast(torch.zeros(2), 2, "body")
    charged["told"] = groups.ledger.take()
    return {"silo of two": charged}


@pytest.fixture(scope="module", params=[False, True], ids=["direct", "staged"])
def collectives(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(3, _collectives, request.param)


def test_collectives_return_what_ranks_sent_in_rank_order(collectives: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(collectives):
        rows = [[float(10 * sender + rank)] * 2 for sender in range(3) for _ in range(sender + 1)]
        assert seen["all_to_all"][0] == rows
        assert seen["all_to_all of nothing"][0] == []
        assert seen["all_gather"][0] == [0, 10, 1, 11, 2, 12]
        sent = [-1.0 if sender == rank else 10.0 * sender + rank for sender in range(3)]
        gathered = [-1.0 if sender == rank else float(sender) for sender in range(3) for _ in range(2)]
        expected = [[sent[sender]] * (sender + extra) for extra in (0, 1) for sender in range(3)]
        both = [sum(expected[:3], []), sum(expected[3:], [])]
        assert seen["started"][0] == [*both, gathered, [6.0 * rank + 3, 6.0 * rank + 6]]
        assert seen["all_reduce"][0] == [3.0] * 6
        assert seen["largest"][0] == [2, 0, 1]
        assert seen["reduce_scatter"][0] == [6.0 * rank + 3, 6.0 * rank + 6]
        assert seen["broadcast"][0] == [1.0] * 5
        assert seen["objects"][0] == [{"rank": other, "name": "x" * other} for other in range(3)]


def test_ledger_charges_what_leaves_a_rank(collectives: list[dict[str, Any]]) -> None:
    """By hand: the off-rank slices of an all-to-all, a gather's own slice to each other rank, a ring's all-reduce."""
    for rank, seen in enumerate(collectives):
        charged = {name: record[1] for name, record in seen.items() if isinstance(record, tuple)}
        assert charged["all_to_all"] == {"federation/body": 2 * (rank + 1) * 2 * 4}
        assert sum(charged["all_to_all of nothing"].values()) == 0
        assert charged["all_gather"] == {"federation/embedding": 2 * 2 * 2}
        assert charged["started"] == {
            "federation/body": 2 * 4 * rank + 2 * 4 * (rank + 1),
            "federation/position": 2 * 2 * 4,
            "federation/gradient": 6 * 4 * 2 // 3,
        }
        assert charged["all_reduce"] == {"federation/gradient": 2 * 6 * 4 * 2 // 3}
        assert charged["largest"] == {"federation/activation": 2 * 3 * 4 * 2 // 3}
        assert charged["reduce_scatter"] == {"federation/gradient": 6 * 4 * 2 // 3}
        assert charged["broadcast"] == ({"federation/position": 2 * 5 * 4} if rank == 1 else {})
        assert charged["broadcast of nothing"] == {}
        assert set(charged["objects"]) == set(charged["barrier"]) == {"federation/control"}
        assert charged["barrier"] == charged["waiting"]


def test_what_stays_in_a_silo_is_charged_to_it_even_in_a_group_between_silos(
    collectives: list[dict[str, Any]],
) -> None:
    for rank, seen in enumerate(collectives):
        charged = seen["silo of two"]
        near = {0: 0, 1: 4, 2: 3}[rank]
        assert charged["to all"].get("silo/body", 0) == 4 * near
        assert charged["to all"]["federation/body"] == 4 * (9 - [2, 3, 4][rank] - near)
        assert charged["gathered"].get("silo/body", 0) == (8 if rank else 0)
        assert charged["gathered"]["federation/body"] == (8 if rank else 16)
        assert charged["told"] == ({"federation/body": 8, "silo/body": 8} if rank == 2 else {})


def test_every_collective_is_traced_on_every_rank_with_its_members(collectives: list[dict[str, Any]]) -> None:
    """Also where a rank sends nothing; a broadcast of nothing is none."""
    for seen in collectives:
        assert all(traced.scope == "federation" and traced.members == (0, 1, 2) for traced in seen["trace"])
        assert [(traced.operation, traced.kind) for traced in seen["trace"]] == [
            ("all_to_all", "body"),
            ("all_to_all", "body"),
            ("all_gather", "embedding"),
            ("all_to_all", "body"),
            ("all_to_all", "body"),
            ("all_gather", "position"),
            ("reduce_scatter", "gradient"),
            ("all_reduce_sum", "gradient"),
            ("all_reduce_max", "activation"),
            ("reduce_scatter", "gradient"),
            ("broadcast", "position"),
            ("all_gather", "control"),
            ("all_gather", "control"),
            ("all_reduce_sum", "control"),
            ("wait_for_all", "control"),
        ]


def test_costs_of_collectives() -> None:
    """Over n ranks: all-reduce 2 (n-1)/n, reduce-scatter (n-1)/n of the buffer, all-gather (n-1) own slices."""
    assert (all_reduce_bytes(100, 1), reduce_scatter_bytes(100, 1), all_gather_bytes(100, 1)) == (0, 0, 0)
    assert (all_reduce_bytes(100, 2), reduce_scatter_bytes(100, 2), all_gather_bytes(100, 2)) == (100, 50, 100)
    assert (all_reduce_bytes(400, 4), reduce_scatter_bytes(400, 4), all_gather_bytes(400, 4)) == (600, 300, 1200)


def test_alone_nothing_is_sent_and_values_stay() -> None:
    alone: Communicator = Alone()
    value = torch.arange(4.0)
    assert torch.equal(alone.all_to_all(value, [4], [4], "body"), value)
    assert torch.equal(alone.all_gather(value, "body"), value)
    alone.all_reduce_sum(value, "body")
    alone.all_reduce_max(value, "body")
    assert torch.equal(alone.reduce_scatter_sum(value, "body"), value)
    alone.broadcast(value, 0, "body")
    alone.barrier()
    assert value.tolist() == [0, 1, 2, 3]
    assert alone.all_gather_object("mine") == ["mine"]


OPERATIONS: dict[str, Callable[[Communicator], Any]] = {
    "body": lambda peers: peers.all_to_all(torch.zeros(2), [1, 1], [1, 1], "body"),
    "body, later": lambda peers: peers.start_all_to_all([torch.zeros(2)] * 2, [torch.zeros(2)] * 2, "body").wait(),
    "embedding": lambda peers: peers.all_gather(torch.zeros(2), "embedding"),
    "gradient": lambda peers: peers.all_reduce_sum(torch.zeros(2), "gradient"),
    "position": lambda peers: peers.broadcast(torch.zeros(2), 1, "position"),
    "control": lambda peers: peers.all_gather_object("here"),
    "waiting": lambda peers: peers.wait_for_all(lambda: None),
}


def _come_late(launch: Launch) -> tuple[int, float]:
    peers = join_groups(launch, silos=2, timeout_seconds=1).peers
    peers.barrier()
    calls = 0

    def meanwhile() -> None:
        nonlocal calls
        calls += 1

    began = time.monotonic()
    if launch.rank == 1:
        time.sleep(2.5)
    peers.wait_for_all(meanwhile)
    return calls, time.monotonic() - began


def test_waiting_for_a_silo_at_work_has_no_time_limit() -> None:
    """2.5 times the groups' timeout, and the waiting rank goes on being asked for other things."""
    calls, seconds = run_ranks(2, _come_late)[0]
    assert seconds > 2 and calls > 10


def _lose_a_peer(launch: Launch, silos: int, data: int, kind: str) -> tuple[str, float] | None:
    groups = join_groups(launch, silos, data)
    group = groups.peers if silos > 1 else groups.silo
    group.barrier()
    if launch.rank == 1:
        return None  # The harness ends this process at once, without closing anything.
    began = time.monotonic()
    try:
        OPERATIONS[kind](group)
    except FederationError as error:
        return str(error), time.monotonic() - began
    return "no error", time.monotonic() - began


@pytest.mark.parametrize("kind", OPERATIONS)
def test_a_dead_peer_is_an_error_at_once(kind: str) -> None:
    message, seconds = run_ranks(2, _lose_a_peer, 2, 1, kind)[0]
    exchanged = {"waiting": "control", "body, later": "body"}.get(kind, kind)
    assert "rank 0 of 2 lost a peer in another silo" in message and f"exchanging {exchanged}" in message, message
    assert "resumes from its last checkpoint" in message and "\n" not in message
    assert seconds < SECONDS_TO_NOTICE


def test_a_dead_peer_within_the_silo_is_named_so() -> None:
    message, seconds = run_ranks(2, _lose_a_peer, 1, 2, "gradient")[0]
    assert "lost a peer in this silo" in message
    assert seconds < SECONDS_TO_NOTICE
