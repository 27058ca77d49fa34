"""One process's place in the launch: its silo's default process group, and its peers in the other silos.

The launch's store serves everyone. Each silo meets under a prefix of its own and becomes torch's default group, which
is all that DeepSpeed ever sees; peers meet under another prefix, outside the default group.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dept.common.errors import ConfigError, FederationError
from megatron_dept.federation.communicator import Alone, Communicator, GroupCommunicator, join_peers
from megatron_dept.federation.ledger import Ledger
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Coordinate, Layout


@dataclass(frozen=True)
class World:
    """What a rank needs to know of the others. `peers`: same coordinate, other silos; `silo`: its data ranks."""

    launch: Launch
    layout: Layout
    place: Coordinate
    device: torch.device
    ledger: Ledger
    store: dist.Store | None
    peers: Communicator
    silo: Communicator

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes what a run has one of: manifests, plans, summaries."""
        return self.launch.rank == 0

    @property
    def leads_silo(self) -> bool:
        """Whether this rank writes what a silo has one of: its metrics, its source's embedding."""
        return (self.place.pipe, self.place.data, self.place.tensor) == (0, 0, 0)

    def gather_all(self, value: object) -> list[object]:
        """Everyone's picklable `value`, silo by silo; control traffic."""
        return [item for silo in self.peers.all_gather_object(self.silo.all_gather_object(value)) for item in silo]

    def norm(self, partition: Tensor) -> float:
        """L2 norm over the silo of what each of its ranks has a partition of; collective within the silo."""
        squared = torch.linalg.vector_norm(partition).double().square().reshape(1).cpu()
        self.silo.all_reduce_sum(squared, "control")
        return float(squared.sqrt())

    def barrier(self) -> None:
        """Every rank of every silo has come."""
        self.silo.barrier()
        self.peers.barrier()
        self.silo.barrier()


def start_world(launch: Launch, layout: Layout, timeout_seconds: float) -> World:
    """Build the groups; `FederationError` where the other ranks do not come within the timeout."""
    place = layout.coordinate(launch.rank)
    device = _device(launch)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    ledger = Ledger()
    try:
        store = _store(launch, timeout)
        silo_store = dist.HashStore() if store is None else dist.PrefixStore(f"silo-{place.silo}", store)
        silo_rank = launch.rank % layout.silo_size
        dist.init_process_group(backend, store=silo_store, rank=silo_rank, world_size=layout.silo_size, timeout=timeout)
        peers: Communicator = Alone()
        if layout.silos > 1:
            assert store is not None
            name = f"federation-{place.pipe}-{place.data}-{place.tensor}"
            group = join_peers(store, name, place.silo, layout.silos, device, timeout_seconds)
            peers = GroupCommunicator(group, ledger, "federation", torch.device("cpu"))
    except (RuntimeError, dist.DistError) as error:
        first = str(error).strip().splitlines()[0]
        raise FederationError(
            f"rank {launch.rank} of {launch.world_size} could not meet the others at {launch.address}:{launch.port} "
            f"({first}); check that every rank was started and that the port is free, or choose another (--master_port)"
        ) from error
    silo: Communicator = Alone()
    if layout.silo_size > 1:
        default = dist.distributed_c10d._get_default_group()
        silo = GroupCommunicator(default, ledger, "silo", torch.device("cpu"))
    # DeepSpeed reads these; what it may see is the silo.
    os.environ.update(
        RANK=str(silo_rank),
        WORLD_SIZE=str(layout.silo_size),
        LOCAL_RANK=str(launch.local_rank),
        MASTER_ADDR=launch.address,
        MASTER_PORT=str(launch.port),
    )
    return World(launch, layout, place, device, ledger, store, peers, silo)


def _device(launch: Launch) -> torch.device:
    """This rank's GPU where there are GPUs and DS_ACCELERATOR does not say cpu: DeepSpeed and we must choose alike."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.local_world_size > torch.cuda.device_count():
        raise ConfigError(
            f"{launch.local_world_size} ranks on this node but {torch.cuda.device_count()} GPUs; launch as many ranks "
            "as GPUs, or set DS_ACCELERATOR=cpu to train without them"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def _store(launch: Launch, timeout: timedelta) -> dist.Store | None:
    if launch.world_size == 1:
        return None
    # torchrun's agent already serves a store at this address.
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serve = launch.rank == 0 and not agent_serves
    return dist.TCPStore(launch.address, launch.port, launch.world_size, serve, timeout=timeout)
