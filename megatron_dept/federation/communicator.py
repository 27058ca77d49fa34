"""Communicators between silos, and inside one, that count what they send.

The federation's process groups are built on a store of their own and never touch torch's default group: each silo's
DeepSpeed world stays whole and knows of no other. Every collective here names the kind of its payload for the ledger.
`CountedCommunicator` has what all transports share: results' shapes, charges, errors; a transport moves the bytes.
"""

import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dept.common.errors import LostPeerError, first_line
from megatron_dept.federation.ledger import (
    Kind,
    Ledger,
    Scope,
    all_reduce_bytes,
    reduce_scatter_bytes,
)
from megatron_dept.federation.pending import Counted, Done, Messages, Pending

NO_LIMIT = timedelta(days=365)
POLL_SECONDS = 0.005
BUCKET_TAG = 1
"""Of messages between pairs of a group's ranks."""


class Communicator(Protocol):
    """The collectives that rounds need; `rank` and `size` are within the group, `members` are ranks of the launch.

    Collectives that are started and waited for later may overlap; all ranks start them in the same order.
    """

    rank: int
    size: int
    members: tuple[int, ...]

    def sums_on_the_way(self, device: torch.device) -> bool:
        """Whether a reduce-scatter is the cheap way to sum fp32 tensors of `device`: on gloo it is an all-reduce."""

    def start_all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor], kind: Kind) -> Pending: ...
    def start_all_gather(self, mine: Tensor, receive: Sequence[Tensor], kind: Kind) -> Pending: ...
    def start_reduce_scatter_sum(self, whole: Tensor, mine: Tensor, kind: Kind) -> Pending: ...
    def all_to_all(self, send: Tensor, send_counts: list[int], receive_counts: list[int], kind: Kind) -> Tensor: ...
    def all_gather(self, mine: Tensor, kind: Kind) -> Tensor: ...
    def all_reduce_sum(self, value: Tensor, kind: Kind) -> None: ...
    def all_reduce_max(self, value: Tensor, kind: Kind) -> None: ...
    def reduce_scatter_sum(self, whole: Tensor, kind: Kind) -> Tensor: ...
    def broadcast(self, value: Tensor, source: int, kind: Kind) -> None: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
    def barrier(self) -> None: ...
    def wait_for_all(self, meanwhile: Callable[[], object]) -> None: ...
    def close(self) -> None: ...


class Alone:
    """The communicator of a group of one: nothing is sent."""

    rank = 0
    size = 1
    members: tuple[int, ...] = ()

    def sums_on_the_way(self, device: torch.device) -> bool:
        return False

    def start_all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor], kind: Kind) -> Pending:
        return Done()

    def start_all_gather(self, mine: Tensor, receive: Sequence[Tensor], kind: Kind) -> Pending:
        return Done()

    def start_reduce_scatter_sum(self, whole: Tensor, mine: Tensor, kind: Kind) -> Pending:
        mine.copy_(whole)
        return Done()

    def all_to_all(self, send: Tensor, send_counts: list[int], receive_counts: list[int], kind: Kind) -> Tensor:
        return send

    def all_gather(self, mine: Tensor, kind: Kind) -> Tensor:
        return mine

    def all_reduce_sum(self, value: Tensor, kind: Kind) -> None:
        return None

    def all_reduce_max(self, value: Tensor, kind: Kind) -> None:
        return None

    def reduce_scatter_sum(self, whole: Tensor, kind: Kind) -> Tensor:
        return whole

    def broadcast(self, value: Tensor, source: int, kind: Kind) -> None:
        return None

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None

    def wait_for_all(self, meanwhile: Callable[[], object]) -> None:
        return None

    def close(self) -> None:
        return None


class CountedCommunicator(ABC):
    """The collectives of one group over some transport, charged to a ledger under one scope."""

    failures: tuple[type[Exception], ...] = (RuntimeError,)
    """What the transport raises when the group is broken."""

    def __init__(
        self,
        rank: int,
        size: int,
        ledger: Ledger,
        scope: Scope,
        device: torch.device,
        members: tuple[int, ...],
        near: Collection[int],
    ) -> None:
        self.rank = rank
        self.size = size
        self.members = members
        self._ledger = ledger
        self._scope: Scope = scope
        self._device = device
        self._near = frozenset(near) - {rank}
        assert not members or len(members) == size, f"{len(members)} members of a group of {size}"

    def sums_on_the_way(self, device: torch.device) -> bool:
        """See `Communicator`: no, unless the transport says otherwise."""
        return False

    def start_all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor], kind: Kind) -> Pending:
        """Begin to send `send[i]` to every other rank i and to fill `receive[i]` with what comes from it.

        All contiguous, of one dtype and of lengths that both ends know. Entries of this rank's own are left alone.
        """
        return self._start(send, receive, kind, "all_to_all")

    def start_all_gather(self, mine: Tensor, receive: Sequence[Tensor], kind: Kind) -> Pending:
        """Begin to send `mine` to every other rank i and to fill `receive[i]` with what comes from it, as above."""
        return self._start([mine] * self.size, receive, kind, "all_gather")

    def start_reduce_scatter_sum(self, whole: Tensor, mine: Tensor, kind: Kind) -> Pending:
        """Begin to fill `mine` [n] with this rank's part of the sum over the ranks of `whole` [size * n]."""
        with self._translated(kind):
            pending = self._start_reduce_scatter(mine, whole)
        sent = reduce_scatter_bytes(whole.numel() * whole.element_size(), self.size)
        return Counted(pending, self._translated, kind, lambda: self._charge(kind, "reduce_scatter", sent))

    def all_to_all(self, send: Tensor, send_counts: list[int], receive_counts: list[int], kind: Kind) -> Tensor:
        """Send `send_counts[i]` leading elements (or rows) of `send`, in rank order, to rank i; return what came.

        `send`: [sum(send_counts), ...], contiguous. Returns [sum(receive_counts), ...] in rank order, same dtype.
        """
        received = send.new_empty((sum(receive_counts), *send.shape[1:]))
        with self._translated(kind):
            self._all_to_all(received, send, receive_counts, send_counts)
        row_bytes = send.element_size() * (send[0].numel() if len(send) else 0)
        self._charge_slices(kind, "all_to_all", [row_bytes * count for count in send_counts])
        return received

    def all_gather(self, mine: Tensor, kind: Kind) -> Tensor:
        """Concatenate equal-sized 1-d slices of all ranks: [n] -> [size * n]."""
        whole = mine.new_empty(self.size * mine.numel())
        with self._translated(kind):
            self._all_gather(whole, mine)
        self._charge_slices(kind, "all_gather", [mine.numel() * mine.element_size()] * self.size)
        return whole

    def all_reduce_sum(self, value: Tensor, kind: Kind) -> None:
        """Sum `value` over the ranks, in place."""
        self._reduce(value, "sum", kind)

    def all_reduce_max(self, value: Tensor, kind: Kind) -> None:
        """The largest of the ranks' `value`s by element, in place."""
        self._reduce(value, "max", kind)

    def reduce_scatter_sum(self, whole: Tensor, kind: Kind) -> Tensor:
        """This rank's [n] of the sum over the ranks of `whole` [size * n]."""
        mine = whole.new_empty(whole.numel() // self.size)
        with self._translated(kind):
            self._reduce_scatter(mine, whole)
        self._charge(kind, "reduce_scatter", reduce_scatter_bytes(whole.numel() * whole.element_size(), self.size))
        return mine

    def broadcast(self, value: Tensor, source: int, kind: Kind) -> None:
        """Copy rank `source`'s `value` into everyone's, in place."""
        if not value.numel():
            return
        with self._translated(kind):
            self._broadcast(value, source)
        if self.rank == source:
            self._charge_slices(kind, "broadcast", [value.numel() * value.element_size()] * self.size)
        else:
            self._ledger.note(self._scope, kind, "broadcast", self.members)

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
        with self._translated("control"):
            arrival = self._start_barrier(token)
        while not arrival.is_completed():
            meanwhile()
            time.sleep(POLL_SECONDS)
        with self._translated("control"):
            arrival.wait()
        self._charge("control", "wait_for_all", all_reduce_bytes(token.numel() * token.element_size(), self.size))

    def close(self) -> None:
        """Nothing to end, unless the transport says otherwise."""
        return None

    @abstractmethod
    def _all_to_all(
        self, received: Tensor, send: Tensor, receive_counts: list[int], send_counts: list[int]
    ) -> None: ...

    @abstractmethod
    def _start_all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Pending: ...

    @abstractmethod
    def _all_gather(self, whole: Tensor, mine: Tensor) -> None: ...

    @abstractmethod
    def _all_reduce(self, value: Tensor, how: Literal["sum", "max"]) -> None: ...

    @abstractmethod
    def _reduce_scatter(self, mine: Tensor, whole: Tensor) -> None: ...

    @abstractmethod
    def _broadcast(self, value: Tensor, source: int) -> None: ...

    @abstractmethod
    def _start_barrier(self, token: Tensor) -> Any:
        """Begin a barrier without a time limit; returns what has `is_completed()` and a `wait()` that may raise."""

    def _start_reduce_scatter(self, mine: Tensor, whole: Tensor) -> Pending:
        """At once, unless the transport says otherwise."""
        self._reduce_scatter(mine, whole)
        return Done()

    def _start(self, send: Sequence[Tensor], receive: Sequence[Tensor], kind: Kind, operation: str) -> Pending:
        with self._translated(kind):
            pending = self._start_all_to_all(send, receive)
        sent = [tensor.numel() * tensor.element_size() for tensor in send]
        return Counted(pending, self._translated, kind, lambda: self._charge_slices(kind, operation, sent))

    def _reduce(self, value: Tensor, how: Literal["sum", "max"], kind: Kind) -> None:
        with self._translated(kind):
            self._all_reduce(value, how)
        self._charge(kind, f"all_reduce_{how}", all_reduce_bytes(value.numel() * value.element_size(), self.size))

    def _charge(self, kind: Kind, operation: str, sent: int) -> None:
        self._ledger.add(self._scope, kind, sent, operation, self.members)

    def _charge_slices(self, kind: Kind, operation: str, slices: list[int]) -> None:
        """Charge bytes by the rank they went to: those to this rank's own silo never left it."""
        near = sum(slices[rank] for rank in self._near)
        self._ledger.add(
            self._scope, kind, sum(slices) - slices[self.rank] - near, operation, self.members, sent_near=near
        )

    @contextmanager
    def _translated(self, kind: Kind) -> Iterator[None]:
        try:
            yield
        except self.failures as error:
            where = "another silo" if self._scope == "federation" else "this silo"
            raise LostPeerError(
                f"rank {self.rank} of {self.size} lost a peer in {where} while exchanging {kind} ({first_line(error)})"
            ) from error


class GroupCommunicator(CountedCommunicator):
    """Collectives over one `torch.distributed.ProcessGroup`."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        ledger: Ledger,
        scope: Scope,
        device: torch.device,
        members: tuple[int, ...] = (),
        near: Collection[int] = (),
    ) -> None:
        """`members`: the group's ranks as ranks of the launch. `near`: ranks of the group that belong to this silo.

        What goes to `near` ranks is charged as the silo's in collectives that send each rank its slice.
        """
        super().__init__(group.rank(), group.size(), ledger, scope, device, members, near)
        self.group = group
        self._staged = not _reaches_gpus(group)

    def sums_on_the_way(self, device: torch.device) -> bool:
        """What is on a GPU goes over NCCL, where the group has it; an offloaded partition over gloo."""
        return not self._staged and device.type == "cuda"

    def _start_all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Pending:
        """On gloo as messages between pairs, sent from where it lies: its all-gather copies what it is given."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        if send[self.rank].is_cuda and not self._staged:
            own = send[self.rank][:0]
            lists = [[own if rank == self.rank else of[rank] for rank in range(self.size)] for of in (receive, send)]
            return self.group.alltoall(lists[0], lists[1])
        reached = {rank: self._reached(receive[rank]) for rank in others if receive[rank].numel()}
        works = [self.group.recv([target], rank, BUCKET_TAG) for rank, target in reached.items()]
        for rank in others:
            if send[rank].numel():
                works.append(self.group.send([self._reached(send[rank])], rank, BUCKET_TAG))
        return Messages(works, [(receive[rank], it) for rank, it in reached.items() if it is not receive[rank]])

    def _all_to_all(self, received: Tensor, send: Tensor, receive_counts: list[int], send_counts: list[int]) -> None:
        with self._within_reach(received) as target:
            self.group.alltoall_base(target, self._reached(send), receive_counts, send_counts).wait()

    def _all_gather(self, whole: Tensor, mine: Tensor) -> None:
        with self._within_reach(whole) as target:
            self.group._allgather_base(target, self._reached(mine)).wait()

    def _all_reduce(self, value: Tensor, how: Literal["sum", "max"]) -> None:
        options = dist.AllreduceOptions()
        if how == "max":
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        with self._within_reach(value) as target:
            self.group.allreduce([target], options).wait()

    def _reduce_scatter(self, mine: Tensor, whole: Tensor) -> None:
        with self._within_reach(mine) as target:
            self.group._reduce_scatter_base(target, self._reached(whole), dist.ReduceScatterOptions()).wait()

    def _start_reduce_scatter(self, mine: Tensor, whole: Tensor) -> Pending:
        if self._staged:
            return super()._start_reduce_scatter(mine, whole)
        return self.group._reduce_scatter_base(mine, whole, dist.ReduceScatterOptions())

    def _broadcast(self, value: Tensor, source: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = source
        with self._within_reach(value) as target:
            self.group.broadcast([target], options).wait()

    def close(self) -> None:
        """End the group's GPU transport in good order, once its last collective is done everywhere."""
        if not self._staged:
            self.group._get_backend(torch.device("cuda")).shutdown()

    def _reached(self, tensor: Tensor) -> Tensor:
        """`tensor`, or its copy in host memory where the group cannot take it from a GPU."""
        return tensor.cpu() if self._staged else tensor

    @contextmanager
    def _within_reach(self, tensor: Tensor) -> Iterator[Tensor]:
        """`tensor` to be filled, or host memory in its place, copied back at the end."""
        reached = self._reached(tensor)
        yield reached
        if reached is not tensor:
            tensor.copy_(reached)

    def _start_barrier(self, token: Tensor) -> Any:
        options = dist.AllreduceOptions()
        options.timeout = NO_LIMIT
        return self.group.allreduce([token], options)


def _reaches_gpus(group: dist.ProcessGroup) -> bool:
    """Whether a group takes tensors from GPUs; one over gloo alone has them staged through host memory."""
    try:
        group._get_backend(torch.device("cuda"))
    except RuntimeError:
        return False
    return True


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
