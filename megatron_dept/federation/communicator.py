"""Communicators between silos, and inside one, that count what they send.

The federation's process groups are built on a store of their own and never touch torch's default group: each silo's
DeepSpeed world stays whole and knows of no other. Every collective here names the kind of its payload for the ledger.
"""

import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dept.common.errors import FederationError
from megatron_dept.federation.ledger import (
    Kind,
    Ledger,
    Scope,
    all_gather_bytes,
    all_reduce_bytes,
)

NO_LIMIT = timedelta(days=365)
POLL_SECONDS = 0.005


class Communicator(Protocol):
    """The collectives that rounds need; `rank` and `size` are within the group."""

    rank: int
    size: int

    def all_to_all(self, send: Tensor, send_counts: list[int], receive_counts: list[int], kind: Kind) -> Tensor: ...
    def all_gather(self, mine: Tensor, kind: Kind) -> Tensor: ...
    def all_reduce_sum(self, value: Tensor, kind: Kind) -> None: ...
    def broadcast(self, value: Tensor, source: int, kind: Kind) -> None: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
    def barrier(self) -> None: ...
    def wait_for_all(self, meanwhile: Callable[[], object]) -> None: ...


class Alone:
    """The communicator of a group of one: nothing is sent."""

    rank = 0
    size = 1

    def all_to_all(self, send: Tensor, send_counts: list[int], receive_counts: list[int], kind: Kind) -> Tensor:
        return send

    def all_gather(self, mine: Tensor, kind: Kind) -> Tensor:
        return mine

    def all_reduce_sum(self, value: Tensor, kind: Kind) -> None:
        return None

    def broadcast(self, value: Tensor, source: int, kind: Kind) -> None:
        return None

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None

    def wait_for_all(self, meanwhile: Callable[[], object]) -> None:
        return None


class GroupCommunicator:
    """Collectives over one `torch.distributed.ProcessGroup`, charged to a ledger under one scope."""

    def __init__(self, group: dist.ProcessGroup, ledger: Ledger, scope: Scope, device: torch.device) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self._ledger = ledger
        self._scope = scope
        self._device = device

    def all_to_all(self, send: Tensor, send_counts: list[int], receive_counts: list[int], kind: Kind) -> Tensor:
        """Send `send_counts[i]` leading elements (or rows) of `send`, in rank order, to rank i; return what came.

        `send`: [sum(send_counts), ...], contiguous. Returns [sum(receive_counts), ...] in rank order, same dtype.
        """
        received = send.new_empty((sum(receive_counts), *send.shape[1:]))
        self._run(self.group.alltoall_base(received, send, receive_counts, send_counts), kind)
        row_bytes = send.element_size() * (send[0].numel() if len(send) else 0)
        self._ledger.add(self._scope, kind, row_bytes * (sum(send_counts) - send_counts[self.rank]))
        return received

    def all_gather(self, mine: Tensor, kind: Kind) -> Tensor:
        """Concatenate equal-sized 1-d slices of all ranks: [n] -> [size * n]."""
        whole = mine.new_empty(self.size * mine.numel())
        self._run(self.group._allgather_base(whole, mine), kind)
        self._ledger.add(self._scope, kind, all_gather_bytes(mine.numel() * mine.element_size(), self.size))
        return whole

    def all_reduce_sum(self, value: Tensor, kind: Kind) -> None:
        """Sum `value` over the ranks, in place."""
        self._run(self.group.allreduce([value]), kind)
        self._ledger.add(self._scope, kind, all_reduce_bytes(value.numel() * value.element_size(), self.size))

    def broadcast(self, value: Tensor, source: int, kind: Kind) -> None:
        """Copy rank `source`'s `value` into everyone's, in place."""
        if not value.numel():
            return
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._run(self.group.broadcast([value], options), kind)
        if self.rank == source:
            self._ledger.add(self._scope, kind, all_gather_bytes(value.numel() * value.element_size(), self.size))

    def all_gather_object(self, value: Any) -> list[Any]:
        """Everyone's picklable `value`, in rank order (control traffic: counts and flags, never tensors)."""
        payload = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self._device)
        lengths = self.all_gather(torch.tensor([payload.numel()], device=self._device), "control").tolist()
        padded = payload.new_zeros(max(lengths))
        padded[: payload.numel()] = payload
        whole = self.all_gather(padded, "control").cpu().view(self.size, -1)
        return [pickle.loads(row[:length].numpy().tobytes()) for row, length in zip(whole, lengths, strict=True)]

    def barrier(self) -> None:
        """Return once every rank has come; a dead peer is an error, not a hang."""
        self.all_reduce_sum(torch.zeros(1, device=self._device), "control")

    def wait_for_all(self, meanwhile: Callable[[], object]) -> None:
        """A barrier without the time limit, for waiting while another rank works; a dead peer is still an error.

        `meanwhile` is called again and again until all have come; signals are handled between the calls.
        """
        token = torch.zeros(1, device=self._device)
        options = dist.AllreduceOptions()
        options.timeout = NO_LIMIT
        work = self.group.allreduce([token], options)
        while not work.is_completed():
            meanwhile()
            time.sleep(POLL_SECONDS)
        self._run(work, "control")
        self._ledger.add(self._scope, "control", all_reduce_bytes(token.numel() * token.element_size(), self.size))

    def _run(self, work: Any, kind: Kind) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            where = "another silo" if self._scope == "federation" else "this silo"
            first = str(error).strip().splitlines()[0]
            raise FederationError(
                f"rank {self.rank} of {self.size} lost a peer in {where} while exchanging {kind} ({first}); "
                "look at that rank's log, then start again: the run resumes from its last checkpoint"
            ) from error


def join_peers(
    store: dist.Store, name: str, rank: int, size: int, device: torch.device, timeout_seconds: float
) -> dist.ProcessGroup:
    """A process group over `size` peers that meet at `store` under `name`, outside torch's default group.

    gloo for CPU tensors; NCCL as well where `device` is a GPU.
    """
    prefixed = dist.PrefixStore(name, store)
    group = dist.ProcessGroup(prefixed, rank, size)
    timeout = timedelta(seconds=timeout_seconds)
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", prefixed), rank, size, timeout)
    backend_type = dist.ProcessGroup.BackendType
    group._register_backend(torch.device("cpu"), backend_type.GLOO, gloo)
    group._set_default_backend(backend_type.GLOO)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", prefixed), rank, size, options)
        group._register_backend(torch.device("cuda"), backend_type.NCCL, nccl)
        group._set_default_backend(backend_type.NCCL)
    return group
