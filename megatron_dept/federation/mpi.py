"""Communicators over MPI (`federation.backend: mpi`), for clusters whose network between sites speaks MPI.

Results and ledger are those of `GroupCommunicator`, with one reservation: sums of three and more floating-point numbers
are taken in rank order here, and in whatever order gloo or NCCL finds fastest there. What rounds average is summed by
`BodyExchange` and `RowTable` themselves, so their results are the same to the bit. CUDA tensors are staged through host
memory. No message is longer than `CHUNK_BYTES`: MPI counts with 32 bits.
mpi4py is imported, and with it MPI initialised, when the first communicator is asked for, not when this file is.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_dept.common.errors import FederationError
from megatron_dept.federation.communicator import CountedCommunicator
from megatron_dept.federation.ledger import Ledger, Scope
from megatron_dept.federation.pending import Pending

CHUNK_BYTES = 1 << 30


def mpi_group(members: tuple[int, ...], rank: int, world_size: int) -> Any:
    """An MPI communicator of these ranks of the launch, in their order; collective among them.

    `rank` and `world_size` are the launch's: `FederationError` where MPI counts otherwise, or cannot be loaded.
    """
    mpi = _load_mpi()
    world = mpi.COMM_WORLD
    if (world.rank, world.size) != (rank, world_size):
        raise FederationError(
            f"federation.backend mpi: this is rank {rank} of {world_size}, but MPI calls it rank {world.rank} of "
            f"{world.size}; start all ranks with one mpirun or srun, or set federation.backend to gloo"
        )
    return world.Create_group(world.Get_group().Incl(list(members)))


def _load_mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise FederationError(
            f"federation.backend mpi: mpi4py cannot be loaded ({first}); install mpi4py and an MPI library, or set "
            "federation.backend to gloo"
        ) from error
    return MPI


class MpiCommunicator(CountedCommunicator):
    """Collectives over an mpi4py communicator, as bytes: any dtype, CPU or staged CUDA tensors."""

    def __init__(
        self,
        group: Any,
        ledger: Ledger,
        scope: Scope,
        members: tuple[int, ...] = (),
        near: Collection[int] = (),
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """`group`: as from `mpi_group`. `members`, `near`: as for `GroupCommunicator`."""
        super().__init__(group.rank, group.size, ledger, scope, torch.device("cpu"), members, near)
        self._mpi = _load_mpi()
        self._group = group
        self._chunk = chunk_bytes
        self.failures = (self._mpi.Exception,)
        # MPI's default ends the whole job where it could have been said what was lost.
        group.Set_errhandler(self._mpi.ERRORS_RETURN)

    def _all_to_all(self, received: Tensor, send: Tensor, receive_counts: list[int], send_counts: list[int]) -> None:
        """Messages between pairs: both ends know their lengths, so both cut them alike without asking anyone."""
        coming, going = _buffer(received), _bytes(send)
        row_bytes = send.element_size() * int(np.prod(send.shape[1:]))
        sources, targets = _slices(coming, receive_counts, row_bytes), _slices(going, send_counts, row_bytes)
        requests = []
        for rank in range(self.size):
            if rank != self.rank:
                requests += [self._group.Irecv(chunk, source=rank) for chunk in self._chunks(sources[rank])]
        for rank in range(self.size):
            if rank != self.rank:
                requests += [self._group.Isend(chunk, dest=rank) for chunk in self._chunks(targets[rank])]
        sources[self.rank][:] = targets[self.rank]
        self._mpi.Request.Waitall(requests)
        _fill(received, coming)

    def _start_all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Pending:
        others = [rank for rank in range(self.size) if rank != self.rank]
        coming = {rank: _buffer(receive[rank]) for rank in others}
        going = {rank: _bytes(send[rank]) for rank in others}
        requests = [self._group.Irecv(chunk, source=rank) for rank in others for chunk in self._chunks(coming[rank])]
        requests += [self._group.Isend(chunk, dest=rank) for rank in others for chunk in self._chunks(going[rank])]
        arrivals = [(receive[rank], coming[rank]) for rank in others]
        return _Messages(self._mpi.Request.Waitall, requests, arrivals, going)

    def _all_gather(self, whole: Tensor, mine: Tensor) -> None:
        own = _bytes(mine)
        gathered = np.empty((self.size, len(own)), np.uint8)
        step = max(1, self._chunk // self.size)
        for start in range(0, len(own), step):
            part = np.ascontiguousarray(own[start : start + step])
            everyone = np.empty((self.size, len(part)), np.uint8)
            self._group.Allgather(part, everyone)
            gathered[:, start : start + step] = everyone
        _fill(whole, gathered.reshape(-1))

    def _all_reduce(self, value: Tensor, how: Literal["sum", "max"]) -> None:
        flat = value.reshape(-1)
        step = max(1, self._chunk // (self.size * value.element_size()))
        for start in range(0, flat.numel(), step):
            mine = flat[start : start + step].cpu()
            everyone = mine.new_empty(self.size * mine.numel())
            self._all_gather(everyone, mine)
            flat[start : start + step] = _fold(everyone.view(self.size, -1), how).to(value.device)
        value.copy_(flat.view_as(value))

    def _reduce_scatter(self, mine: Tensor, whole: Tensor) -> None:
        counts = [mine.numel()] * self.size
        everyone = torch.empty(whole.shape, dtype=whole.dtype)
        self._all_to_all(everyone, whole, counts, counts)
        mine.copy_(_fold(everyone.view(self.size, -1), "sum"))

    def _broadcast(self, value: Tensor, source: int) -> None:
        buffer = _bytes(value)
        for chunk in self._chunks(buffer):
            self._group.Bcast(chunk, root=source)
        _fill(value, buffer)

    def _start_barrier(self, token: Tensor) -> Any:
        return _Arrival(self._group.Ibarrier(), self._mpi.Exception)

    def _chunks(self, buffer: np.ndarray) -> list[np.ndarray]:
        return [buffer[start : start + self._chunk] for start in range(0, len(buffer), self._chunk)]


class _Messages:
    """Messages under way, and where what comes is to go; keeps what goes until it has gone."""

    def __init__(
        self,
        wait_all: Callable[[list[Any]], object],
        requests: list[Any],
        arrivals: list[tuple[Tensor, np.ndarray]],
        going: Mapping[int, np.ndarray],
    ) -> None:
        self._wait_all = wait_all
        self._requests = requests
        self._arrivals = arrivals
        self._going = going

    def wait(self) -> None:
        self._wait_all(self._requests)
        for target, buffer in self._arrivals:
            _fill(target, buffer)


class _Arrival:
    """A barrier under way, with the face of torch's Work: what goes wrong is raised by `wait`."""

    def __init__(self, request: Any, failure: type[Exception]) -> None:
        self._request = request
        self._failure = failure
        self._error: Exception | None = None

    def is_completed(self) -> bool:
        try:
            return bool(self._request.Test())
        except self._failure as error:
            self._error = error
            return True

    def wait(self) -> None:
        if self._error is not None:
            raise self._error


def _fold(by_rank: Tensor, how: Literal["sum", "max"]) -> Tensor:
    """Ranks' rows [size, n] summed, or their largest, in rank order: [n]."""
    combine: Callable[[Tensor, Tensor], Tensor] = torch.add if how == "sum" else torch.maximum
    total = by_rank[0].clone()
    for other in by_rank[1:]:
        total = combine(total, other)
    return total


def _bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes, uint8; of a contiguous CPU tensor without a copy."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _buffer(tensor: Tensor) -> np.ndarray:
    """Bytes to receive a tensor into: its own memory where MPI can reach it."""
    return _bytes(tensor) if _reachable(tensor) else np.empty(tensor.numel() * tensor.element_size(), np.uint8)


def _fill(tensor: Tensor, received: np.ndarray) -> None:
    """Copy received bytes into a tensor of that many, unless they were received in its own memory."""
    own = _reachable(tensor) and np.may_share_memory(received, _bytes(tensor))
    if tensor.numel() and not own:
        tensor.copy_(torch.from_numpy(received).view(tensor.dtype).view(tensor.shape))


def _reachable(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous()


def _slices(buffer: np.ndarray, counts: list[int], row_bytes: int) -> list[np.ndarray]:
    edges = np.cumsum([0, *counts]) * row_bytes
    return [buffer[edges[rank] : edges[rank + 1]] for rank in range(len(counts))]
