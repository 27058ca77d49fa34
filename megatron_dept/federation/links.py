"""Communicators over some silos of a federation, built anew whenever other silos take part."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_dept.federation.communicator import Alone, Communicator, GroupCommunicator, join_peers
from megatron_dept.federation.ledger import Ledger
from megatron_dept.topology.layout import Coordinate, Layout


@dataclass(frozen=True)
class Link:
    """This rank's ways to the ranks of `silos` (ascending, its own among them).

    Where all silos of the federation are cut alike both groups are its peers; else `body` is all ranks, `rows` those of
    the first stages. `row_silos`: the silo of each rank of `rows`.
    """

    silos: tuple[int, ...]
    body: Communicator
    rows: Communicator
    row_silos: tuple[int, ...]


@dataclass(frozen=True)
class Linker:
    """Makes links for the rank at `place` of the federation `layout`."""

    store: dist.Store
    layout: Layout
    place: Coordinate
    ledger: Ledger

    def connect(self, name: str, silos: Sequence[int], timeout_seconds: float) -> Link:
        """Collective over the ranks of `silos`, under a `name` never used before.

        Raises `RuntimeError` where another does not come in time; blocks that long, so call it where that is no harm.
        """
        # A connection of its own: while it waits for a peer, others of this process may talk to the store.
        other = replace(self, store=self.store.clone())  # type: ignore[attr-defined]  # not in torch's stubs
        silos = tuple(sorted(silos))
        if self.layout.equal:
            members = tuple(self.layout.rank(replace(self.place, silo=silo)) for silo in silos)
            where = f"{self.place.pipe}-{self.place.data}-{self.place.tensor}"
            peers = other._join(f"{name}-peers-{where}", members, timeout_seconds)
            return Link(silos, peers, peers, silos)
        every = tuple(rank for silo in silos for rank in self.layout.members(silo))
        first = [self.layout.members(silo)[: self.layout.shapes[silo].embedding_ranks] for silo in silos]
        owners = tuple(rank for ranks in first for rank in ranks)
        row_silos = tuple(self.layout.coordinate(rank).silo for rank in owners)
        body = other._join(f"{name}-wide", every, timeout_seconds)
        return Link(silos, body, other._join(f"{name}-rows", owners, timeout_seconds), row_silos)

    def _join(self, name: str, members: tuple[int, ...], timeout_seconds: float) -> Communicator:
        rank = self.layout.rank(self.place)
        if len(members) == 1 or rank not in members:
            return Alone()
        # gloo alone, whatever the ranks compute on: a wait for NCCL ends when the work is queued, not when it is done,
        # so a silo would vote for an exchange that a lost peer never finishes.
        group = join_peers(self.store, name, members.index(rank), len(members), torch.device("cpu"), timeout_seconds)
        own = self.layout.members(self.place.silo)
        near = [index for index, member in enumerate(members) if member in own]
        return GroupCommunicator(group, self.ledger, "federation", torch.device("cpu"), members, near)
