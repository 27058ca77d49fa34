"""Everything rounds do over a communicator, once over each transport: results that must be equal, with their bytes."""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.federation.communicator import Communicator
from megatron_dept.federation.named_exchange import NamedBodyExchange
from megatron_dept.federation.row_spread import RowSpread
from megatron_dept.federation.row_table import RowTable
from megatron_dept.federation.shares import Packing
from megatron_dept.ops.wires import WIRES
from tests.federation.cuts import BACKWARD, ELEMENTS, SHAPES, TENSOR, WHOLE, Part
from tests.federation.groups import Connect, join_silos
from tests.federation.outer_reference import NESTEROV, Case, busy_rounds, local_body, start

CUTS: dict[int, list[list[Part]]] = {2: [WHOLE, BACKWARD], 4: [WHOLE, TENSOR]}
"""By number of ranks, a federation of unequal silos."""


def experiment(connect: Connect, rank: int, size: int) -> dict[str, Any]:
    """Collectives, both exchanges and row tables on `size` (2 or 4) ranks."""
    result: dict[str, Any] = {"collectives": _collectives(connect, rank, size)}
    result["equal"] = _equal_silos(connect, rank, size)
    result["unequal"] = _unequal_silos(connect, rank, size)
    return result


def bits(tensor: Tensor | None) -> Any:
    """Something that compares equal where every bit does."""
    if tensor is None:
        return None
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def _collectives(connect: Connect, rank: int, size: int) -> list[Any]:
    groups = join_silos(connect, "collectives", rank, (1, size - 1), among_peers=False)
    wide, ledger = groups.wide, groups.ledger
    ledger.trace = []
    seen: list[Any] = []

    def record(result: Any) -> None:
        seen.append((bits(result) if isinstance(result, Tensor) else result, ledger.take()))

    rows = [(rank + 2 * to) % 3 for to in range(size)]
    coming = [(source + 2 * rank) % 3 for source in range(size)]
    record(wide.all_to_all(_drawn(sum(rows), 5, seed=rank), rows, coming, "embedding"))
    record(wide.all_to_all(torch.empty(0, 5), [0] * size, [0] * size, "embedding"))
    record(wide.all_to_all(torch.arange(size) + 10 * rank, [1] * size, [1] * size, "control"))
    record(wide.all_gather(_drawn(33, seed=rank).bfloat16(), "parameter"))
    record(wide.all_gather(torch.empty(0), "parameter"))
    # Whole numbers: their sum does not depend on the order, which gloo chooses for itself.
    for value in (torch.arange(37.0) * (rank + 1), torch.full((2, 3), float(rank)), torch.tensor([rank, 5])):
        wide.all_reduce_sum(value, "gradient")
        record(value)
    if size == 2:
        value = _drawn(41, seed=rank)
        wide.all_reduce_sum(value, "gradient")
        record(value)
    value = _drawn(19, seed=rank)
    wide.all_reduce_max(value, "activation")
    record(value)
    record(wide.reduce_scatter_sum(torch.arange(7.0 * size) * (rank + 1), "gradient"))
    for source in range(size):
        value = _drawn(3, 11, seed=rank)
        wide.broadcast(value, source, "position")
        record(value)
    record(wide.all_gather_object({"rank": rank, "text": "x" * 100 * rank}))
    wide.barrier()
    record(None)
    wide.wait_for_all(lambda: None)
    record(None)
    return [seen, ledger.trace]


def _equal_silos(connect: Connect, rank: int, size: int) -> list[Any]:
    """Two silos of data ranks: partitions among peers, rows too."""
    groups = join_silos(connect, "equal", rank, (size // 2,) * 2, among_peers=True)
    case, (silo, inside) = Case(1601, NESTEROV, busy_rounds(2)), groups.place
    seen: list[Any] = []
    for everyone, wire in itertools.product((False, True), WIRES):
        # Buckets of one block, so that the larger partition travels in several at once.
        packing = Packing(wire, bucket_mb=1e-9)
        exchange = BodyExchange(groups.peers, torch.from_numpy(start(inside, 1601)), case.rule, everyone, packing)
        for round, counts in enumerate(case.rounds):
            for source in range(counts[silo]):
                exchange.add(torch.from_numpy(local_body(inside, round, silo, source, 1601)))
            exchange.finish(sum(counts))
            seen.append((bits(exchange.value), bits(exchange.momentum), groups.ledger.take()))
    spread = RowSpread.of_peers(23, 2, size // 2)
    return seen + _rows(spread, groups.peers, groups.silo, silo, inside, groups.ledger)


def _unequal_silos(connect: Connect, rank: int, size: int) -> list[Any]:
    """A silo of one rank and another: by names, rows of all."""
    cut = CUTS[size]
    sizes = tuple(len(parts) for parts in cut)
    groups = join_silos(connect, "unequal", rank, sizes, among_peers=False)
    case, (silo, inside) = Case(ELEMENTS, NESTEROV, busy_rounds(2)), groups.place
    part = cut[silo][inside]
    seen: list[Any] = []
    for everyone in (False, True):
        partition = torch.from_numpy(part.take(start(0, ELEMENTS)))
        exchange = NamedBodyExchange(groups.wide, partition, part.segments, SHAPES, case.rule, silo, everyone)
        for round, counts in enumerate(case.rounds):
            for source in range(counts[silo]):
                exchange.add(torch.from_numpy(part.take(local_body(0, round, silo, source, ELEMENTS))))
            exchange.finish(sum(counts))
            seen.append((bits(exchange.value), bits(exchange.momentum), groups.ledger.take()))
    return seen + _rows(RowSpread.of_all(23, sizes), groups.wide, groups.silo, silo, inside, groups.ledger)


def _rows(spread: RowSpread, wide: Communicator, embedding: Communicator, silo: int, inside: int, ledger: Any) -> list:
    """Three rounds of a table whose tensor ranks are the silo's ranks; in the last, silo 0 idles."""
    ranks = embedding.size
    table = RowTable("embedding", 4, spread, wide, embedding, ranks, NESTEROV, lambda a, b: _drawn(23, 4, seed=5)[a:b])
    seen: list[Any] = []
    for round in range(3):
        idle = round == 2 and silo == 0
        ids = torch.arange(0 if idle else 3 * silo, 0 if idle else 19 - round + 4 * silo)
        need = range(len(ids) * inside // ranks, len(ids) * (inside + 1) // ranks)
        seen.append((bits(table.gather(ids, need)), ledger.take()))
        table.accumulate(ids, _drawn(len(need), 4, seed=100 * round + 10 * silo + inside), need)
        table.apply()
        seen.append((bits(table.rows), bits(table.momentum), ledger.take()))
    return seen
