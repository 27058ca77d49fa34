"""A launch's ranks meet: each silo as a default process group of its own, peers beside it, or an error in time."""

import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_dept.common.errors import FederationError
from megatron_dept.engine.world import World, start_world
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout
from tests.support.distributed import run_ranks


def _meet(launch: Launch) -> dict[str, Any]:
    world: World = start_world(launch, Layout.of_equal(2, 1, 2, 1), 60)
    mine = torch.tensor([float(10**launch.rank)])
    dist.all_reduce(mine)
    across = torch.tensor([float(10**launch.rank)])
    world.peers.all_reduce_sum(across, "control")
    return {
        "default": (dist.get_world_size(), dist.get_rank(), float(mine)),
        "peers": (world.peers.size, world.peers.rank, float(across)),
        "everyone": world.gather_all(launch.rank),
        "norm": world.root_of_sum(4 * (1.0 + world.place.data) ** 2),
        "roles": (world.is_writer, world.leads_silo),
    }


def test_silos_are_worlds_of_their_own_and_peers_join_them() -> None:
    """Ranks 0 and 1 are silo 0, 2 and 3 silo 1; 0 and 2 are peers, 1 and 3 the others."""
    seen = run_ranks(4, _meet)
    assert [rank["default"] for rank in seen] == [(2, 0, 11.0), (2, 1, 11.0), (2, 0, 1100.0), (2, 1, 1100.0)]
    assert [rank["peers"] for rank in seen] == [(2, 0, 101.0), (2, 0, 1010.0), (2, 1, 101.0), (2, 1, 1010.0)]
    assert all(rank["everyone"] == [0, 1, 2, 3] for rank in seen)
    # The norm of four ones and four twos, 20 ** 0.5, in either silo.
    assert all(abs(rank["norm"] - 20**0.5) < 1e-9 for rank in seen)
    assert [rank["roles"] for rank in seen] == [(True, True), (False, False), (False, True), (False, False)]


def _alone(launch: Launch) -> tuple[str, float]:
    began = time.monotonic()
    try:
        start_world(Launch(0, 2, 0, 2, launch.address, launch.port), Layout.of_equal(2, 1, 1, 1), 2)
    except FederationError as error:
        return str(error), time.monotonic() - began
    return "no error", 0.0


def test_ranks_that_do_not_come_are_an_error_within_the_timeout() -> None:
    """A rank that waits 2 s for another; 20 s is far above that and far below torch's own half an hour."""
    ((message, seconds),) = run_ranks(1, _alone)
    assert "rank 0 of 2 could not meet the others at 127.0.0.1:" in message and "\n" not in message
    assert "check that every rank was started" in message
    assert seconds < 20
