"""One rank under mpirun: `python -m tests.federation.mpi_ranks FOLDER` writes what it saw to FOLDER/<rank>."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dept.common.errors import FederationError
from megatron_dept.federation import mpi
from megatron_dept.federation.communicator import Communicator
from megatron_dept.federation.ledger import Ledger, Scope
from tests.federation.groups import Connect
from tests.federation.transports import experiment


def over_mpi(rank: int, size: int, chunk_bytes: int) -> Connect:
    """Connects ranks by MPI."""

    def connect(
        name: str, ledger: Ledger, scope: Scope, members: tuple[int, ...], near: tuple[int, ...]
    ) -> Communicator:
        group = mpi.mpi_group(members, rank, size)
        return mpi.MpiCommunicator(group, ledger, scope, members, near, chunk_bytes)

    return connect


def failures(rank: int, size: int) -> dict[str, str]:
    """What is said when MPI refuses: a root that is not there, and a launch that counts otherwise."""
    said: dict[str, str] = {}
    group = mpi.MpiCommunicator(mpi.mpi_group(tuple(range(size)), rank, size), Ledger(), "federation")

    def attempt(name: str, action: Any) -> None:
        try:
            action()
        except FederationError as error:
            said[name] = str(error)

    attempt("broken", lambda: group.broadcast(torch.zeros(2), size + 3, "position"))
    attempt("miscounted", lambda: mpi.mpi_group((0, 1), rank, size + 1))
    return said


def drawn(rank: int) -> torch.Tensor:
    """Numbers whose sum depends on the order."""
    return torch.from_numpy(np.random.default_rng(rank).standard_normal(500).astype(np.float32))


def summed(rank: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All-reduced [500] and reduce-scattered [500 / size] sums of everyone's numbers."""
    group = mpi.MpiCommunicator(mpi.mpi_group(tuple(range(size)), rank, size), Ledger(), "federation")
    value = drawn(rank)
    group.all_reduce_sum(value, "gradient")
    return value.numpy(), group.reduce_scatter_sum(drawn(rank), "gradient").numpy()


def main(folder: Path) -> None:
    assert "mpi4py.MPI" not in sys.modules, "importing the package must not start MPI"
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    seen = {chunk: experiment(over_mpi(rank, size, chunk), rank, size) for chunk in (mpi.CHUNK_BYTES, 37)}
    (folder / str(rank)).write_bytes(pickle.dumps((seen, failures(rank, size), summed(rank, size))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
