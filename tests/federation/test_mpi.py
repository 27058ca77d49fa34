"""MPI as the federation's transport: the same bits, bytes and traces as gloo, under a real mpirun."""

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dept.common.errors import FederationError
from megatron_dept.federation import mpi
from megatron_dept.topology.launch import Launch
from tests.federation.groups import meet, over_gloo
from tests.federation.mpi_ranks import drawn
from tests.federation.transports import experiment
from tests.support.distributed import run_ranks

PROJECT = Path(__file__).resolve().parents[2]
SECONDS_AT_MOST = 120
needs_mpi = pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")


def mpirun() -> str:
    """The command of the MPI that belongs to this python, else the one on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    assert found, "mpi4py is installed, mpirun is not: install the MPI it was built for"
    return found


def _over_gloo(launch: Launch) -> dict[str, Any]:
    return experiment(over_gloo(meet(launch), launch.rank), launch.rank, launch.world_size)


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """(what ranks saw over MPI, what they saw over gloo)."""
    folder = tmp_path_factory.mktemp("mpi")
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    command = [mpirun(), "--oversubscribe", *root, "-n", str(request.param)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.federation.mpi_ranks", str(folder)],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS_AT_MOST,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(request.param)]
    return ranks, run_ranks(request.param, _over_gloo)


Seen = tuple[list[Any], list[Any]]


@needs_mpi
@pytest.mark.parametrize("chunk", [mpi.CHUNK_BYTES, 37], ids=["whole messages", "messages in chunks"])
@pytest.mark.parametrize("what", ["collectives", "equal", "unequal"])
def test_mpi_gives_gloos_bits_and_bytes(seen: Seen, what: str, chunk: int) -> None:
    for (by_mpi, _, _), by_gloo in zip(*seen, strict=True):
        for index, (left, right) in enumerate(zip(by_mpi[chunk][what], by_gloo[what], strict=True)):
            if what == "collectives" and index == 0:
                for number, (one, other) in enumerate(zip(left, right, strict=True)):
                    assert one == other, f"collective {number}"
            assert left == right, f"{what} {index}"


@needs_mpi
def test_sums_are_taken_in_rank_order(seen: Seen) -> None:
    size = len(seen[0])
    expected = drawn(0).numpy()
    for rank in range(1, size):
        expected = expected + drawn(rank).numpy()
    for rank, (_, _, (reduced, scattered)) in enumerate(seen[0]):
        np.testing.assert_array_equal(reduced, expected)
        np.testing.assert_array_equal(scattered, np.split(expected, size)[rank])


@needs_mpi
def test_a_broken_exchange_and_a_miscounted_launch_are_told_with_a_remedy(seen: Seen) -> None:
    size = len(seen[0])
    for rank, (_, said, _) in enumerate(seen[0]):
        assert f"rank {rank} of {size} lost a peer in another silo while exchanging position" in said["broken"]
        assert "resumes from its last checkpoint" in said["broken"]
        assert f"rank {rank} of {size + 1}, but MPI calls it rank {rank} of {size}" in said["miscounted"]
        assert "set federation.backend to gloo" in said["miscounted"]
        assert not any("\n" in message for message in said.values())


def test_without_mpi4py_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(FederationError, match="install mpi4py .* or set federation.backend to gloo"):
        mpi.mpi_group((0, 1), 0, 2)
