"""Counts what DeepSpeed sends inside a silo, at the one object all of its collectives pass through."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed.comm.comm as deepspeed_comm
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dept.federation.ledger import Kind, Ledger, all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes


@dataclass(frozen=True)
class _Call:
    """A method of DeepSpeed's communication backend: where its payload and its group stand among the arguments.

    `sent`: bytes a rank sends, by the payload's bytes and the ranks of the group.
    """

    method: str
    kind: Kind
    payload: tuple[str, int]
    group: int
    sent: Callable[[int, int], int]


_CALLS = (
    _Call("all_reduce", "gradient", ("tensor", 0), 2, all_reduce_bytes),
    _Call("reduce", "gradient", ("tensor", 0), 3, lambda size, ranks: size),
    _Call("reduce_scatter_tensor", "gradient", ("input_tensor", 1), 3, reduce_scatter_bytes),
    _Call("all_gather_into_tensor", "parameter", ("input_tensor", 1), 2, all_gather_bytes),
    _Call("all_gather", "parameter", ("tensor", 1), 2, all_gather_bytes),
    _Call("broadcast", "parameter", ("tensor", 0), 2, all_gather_bytes),
    _Call("send", "activation", ("tensor", 0), 2, lambda size, ranks: size),
)


def count_silo_traffic(ledger: Ledger, members: tuple[int, ...]) -> None:
    """Charge what DeepSpeed sends within a silo to `ledger`, each call by the group it is given.

    Reductions are gradient, gathers and broadcasts parameter, what a pipeline's stages send each other activation;
    single numbers, and integers such as shapes, are control. `members` are the launch's ranks of the silo, which is
    torch's default group. DeepSpeed's own communication logger synchronises around every call; this only adds a number.
    """
    backend = deepspeed_comm.cdb
    if len(members) == 1 or backend is None or getattr(backend, "charged_to", None) is ledger:
        return
    backend.charged_to = ledger
    for call in _CALLS:
        setattr(backend, call.method, _counted(call, getattr(backend, call.method), ledger, members))


def _counted(call: _Call, inner: Callable[..., Any], ledger: Ledger, members: tuple[int, ...]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        tensor: Tensor = _argument(*call.payload, args, kwargs)
        size = tensor.numel() * tensor.element_size()
        kind: Kind = "control" if _is_control(call, tensor) else call.kind
        if call.method == "send":
            ranks = [dist.get_rank(), _argument("dst", 1, args, kwargs)]
        else:
            group = _argument("group", call.group, args, kwargs)
            ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        touched = tuple(members[rank] for rank in ranks)
        if call.method == "broadcast" and _argument("src", 1, args, kwargs) != dist.get_rank():
            ledger.note("silo", kind, call.method, touched)
        else:
            ledger.add("silo", kind, call.sent(size, len(touched)), call.method, touched)
        return inner(*args, **kwargs)

    return counted


def _is_control(call: _Call, tensor: Tensor) -> bool:
    # DeepSpeed broadcasts a body as bytes; a pipeline's stages send one another no bytes but messages.
    messages = {torch.int64, torch.uint8} if call.method == "send" else {torch.int64}
    return tensor.numel() == 1 or tensor.dtype in messages


def _argument(name: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument however it was passed; None where it was left out."""
    return kwargs[name] if name in kwargs else args[position] if position < len(args) else None
