"""Communicators for a rank of silos x data, without DeepSpeed and without a default process group."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dept.federation.communicator import Alone, Communicator, GroupCommunicator, join_peers
from megatron_dept.federation.ledger import Ledger
from megatron_dept.topology.launch import Launch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Groups:
    """`place` is (silo, data); rank = silo * data_ranks + data, as in `topology.layout`."""

    place: tuple[int, int]
    peers: Communicator
    silo: Communicator
    ledger: Ledger


def join_groups(launch: Launch, silos: int, data: int = 1, timeout_seconds: float = 60) -> Groups:
    """This rank's peers (same data coordinate, other silos) and its silo, both counted by one ledger."""
    assert launch.world_size == silos * data
    silo, coordinate = divmod(launch.rank, data)
    ledger = Ledger()
    if launch.world_size == 1:
        return Groups((0, 0), Alone(), Alone(), ledger)
    store = dist.TCPStore(launch.address, launch.port, launch.world_size, launch.rank == 0)
    peers: Communicator = Alone()
    inside: Communicator = Alone()
    if silos > 1:
        group = join_peers(store, f"peers-{coordinate}", silo, silos, CPU, timeout_seconds)
        peers = GroupCommunicator(group, ledger, "federation", CPU)
    if data > 1:
        group = join_peers(store, f"silo-{silo}", coordinate, data, CPU, timeout_seconds)
        inside = GroupCommunicator(group, ledger, "silo", CPU)
    return Groups((silo, coordinate), peers, inside, ledger)
