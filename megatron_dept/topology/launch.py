"""Who am I in this launch: rank, world, local rank and meeting point from whichever launcher started the process.

Read in this order, the first that is there: RANK and WORLD_SIZE (torchrun, deepspeed with pdsh), Open MPI's variables
(mpirun, deepspeed --launcher openmpi), PMI's (MPICH, Intel MPI), a Slurm step's (srun); none: one process alone.
"""

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from megatron_dept.common.errors import ConfigError

DEFAULT_PORT = 29500
DERIVED_PORTS = range(20_000, 32_000)
"""Ports worked out from a job's name lie below the range that systems give to outgoing connections."""
NO_STEP = 0xFFFFFFF0
"""Slurm numbers real steps from 0; ids from here on are its own: a batch script, an interactive shell."""


@dataclass(frozen=True)
class Launch:
    """One process of a launch; `address` and `port` name the store that rank 0 serves (world of one: unused).

    `launcher`: alone, environment, openmpi, mpich or slurm. An empty `address` is one that only MPI can tell
    (`discover_over_mpi`).
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    launcher: str = "alone"


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """This process's place, from the variables that its launcher set (default: this process's own).

    MASTER_ADDR and MASTER_PORT say where rank 0 serves. Without them a launch on one node meets on it, a Slurm step on
    the first node of its list, and an MPI launch over several nodes has an empty `address`. Raises `ConfigError` naming
    the variable where they are incomplete, not numbers, or contradict each other.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_environment(env)
    if "OMPI_COMM_WORLD_RANK" in env or "OMPI_COMM_WORLD_SIZE" in env:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        return _from_mpi(env, "openmpi", (*names, "OMPI_COMM_WORLD_LOCAL_SIZE"))
    # srun --mpi=pmi2 sets PMI's rank and size without the local ones, which Slurm's own variables tell.
    if ("PMI_RANK" in env or "PMI_SIZE" in env) and ("MPI_LOCALRANKID" in env or not _in_slurm_step(env)):
        return _from_mpi(env, "mpich", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"))
    if _in_slurm_step(env):
        return _from_slurm(env)
    return Launch(0, 1, 0, 1, "127.0.0.1", 0)


def discover_over_mpi(launch: Launch) -> Launch:
    """`launch` with the address and a free port of rank 0, told over MPI_COMM_WORLD; collective over all ranks.

    Starts MPI. Raises `ConfigError` without mpi4py, or where mpi4py's MPI is not the one that started the ranks.
    """
    try:
        from mpi4py import MPI
    # The wheel of mpi4py finds its MPI library only when it is imported.
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"environment variable MASTER_ADDR is not set, and mpi4py, which would find rank 0, cannot be used "
            f"({error}); set MASTER_ADDR to rank 0's host (mpirun -x MASTER_ADDR=HOST), or install mpi4py"
        ) from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (launch.rank, launch.world_size):
        raise ConfigError(
            f"mpi4py sees rank {world.rank} of {world.size}, the launcher's variables say rank {launch.rank} of "
            f"{launch.world_size}; install mpi4py for the MPI whose mpirun starts the ranks, or set MASTER_ADDR"
        )
    hosts = world.allgather(MPI.Get_processor_name())
    found = None
    if launch.rank == 0:
        # The port stays free for rank 0's store: nothing else of this launch listens between here and there.
        with socket.socket() as probe:
            probe.bind(("", 0))
            found = (_address_towards(hosts), probe.getsockname()[1])
    address, port = world.bcast(found, root=0)
    return replace(launch, address=address, port=launch.port or port)


def expand_nodelist(text: str) -> list[str]:
    """The hosts of a Slurm node list, in its order: `n[01-03,7],gpu1` -> n01, n02, n03, n7, gpu1.

    Raises `ConfigError` naming the list where it is no list.
    """
    hosts = []
    # A comma inside brackets belongs to the name it stands in.
    for name in re.split(r",(?![^\[]*\])", text):
        parts = re.split(r"\[([^\[\]]*)\]", name)
        if not name or any(mark in literal for literal in parts[::2] for mark in "[]"):
            raise ConfigError(f"node list {text!r} cannot be read at {name!r}; set MASTER_ADDR to rank 0's host")
        choices = [[part] if index % 2 == 0 else _numbers(part, text) for index, part in enumerate(parts)]
        hosts += ["".join(chosen) for chosen in product(*choices)]
    return hosts


def _numbers(text: str, whole: str) -> list[str]:
    """`01-03,7` -> 01, 02, 03, 7."""
    found = []
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", item)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(last) < int(first):
            raise ConfigError(f"node list {whole!r} cannot be read at {item!r}; set MASTER_ADDR to rank 0's host")
        found += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return found


def _from_environment(env: Mapping[str, str]) -> Launch:
    """What torchrun and DeepSpeed's own launcher set."""
    # torchrun's name first, DeepSpeed's second; a launcher that sets neither is taken to run on one node.
    local = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
    world = _number(env, "WORLD_SIZE")
    launch = Launch(
        rank=_number(env, "RANK"),
        world_size=world,
        local_rank=_number(env, "LOCAL_RANK", 0),
        local_world_size=_number(env, local, world),
        address=env.get("MASTER_ADDR") or "127.0.0.1",
        port=_number(env, "MASTER_PORT", DEFAULT_PORT),
        launcher="environment",
    )
    return _checked(launch, ("RANK", "WORLD_SIZE", "LOCAL_RANK", local))


def _from_mpi(env: Mapping[str, str], launcher: str, names: tuple[str, str, str, str]) -> Launch:
    """What an MPI's mpirun set in `names`: rank, size, local rank, local size."""
    rank, world, local_rank, local_world = (_number(env, name) for name in names)
    launch = _checked(Launch(rank, world, local_rank, local_world, "", 0, launcher), names)
    # Open MPI's job has a name that all its processes know, batch systems' jobs have ids; hydra's has neither.
    job = next((env[name] for name in ("PMIX_NAMESPACE", "PBS_JOBID", "LSB_JOBID", "SLURM_JOB_ID") if name in env), "")
    derived = _port_of(zlib.crc32(job.encode())) if job else DEFAULT_PORT
    if env.get("MASTER_ADDR"):
        return replace(launch, address=env["MASTER_ADDR"], port=_number(env, "MASTER_PORT", derived))
    if local_world == world:
        return replace(launch, address="127.0.0.1", port=_number(env, "MASTER_PORT", derived))
    return replace(launch, port=_number(env, "MASTER_PORT", 0))


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task: not a shell of salloc's, not the script that sbatch runs."""
    step = env.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= NO_STEP:
        return False
    return "SLURM_PROCID" in env or env.get("SLURM_NTASKS", "1") != "1"


def _from_slurm(env: Mapping[str, str]) -> Launch:
    """What srun set: the step's own variables where there are any, else those of its job."""
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    world = _number(env, size)
    local_world, local_name = _slurm_tasks_here(env, world)
    names = ("SLURM_PROCID", size, "SLURM_LOCALID", local_name)
    rank, local_rank = _number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID")
    launch = _checked(Launch(rank, world, local_rank, local_world, "127.0.0.1", 0, "slurm"), names)
    # Steps of one job may run side by side, jobs on one node too: each has a port of its own.
    derived = _port_of(_number(env, "SLURM_JOB_ID", 0) + 101 * _number(env, "SLURM_STEP_ID"))
    return replace(launch, address=_slurm_address(env, launch), port=_number(env, "MASTER_PORT", derived))


def _slurm_tasks_here(env: Mapping[str, str], world: int) -> tuple[int, str]:
    """Tasks of this step on this node, and the variable that tells."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in env:
        return _number(env, "SLURM_NTASKS_PER_NODE", world if world == 1 else None), "SLURM_NTASKS_PER_NODE"
    tasks: list[int] = []
    for item in env[name].split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", item)
        if match is None:
            raise ConfigError(f"environment variable {name} is {env[name]!r}, not like 4(x2),3; start with srun")
        tasks += [int(match[1])] * int(match[2] or 1)
    if sum(tasks) != world:
        raise ConfigError(f"environment variable {name} {env[name]} is not {world} tasks in all; start with srun")
    node = _number(env, "SLURM_NODEID", 0 if len(set(tasks)) == 1 else None)
    if node >= len(tasks):
        raise ConfigError(f"environment variable SLURM_NODEID {node} is not below the {len(tasks)} nodes of {name}")
    return tasks[node], name


def _slurm_address(env: Mapping[str, str], launch: Launch) -> str:
    """Where task 0 runs: the first node of the list, which Slurm fills first."""
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    if launch.local_world_size == launch.world_size:
        return "127.0.0.1"
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if env.get(name):
            return expand_nodelist(env[name])[0]
    raise ConfigError("environment variable SLURM_JOB_NODELIST is not set; start with srun, or set MASTER_ADDR")


def _address_towards(hosts: list[str]) -> str:
    """This host's address on its way to the first other of `hosts`; its loopback where there is none other."""
    other = next((host for host in hosts if host != hosts[0]), None)
    if other is None:
        return "127.0.0.1"
    try:
        # Connecting a datagram socket sends nothing: it asks the system which of its addresses would be used.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return hosts[0]


def _port_of(number: int) -> int:
    return DERIVED_PORTS[number % len(DERIVED_PORTS)]


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            raise ConfigError(
                f"environment variable {name} is not set; start with 'deepspeed', 'torchrun', 'mpirun' or 'srun'"
            )
        return default
    # isdecimal alone would let other scripts' digits through, which no launcher writes.
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(
            f"environment variable {name} is {text!r}, not a number; start with 'deepspeed', 'torchrun', 'mpirun' or "
            "'srun'"
        )
    return int(text)


def _checked(launch: Launch, names: tuple[str, str, str, str]) -> Launch:
    """`launch`, or `ConfigError` naming which of its variables (rank, world, local rank, local world) contradict."""
    rank, world, local_rank, local_world = names
    if launch.rank >= launch.world_size:
        raise ConfigError(f"environment variable {rank} {launch.rank} is not below {world} {launch.world_size}")
    if launch.local_world_size > launch.world_size:
        raise ConfigError(
            f"environment variable {local_world} {launch.local_world_size} exceeds {world} {launch.world_size}"
        )
    if launch.local_rank >= launch.local_world_size:
        raise ConfigError(
            f"environment variable {local_rank} {launch.local_rank} is not below {local_world} "
            f"{launch.local_world_size}"
        )
    return launch
