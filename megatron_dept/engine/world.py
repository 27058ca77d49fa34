"""One process's place in the federation: its silo's default process group, groups within it, and other silos' ranks.

The launch's store serves everyone of it. Each silo meets under a prefix of its own and becomes torch's default group,
which is all that DeepSpeed ever sees; every other group here is outside it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_dept.common.errors import ConfigError, FederationError
from megatron_dept.config.parallel import FederationBackend
from megatron_dept.engine.model_parallel_unit import ModelParallelUnit
from megatron_dept.federation.communicator import Alone, Communicator, GroupCommunicator, join_peers
from megatron_dept.federation.ledger import Ledger, Scope
from megatron_dept.federation.mpi import MpiCommunicator, mpi_group
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Coordinate, Layout, SiloShape

_ONE_GPU_A_TASK = frozenset(("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK"))
"""Variables of a Slurm step that may show each rank one GPU of its own, as number 0."""


@dataclass(frozen=True)
class World:
    """What a rank needs to know of the others.

    Within the silo: `silo` is all its ranks, `data`, `tensor` and `stages` those along one axis, `ends` the first and
    last stage of this (data, tensor), `embedding` the first stage's ranks. Between silos: `peers` of this coordinate
    (equal silos), `wide` all ranks and `row_owners` all first stages' ranks (unequal ones), `leaders` each silo's first
    rank, `exchange` the ranks that exchange the body. A rank that has no part in a group has `Alone` for it.
    """

    launch: Launch
    layout: Layout
    place: Coordinate
    device: torch.device
    ledger: Ledger
    store: dist.Store | None
    """The launch's."""
    meeting: dist.Store | None
    """What silos that are launches of their own share; None where they are of one launch."""
    silo: Communicator
    data: Communicator
    tensor: Communicator
    stages: Communicator
    ends: Communicator
    embedding: Communicator
    peers: Communicator
    wide: Communicator
    row_owners: Communicator
    leaders: Communicator
    exchange: Communicator
    """What the body's outer exchange runs over: `peers` or `wide`, or the same ranks in a group of its own."""
    exchange_ledger: Ledger
    """What `exchange` is charged to: `ledger`, unless the group is its own."""
    mpu: ModelParallelUnit | None
    """For DeepSpeed, where there are tensor ranks and no pipeline (whose grid is made by DeepSpeed itself)."""

    @property
    def shape(self) -> SiloShape:
        """This silo's."""
        return self.layout.shapes[self.place.silo]

    @property
    def separate(self) -> bool:
        """Whether silos are launches of their own, without each other's disks."""
        return self.meeting is not None

    @property
    def shared_store(self) -> dist.Store | None:
        """The store of all ranks that end together; None for a process alone. A silo that goes on alone has its own."""
        return self.store if self.meeting is None or self.layout.silos == 1 else self.meeting

    @property
    def silo_ranks(self) -> range:
        """This silo's ranks among all of the federation."""
        first = self.layout.offset(self.place.silo)
        return range(first, first + self.shape.size)

    @property
    def rank(self) -> int:
        """Among all ranks of the federation."""
        return self.layout.rank(self.place)

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes what a run directory has one of: manifests, plans, summaries."""
        return self.launch.rank == 0

    @property
    def leads_silo(self) -> bool:
        """Whether this rank writes what a silo has one of: its metrics, its source's step counts."""
        return (self.place.pipe, self.place.data, self.place.tensor) == (0, 0, 0)

    @property
    def first_stage(self) -> bool:
        return self.place.pipe == 0

    @property
    def last_stage(self) -> bool:
        return self.place.pipe == self.shape.pipe - 1

    def gather_all(self, value: object) -> list[object]:
        """Everyone's picklable `value`, silo by silo; control traffic."""
        own = self.silo.all_gather_object(value)
        every = self.leaders.all_gather_object(own) if self.leads_silo else None
        told = self.silo.all_gather_object(every)[0]
        return [item for silo in told for item in silo]

    def root_of_sum(self, squares: float) -> float:
        """The root of the sum of the silo's ranks' numbers; collective within the silo."""
        total = torch.tensor([squares], dtype=torch.float64)
        self.silo.all_reduce_sum(total, "control")
        return float(total.sqrt())

    def barrier(self) -> None:
        """Every rank of every silo has come."""
        self.silo.barrier()
        self.leaders.barrier()
        self.silo.barrier()

    def close(self) -> None:
        """Leave all groups; only after success: to leave one whose peers have failed can take as long as they."""
        groups = (self.tensor, self.data, self.stages, self.ends, self.peers, self.wide, self.exchange)
        own = {id(group): group for group in groups}
        for group in own.values():
            # The silo's own group is torch's default one, which ends last.
            if group is not self.silo:
                group.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def wait_for_all(self, meanwhile: Callable[[], object]) -> None:
        """A barrier without a time limit, for waiting while other silos work; `meanwhile` is called again and again."""
        self.leaders.wait_for_all(meanwhile)
        self.silo.wait_for_all(meanwhile)


@dataclass(frozen=True)
class Meeting:
    """Where silos that are launches of their own meet, and which of them this launch is."""

    store: dist.Store
    silo: int


def start_world(
    launch: Launch,
    layout: Layout,
    timeout_seconds: float,
    meeting: Meeting | None = None,
    backend: FederationBackend = "gloo",
    overlaps: bool = False,
) -> World:
    """Build the groups; `FederationError` where the other ranks do not come within the timeout.

    `layout` is the whole federation's; with a `meeting` this launch's ranks are one silo of it. `backend` is what silos
    talk over: gloo (and NCCL between GPUs) or mpi. `overlaps`: the body is exchanged while the other groups are in use.
    """
    rank = launch.rank + (layout.offset(meeting.silo) if meeting is not None else 0)
    place = layout.coordinate(rank)
    device = _device(launch)
    timeout = timedelta(seconds=timeout_seconds)
    inside = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    ledger = Ledger()
    try:
        store = _store(launch, timeout)
        shape = layout.shapes[place.silo]
        silo_store = dist.HashStore() if store is None else dist.PrefixStore(f"silo-{place.silo}", store)
        silo_rank = shape.rank(place.pipe, place.data, place.tensor)
        dist.init_process_group(inside, store=silo_store, rank=silo_rank, world_size=shape.size, timeout=timeout)
        join = _Joining(store, rank, layout.world_size, ledger, device, timeout_seconds, "gloo")
        between = replace(join, backend=backend)
        if meeting is not None:
            # Between sites gloo alone, whatever the ranks compute on: NCCL waits on the GPU for a peer that is gone.
            between = replace(between, store=meeting.store, device=torch.device("cpu"))
        groups = _silo_groups(join, layout, place) | _federation_groups(between, layout, place)
        apart = replace(between, ledger=Ledger()) if overlaps else None
        groups["exchange"] = _exchange_group(groups, apart, layout, place)
        mpu = ModelParallelUnit.create(shape) if shape.tensor > 1 and shape.pipe == 1 else None
    except (RuntimeError, dist.DistError) as error:
        first = str(error).strip().splitlines()[0]
        raise FederationError(
            f"rank {launch.rank} of {launch.world_size} could not meet the others at {launch.address}:{launch.port} "
            f"({first}); check that every rank was started and that the port is free, or choose another (--master_port)"
        ) from error
    # DeepSpeed reads these; what it may see is the silo.
    os.environ.update(
        RANK=str(silo_rank),
        WORLD_SIZE=str(shape.size),
        LOCAL_RANK=str(launch.local_rank if device.index is None else device.index),
        MASTER_ADDR=launch.address,
        MASTER_PORT=str(launch.port),
    )
    return World(
        launch,
        layout,
        place,
        device,
        ledger,
        store,
        meeting.store if meeting is not None else None,
        mpu=mpu,
        exchange_ledger=ledger if apart is None else apart.ledger,
        **groups,
    )


@dataclass(frozen=True)
class _Joining:
    """Makes communicators over some ranks of a store's; `rank` is this process's among all `ranks`."""

    store: dist.Store | None
    rank: int
    ranks: int
    ledger: Ledger
    device: torch.device
    timeout_seconds: float
    backend: FederationBackend

    def __call__(self, name: str, scope: Scope, members: tuple[int, ...], silo: tuple[int, ...] = ()) -> Communicator:
        """The communicator of `members` in their order, or `Alone` where this rank is none of them or the only one.

        `silo`: this silo's ranks, where others than one of them are members.
        """
        if len(members) == 1 or self.rank not in members:
            return Alone()
        near = [place for place, member in enumerate(members) if member in silo]
        if self.backend == "mpi":
            return MpiCommunicator(mpi_group(members, self.rank, self.ranks), self.ledger, scope, members, near)
        assert self.store is not None
        own, named = members.index(self.rank), f"{name}-{members[0]}"
        group = join_peers(self.store, named, own, len(members), self.device, self.timeout_seconds)
        return GroupCommunicator(group, self.ledger, scope, torch.device("cpu"), members, near)


def _silo_groups(join: _Joining, layout: Layout, place: Coordinate) -> dict[str, Communicator]:
    """The groups within this silo; one that is the whole silo is torch's default group."""
    shape, first = layout.shapes[place.silo], layout.offset(place.silo)
    everyone = layout.members(place.silo)
    silo: Communicator = Alone()
    if shape.size > 1:
        default = dist.distributed_c10d._get_default_group()
        silo = GroupCommunicator(default, join.ledger, "silo", torch.device("cpu"), everyone)

    def along(pipes: range, datas: range, tensors: range) -> tuple[int, ...]:
        return tuple(first + shape.rank(p, d, t) for p in pipes for d in datas for t in tensors)

    p, d, t = (range(n, n + 1) for n in (place.pipe, place.data, place.tensor))
    pipes, datas, tensors = range(shape.pipe), range(shape.data), range(shape.tensor)
    stages = along(pipes, d, t)
    members = {
        "data": along(p, datas, t),
        "tensor": along(p, d, tensors),
        "stages": stages,
        "ends": (stages[0], stages[-1]) if len(stages) > 1 else stages,
        "embedding": along(range(1), datas, tensors),
    }
    # Of a group that is the whole silo there is one communicator: a second would be as many connections again.
    named = {
        name: silo if ranks == everyone else join(f"silo-{name}", "silo", ranks) for name, ranks in members.items()
    }
    return {"silo": silo, **named}


def _federation_groups(join: _Joining, layout: Layout, place: Coordinate) -> dict[str, Communicator]:
    """The groups between silos: peers where silos are equal, everyone where they are not."""
    leaders = tuple(layout.offset(silo) for silo in range(layout.silos))
    members: dict[str, tuple[int, ...]] = {"leaders": leaders, "peers": (), "wide": (), "row_owners": ()}
    if layout.equal:
        members["peers"] = layout.peers(place)
    else:
        members |= {"wide": tuple(range(layout.world_size)), "row_owners": layout.embedding_ranks()}
    silo = layout.members(place.silo)
    return {name: join(f"federation-{name}", "federation", ranks, silo) for name, ranks in members.items()}


def _exchange_group(
    groups: dict[str, Communicator], apart: _Joining | None, layout: Layout, place: Coordinate
) -> Communicator:
    """The ranks that exchange the body; `apart`: in a group of their own.

    A thread in the background then has it to itself: two threads that used one group would mix up their collectives.
    """
    between = groups["peers" if layout.equal else "wide"]
    if apart is None:
        return between
    return apart("federation-exchange", "federation", between.members, layout.members(place.silo))


def _device(launch: Launch) -> torch.device:
    """This rank's GPU where there are GPUs and DS_ACCELERATOR does not say cpu: DeepSpeed and we must choose alike."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index, seen = launch.local_rank, torch.cuda.device_count()
    if launch.local_world_size > seen:
        if seen != 1 or _ONE_GPU_A_TASK.isdisjoint(os.environ):
            raise ConfigError(
                f"{launch.local_world_size} ranks on this node but {seen} GPUs; launch as many ranks as GPUs, or set "
                "DS_ACCELERATOR=cpu to train without them"
            )
        index = 0
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def torchrun_serves() -> bool:
    """Whether torchrun's agent already serves a store at the launch's address."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(launch: Launch, timeout: timedelta) -> dist.Store | None:
    if launch.world_size == 1:
        return None
    serve = launch.rank == 0 and not torchrun_serves()
    store = dist.TCPStore(launch.address, launch.port, launch.world_size, serve, timeout=timeout)
    # torchrun's agent keeps its store when it starts the ranks again: nothing of an earlier attempt may be found there.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt-{attempt}", store)
