"""Communicators for a rank of some silos, without DeepSpeed and without a default process group."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dept.federation.communicator import Alone, Communicator, GroupCommunicator, join_peers
from megatron_dept.federation.ledger import Ledger, Scope
from megatron_dept.topology.launch import Launch

CPU = torch.device("cpu")

Connect = Callable[[str, Ledger, Scope, tuple[int, ...], tuple[int, ...]], Communicator]
"""(name, ledger, scope, members, near) -> the communicator of these ranks of the launch; see `GroupCommunicator`."""


@dataclass(frozen=True)
class Groups:
    """`place` is (silo, rank in it); rank of the launch = silo by silo, as in `topology.layout`.

    `peers`: the same rank of the other silos, `wide`: everyone; whichever was joined.
    """

    place: tuple[int, int]
    peers: Communicator
    wide: Communicator
    silo: Communicator
    ledger: Ledger


def meet(launch: Launch) -> dist.Store | None:
    """The launch's store."""
    if launch.world_size == 1:
        return None
    return dist.TCPStore(launch.address, launch.port, launch.world_size, launch.rank == 0)


def members_of(ranks_of_silos: tuple[int, ...], silo: int) -> tuple[int, ...]:
    """The launch's ranks of a silo."""
    first = sum(ranks_of_silos[:silo])
    return tuple(range(first, first + ranks_of_silos[silo]))


def place_of(ranks_of_silos: tuple[int, ...], rank: int) -> tuple[int, int]:
    """(silo, rank in it) of a rank of the launch."""
    silo = next(silo for silo in range(len(ranks_of_silos)) if rank in members_of(ranks_of_silos, silo))
    return silo, rank - members_of(ranks_of_silos, silo)[0]


def over_gloo(store: dist.Store | None, rank: int, timeout_seconds: float = 60) -> Connect:
    """Connects ranks by gloo, through the launch's store."""

    def connect(
        name: str, ledger: Ledger, scope: Scope, members: tuple[int, ...], near: tuple[int, ...]
    ) -> Communicator:
        assert store is not None
        group = join_peers(store, name, members.index(rank), len(members), CPU, timeout_seconds)
        return GroupCommunicator(group, ledger, scope, CPU, members, near)

    return connect


def join_silos(connect: Connect, name: str, rank: int, ranks_of_silos: tuple[int, ...], among_peers: bool) -> Groups:
    """This rank's groups in silos of so many ranks, counted by one ledger; `name` keeps several in a store apart."""
    silo, inside = place_of(ranks_of_silos, rank)
    ledger = Ledger()
    own = members_of(ranks_of_silos, silo)

    def join(what: str, scope: Scope, members: tuple[int, ...], near: tuple[int, ...] = ()) -> Communicator:
        return Alone() if len(members) == 1 else connect(f"{name}-{what}", ledger, scope, members, near)

    every = tuple(range(sum(ranks_of_silos)))
    silos = range(len(ranks_of_silos))
    peers: Communicator = Alone()
    wide: Communicator = Alone()
    if among_peers:
        peers = join(f"peers-{inside}", "federation", tuple(members_of(ranks_of_silos, s)[inside] for s in silos))
    else:
        wide = join("wide", "federation", every, near=own)
    return Groups((silo, inside), peers, wide, join(f"silo-{silo}", "silo", own), ledger)


def join_groups(launch: Launch, silos: int, data: int = 1, timeout_seconds: float = 60) -> Groups:
    """This rank's peers (same data coordinate, other silos) and its silo, both counted by one ledger."""
    assert launch.world_size == silos * data
    connect = over_gloo(meet(launch), launch.rank, timeout_seconds)
    return join_silos(connect, "equal", launch.rank, (data,) * silos, True)
