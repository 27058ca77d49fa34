"""Forked ranks as one tensor group, and what each does there."""

import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dept.federation.communicator import GroupCommunicator, join_peers
from megatron_dept.federation.ledger import Ledger
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.vocabulary_shard import VocabularyShard
from megatron_dept.tensor_parallel.group import TensorGroup
from megatron_dept.tensor_parallel.mappings import (
    copy_to_ranks,
    gather_sequence,
    reduce_from_ranks,
    scatter_sequence_sum,
    sum_copied_rows,
    sum_gradients,
)
from megatron_dept.topology.launch import Launch
from tests.tensor_parallel.case import CASES, compute

CPU = torch.device("cpu")


class Recorded:
    """A group that writes down what it is asked for: (collective, elements)."""

    def __init__(self, inner: TensorGroup) -> None:
        self.inner, self.rank, self.size = inner, inner.rank, inner.size
        self.calls: list[tuple[str, int]] = []

    def all_reduce_sum(self, value: Tensor, kind: Any) -> None:
        self.calls.append(("sum", value.numel()))
        self.inner.all_reduce_sum(value, kind)

    def all_reduce_max(self, value: Tensor, kind: Any) -> None:
        self.calls.append(("max", value.numel()))
        self.inner.all_reduce_max(value, kind)

    def all_gather(self, mine: Tensor, kind: Any) -> Tensor:
        self.calls.append(("gather", mine.numel()))
        return self.inner.all_gather(mine, kind)

    def reduce_scatter_sum(self, whole: Tensor, kind: Any) -> Tensor:
        self.calls.append(("scatter", whole.numel()))
        return self.inner.reduce_scatter_sum(whole, kind)


def tensor_world(launch: Launch) -> tuple[GroupCommunicator, Ledger]:
    """All ranks as one tensor group, and the ledger that counts it."""
    store = dist.TCPStore(launch.address, launch.port, launch.world_size, launch.rank == 0)
    ledger = Ledger()
    group = join_peers(store, "tensor", launch.rank, launch.world_size, CPU, 60)
    return GroupCommunicator(group, ledger, "silo", CPU), ledger


def every_case(launch: Launch) -> bytes:
    """Each case's result by its name, and each experiment's; pickled, for a tensor sent as it is stays in the rank."""
    tensor, ledger = tensor_world(launch)
    seen: dict[str, Any] = {str(case): compute(case, tensor) for case in CASES}
    seen["kinds"] = ledger.take()
    seen["mappings"] = mappings(tensor)
    seen["collectives of the loss"] = {split: collectives_of_the_loss(tensor, split) for split in (False, True)}
    seen["refused"] = {name: refused(tensor, name) for name in REFUSED}
    return pickle.dumps(seen)


def mappings(tensor: TensorGroup) -> dict[str, Tensor]:
    """Each mapping's value and gradient on numbers that say whose they are."""
    mine = 10.0**tensor.rank
    seen: dict[str, Tensor] = {}

    def record(name: str, value: Tensor, output: Tensor, gradient: Tensor) -> None:
        output.backward(gradient)
        assert value.grad is not None
        seen[name], seen[f"{name} gradient"] = output.detach().clone(), value.grad

    value = torch.full((2, 3), mine, requires_grad=True)
    shared = torch.zeros(2, 3, requires_grad=True)
    neighbour = shared * 1  # made before the copy, so its backward comes after the copy's
    record("copy", value, copy_to_ranks(value, tensor) + neighbour, torch.full((2, 3), mine))
    assert shared.grad is not None
    seen["copy's neighbour"] = shared.grad
    value = torch.full((2, 3), mine, requires_grad=True)
    record("reduce", value, reduce_from_ranks(value * 1, tensor), torch.full((2, 3), mine))
    value = torch.tensor([[mine, 2 * mine], [3 * mine, 4 * mine]], requires_grad=True)[..., None]
    value.retain_grad()
    whole = torch.arange(4.0 * tensor.size).view(2, 2 * tensor.size, 1)
    record("gather", value, gather_sequence(value, tensor), whole * mine)
    value = (whole * mine).requires_grad_()
    part = torch.tensor([[mine, 2 * mine], [3 * mine, 4 * mine]])[..., None]
    record("scatter", value, scatter_sequence_sum(value, tensor), part)
    first, second = torch.zeros(2, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    joined = torch.cat([parameter.reshape(-1) for parameter in sum_gradients(tensor, first, second)])
    joined.backward(mine * torch.arange(8.0))
    assert first.grad is not None and second.grad is not None
    seen["sum"] = torch.cat([first.grad, second.grad.view(-1)])
    copied = torch.zeros(5, 2, requires_grad=True)
    copies = tensor.size // 2
    copied.register_hook(lambda gradient: sum_copied_rows(gradient, tensor, tensor.rank // 2, copies, 3))
    (copied * 1.0).backward(torch.full((5, 2), mine))
    assert copied.grad is not None
    seen["copied rows"] = copied.grad
    return seen


def collectives_of_the_loss(tensor: TensorGroup, split: bool) -> list[tuple[str, int]]:
    """What a loss of 2 x 8 tokens, hidden size 6, in chunks of 5, asks of the group, forward and backward."""
    recorded = Recorded(tensor)
    shard = VocabularyShard(recorded, 97, split)
    embedding = SourceEmbedding(torch.zeros(shard.stop - shard.start, 6), None, torch.float32, 5, shard)
    hidden = torch.zeros(2, 8 // tensor.size if split else 8, 6, requires_grad=True)
    embedding.loss(hidden, torch.zeros(2, 8, dtype=torch.int64)).backward()
    return recorded.calls


def _embed_foreign_id(tensor: TensorGroup, foreign: int) -> None:
    shard = VocabularyShard(tensor, 13)
    embedding = SourceEmbedding(torch.zeros(shard.stop - shard.start, 6), None, torch.float32, 5, shard)
    embedding.embed(torch.tensor([[0, foreign, 1]]))


def _lose_foreign_target(tensor: TensorGroup, foreign: int) -> None:
    shard = VocabularyShard(tensor, 13)
    embedding = SourceEmbedding(torch.zeros(shard.stop - shard.start, 6), None, torch.float32, 5, shard)
    embedding.loss(torch.zeros(1, 2, 6), torch.tensor([[0, foreign]]))


def _odd_sequence(tensor: TensorGroup, _: int) -> None:
    scatter_sequence_sum(torch.zeros(1, 2 * tensor.size + 1, 3), tensor)


REFUSED = {
    "id 13": (_embed_foreign_id, 13),
    "id -1": (_embed_foreign_id, -1),
    "target 13": (_lose_foreign_target, 13),
    "target -1": (_lose_foreign_target, -1),
    "odd sequence": (_odd_sequence, 0),
}


def refused(tensor: TensorGroup, name: str) -> str:
    """The error's type and message, or "" where there was none. Nobody waits for the others: all are refused."""
    function, argument = REFUSED[name]
    try:
        function(tensor, argument)
    except (ValueError, IndexError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
