"""Counts what DeepSpeed sends inside a silo, at the one object all of its collectives pass through."""

from collections.abc import Callable
from typing import Any

import deepspeed.comm.comm as deepspeed_comm
from torch import Tensor

from megatron_dept.federation.ledger import Kind, Ledger, all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def count_silo_traffic(ledger: Ledger, ranks: int) -> None:
    """Charge DeepSpeed's collectives over the silo's `ranks` to `ledger`: reductions as gradient, gathers as parameter.

    DeepSpeed's own communication logger synchronises around every call; this only adds a number.
    """
    backend = deepspeed_comm.cdb
    if ranks == 1 or backend is None:
        return

    def wrap(method: str, kind: Kind, cost: Callable[[Any, Any], int]) -> None:
        inner = getattr(backend, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            ledger.add("silo", kind, cost(args, kwargs))
            return inner(*args, **kwargs)

        setattr(backend, method, counted)

    def argument(name: str, index: int) -> Callable[[Any, Any], Any]:
        return lambda args, kwargs: kwargs[name] if name in kwargs else args[index]

    tensor, gathered, scattered = argument("tensor", 0), argument("input_tensor", 1), argument("input_tensor", 1)
    wrap("all_reduce", "gradient", lambda a, k: all_reduce_bytes(_size(tensor(a, k)), ranks))
    wrap("reduce", "gradient", lambda a, k: _size(tensor(a, k)))
    wrap("reduce_scatter_tensor", "gradient", lambda a, k: reduce_scatter_bytes(_size(scattered(a, k)), ranks))
    wrap("all_gather_into_tensor", "parameter", lambda a, k: all_gather_bytes(_size(gathered(a, k)), ranks))
    wrap("all_gather", "parameter", lambda a, k: all_gather_bytes(_size(argument("tensor", 1)(a, k)), ranks))
