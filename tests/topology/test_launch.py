"""Who this process is, from each launcher's variables; what is half set or contradicts itself is refused by name."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_dept.common.errors import ConfigError
from megatron_dept.topology import launch as module
from megatron_dept.topology.launch import DERIVED_PORTS, Launch, discover_over_mpi, expand_nodelist, read_launch

DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29501",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-node1-2710@1",
    "PMIX_RANK": "5",
}
MPICH = {
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PMI_FD": "9",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "4",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_NODELIST": "node[07-08]",
}
PLACE = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29501"}
LAUNCHERS = {"environment": TORCHRUN, "openmpi": OPENMPI, "mpich": MPICH, "slurm": SLURM}
NAMES = {
    "environment": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
PAIRS = [(launcher, name) for launcher, names in NAMES.items() for name in names]


@pytest.mark.parametrize("variables", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
def test_a_launchers_variables(variables):
    assert read_launch(variables) == Launch(5, 8, 1, 4, "10.0.0.7", 29501, "environment")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_tells_the_same_place(launcher):
    assert read_launch({**LAUNCHERS[launcher], **PLACE}) == Launch(5, 8, 1, 4, "10.0.0.7", 29501, launcher)


def test_no_launcher_is_one_process_alone():
    assert read_launch({"HOME": "/root", "LOCAL_RANK": "3"}) == Launch(0, 1, 0, 1, "127.0.0.1", 0, "alone")


def test_the_first_launcher_that_is_there_is_believed():
    """mpirun may start a torchrun on each node, and inside a Slurm job mpirun starts its helpers with srun."""
    everything = {**MPICH, **OPENMPI, **SLURM, **TORCHRUN}
    for launcher in ("environment", "openmpi", "mpich", "slurm"):
        assert read_launch({**everything, **PLACE}).launcher == launcher
        everything = {name: value for name, value in everything.items() if name not in LAUNCHERS[launcher]}
    assert read_launch(everything).launcher == "alone"


def test_the_environment_is_read_where_none_is_given(monkeypatch):
    for name in {name for variables in (DEEPSPEED, *LAUNCHERS.values()) for name in variables}:
        monkeypatch.delenv(name, raising=False)
    assert read_launch().world_size == 1
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    assert read_launch().rank == 5


def test_a_launcher_of_one_node_may_say_no_more_than_rank_and_world():
    assert read_launch({"RANK": "1", "WORLD_SIZE": "2"}) == Launch(1, 2, 0, 2, "127.0.0.1", 29500, "environment")


@pytest.mark.parametrize(
    "launcher, name", [pair for pair in PAIRS if pair[1] not in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
)
def test_half_a_launch_is_refused_by_the_missing_name(launcher, name):
    variables = {key: value for key, value in LAUNCHERS[launcher].items() if key != name}
    with pytest.raises(ConfigError) as caught:
        read_launch(variables)
    named = name.replace("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    told = f"environment variable {named} is not set; start with 'deepspeed', 'torchrun', 'mpirun' or 'srun'"
    assert str(caught.value) == told


@pytest.mark.parametrize("launcher, name", PAIRS)
@pytest.mark.parametrize("value", ["", "-1", "two", "1.0", "²", "٣"])
def test_what_is_no_number_is_refused_by_name(launcher, name, value):
    with pytest.raises(ConfigError, match=rf"^environment variable {name} is '{value}', not (a number|like 4)"):
        read_launch({**LAUNCHERS[launcher], name: value})


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_port_is_a_number(launcher):
    with pytest.raises(ConfigError, match="^environment variable MASTER_PORT is 'http', not a number"):
        read_launch({**LAUNCHERS[launcher], "MASTER_ADDR": "n", "MASTER_PORT": "http"})


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_numbers_that_contradict_each_other(launcher):
    rank, world, local_rank, local_world = NAMES[launcher]
    variables = LAUNCHERS[launcher]
    with pytest.raises(ConfigError, match=f"^environment variable {rank} 8 is not below {world} 8$"):
        read_launch({**variables, rank: "8"})
    with pytest.raises(ConfigError, match=f"^environment variable {local_rank} 4 is not below {local_world} 4$"):
        read_launch({**variables, local_rank: "4"})
    with pytest.raises(ConfigError, match=f"^environment variable {local_world} 9 (exceeds {world} 8|is not 8 tasks)"):
        read_launch({**variables, local_world: "9"})


@pytest.mark.parametrize("launcher", ["openmpi", "mpich"])
def test_mpi_on_one_node_meets_there(launcher):
    _, world, local_rank, local_world = NAMES[launcher]
    found = read_launch({**LAUNCHERS[launcher], local_world: "8", local_rank: "5"})
    assert (found.address, found.local_world_size) == ("127.0.0.1", 8)
    assert found.port in DERIVED_PORTS if launcher == "openmpi" else found.port == 29500


def test_mpi_over_several_nodes_leaves_the_address_to_be_discovered():
    assert read_launch(OPENMPI) == Launch(5, 8, 1, 4, "", 0, "openmpi")
    assert read_launch({**OPENMPI, "MASTER_PORT": "29501"}).port == 29501


def test_jobs_have_ports_of_their_own_that_their_ranks_agree_on():
    one_node = {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    jobs = [{"PMIX_NAMESPACE": f"prterun-vm-{pid}@1"} for pid in range(2700, 2720)]
    ports = [read_launch({**OPENMPI, **one_node, **job}).port for job in jobs]
    assert len(set(ports)) == len(jobs)  # of 12,000; these names are given, so it is always so
    assert read_launch({**OPENMPI, **one_node, **jobs[0], "OMPI_COMM_WORLD_RANK": "0"}).port == ports[0]
    steps = [{"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(4700, 4720) for step in range(4)]
    ports = [read_launch({**SLURM, **step}).port for step in steps]
    assert len(set(ports)) == len(steps)
    assert all(port in DERIVED_PORTS for port in ports)


def test_a_slurm_step_meets_on_the_first_node_of_its_list():
    assert read_launch(SLURM).address == "node07"
    job_only = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert read_launch({**job_only, "SLURM_JOB_NODELIST": "gpu[3,1]-a,other"}).address == "gpu3-a"
    del job_only["SLURM_JOB_NODELIST"]
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST is not set; start with srun, or set MASTER_ADDR"):
        read_launch(job_only)
    assert read_launch({**job_only, "MASTER_ADDR": "here"}).address == "here"
    one_node = {**job_only, "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}
    assert read_launch(one_node).address == "127.0.0.1"


def test_slurm_tells_the_tasks_of_each_node():
    uneven = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,2(x2),1", "SLURM_LOCALID": "0"}
    for node, tasks in enumerate((3, 2, 2, 1)):
        assert read_launch({**uneven, "SLURM_NODEID": str(node)}).local_world_size == tasks
    with pytest.raises(ConfigError, match="SLURM_NODEID is not set"):
        read_launch({name: value for name, value in uneven.items() if name != "SLURM_NODEID"})
    with pytest.raises(ConfigError, match="SLURM_NODEID 4 is not below the 4 nodes"):
        read_launch({**uneven, "SLURM_NODEID": "4"})
    with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE 3,2 is not 8 tasks in all"):
        read_launch({**uneven, "SLURM_STEP_TASKS_PER_NODE": "3,2"})
    plain = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_TASKS_PER_NODE"}
    assert read_launch({**plain, "SLURM_NTASKS_PER_NODE": "4"}).local_world_size == 4


def test_a_step_of_fewer_tasks_than_its_job():
    step = {**SLURM, "SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "8"}
    assert read_launch(step).world_size == 8


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-2]"},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {**SLURM, "SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {**SLURM, "SLURM_STEP_ID": str(0xFFFFFFFB), "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
    ids=["salloc's shell", "sbatch's script", "salloc's interactive step", "batch step"],
)
def test_a_shell_inside_a_slurm_job_is_one_process_alone(variables):
    assert read_launch(variables).launcher == "alone"


def test_pmi_without_local_ranks_inside_a_slurm_step_is_srun():
    pmi2 = {"PMI_RANK": "5", "PMI_SIZE": "8"}
    assert read_launch({**SLURM, **pmi2}).launcher == "slurm"
    assert read_launch({**SLURM, **MPICH}).launcher == "mpich", "mpirun inside a Slurm job"


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("alone", ["alone"]),
        ("n1,n2", ["n1", "n2"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("n[9-11]-ib.site,gpu1", ["n9-ib.site", "n10-ib.site", "n11-ib.site", "gpu1"]),
        ("a[1,3],b2,c[098-101]", ["a1", "a3", "b2", "c098", "c099", "c100", "c101"]),
        ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
    ],
)
def test_node_lists(text, hosts):
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", "a,,b", "n[1-", "n1-3]", "n[]", "n[a-b]", "n[3-1]", "n[1-2-3]", "n[1,]"])
def test_what_is_no_node_list(text):
    with pytest.raises(ConfigError, match="cannot be read at .*; set MASTER_ADDR to rank 0's host"):
        expand_nodelist(text)


def fake_mpi(monkeypatch, rank: int, hosts: list[str], told: tuple[str, int] | None = None) -> None:
    """An mpi4py that sees one process per entry of `hosts`; other ranks hear what rank 0 `told`."""
    world = SimpleNamespace(
        rank=rank, size=len(hosts), allgather=lambda own: hosts, bcast=lambda value, root: value or told
    )
    package = ModuleType("mpi4py")
    package.MPI = SimpleNamespace(COMM_WORLD=world, Get_processor_name=lambda: hosts[rank])
    monkeypatch.setitem(sys.modules, "mpi4py", package)


def test_rank_0_tells_the_others_its_address_on_their_road(monkeypatch):
    # The way to 127.0.0.2 starts at 127.0.0.1 on any Linux; it stands for another node's name.
    fake_mpi(monkeypatch, 0, ["node1", "node1", "127.0.0.2", "127.0.0.2"])
    found = discover_over_mpi(Launch(0, 4, 0, 2, "", 0, "openmpi"))
    assert found.address.startswith("127.0.0.") and 1024 <= found.port < 65536
    assert (found.rank, found.world_size, found.local_world_size, found.launcher) == (0, 4, 2, "openmpi")
    fake_mpi(monkeypatch, 2, ["node1", "node1", "node2", "node2"], told=("10.0.0.7", 4567))
    assert discover_over_mpi(Launch(2, 4, 0, 2, "", 0, "openmpi")) == Launch(2, 4, 0, 2, "10.0.0.7", 4567, "openmpi")
    assert discover_over_mpi(Launch(2, 4, 0, 2, "", 29501, "openmpi")).port == 29501, "as MASTER_PORT said"


def test_a_name_without_an_address_is_told_as_it_is(monkeypatch):
    monkeypatch.setattr(module.socket.socket, "connect", lambda *args: (_ for _ in ()).throw(OSError("no such host")))
    fake_mpi(monkeypatch, 0, ["node1", "node2"])
    assert discover_over_mpi(Launch(0, 2, 0, 1, "", 0, "openmpi")).address == "node1"


def test_an_mpi4py_of_another_mpi_is_refused(monkeypatch):
    fake_mpi(monkeypatch, 0, ["node1"])
    with pytest.raises(ConfigError, match="^mpi4py sees rank 0 of 1, the launcher's variables say rank 1 of 2; "):
        discover_over_mpi(Launch(1, 2, 0, 1, "", 0, "openmpi"))


@pytest.mark.parametrize("broken", ["missing", "no library"])
def test_without_mpi4py_the_address_must_be_given(monkeypatch, broken):
    if broken == "missing":
        monkeypatch.setitem(sys.modules, "mpi4py", None)
    else:

        class NoLibrary(ModuleType):
            def __getattr__(self, name):
                raise RuntimeError("cannot load MPI library")

        monkeypatch.setitem(sys.modules, "mpi4py", NoLibrary("mpi4py"))
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set, and mpi4py.*set MASTER_ADDR to rank 0's host.*or"):
        discover_over_mpi(Launch(0, 2, 0, 1, "", 0, "openmpi"))
