"""Stage 0: every data rank holds all of its silo's fp32 body that its tensor rank and stage hold.

Data rank d speaks for the d-th equal slice of it, so that partitions mean the same as in the other stages.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dept.common.segments import Segment
from megatron_dept.engine.body_shards.base import BodyShards, moments, replaced, step_tensor
from megatron_dept.federation.communicator import Communicator
from megatron_dept.tensor_parallel.shards import ParameterShard


class ReplicatedShards(BodyShards):
    """`data`: the ranks that hold the same parameters."""

    def __init__(self, engine: Any, body: nn.Module, cut: Mapping[str, ParameterShard], data: Communicator) -> None:
        self._data = data
        self._parameters = dict(body.named_parameters())
        self._optimizer = engine.optimizer
        total = sum(parameter.numel() for parameter in self._parameters.values())
        numel = -(-total // data.size)
        low, high = data.rank * numel, min((data.rank + 1) * numel, total)
        local = []
        begin = 0
        for name, parameter in self._parameters.items():
            start, stop = max(low, begin), min(high, begin + parameter.numel())
            if start < stop:
                local.append(Segment(name, start - begin, stop - begin, start - low))
            begin += parameter.numel()
        super().__init__(local, cut, numel)

    @torch.no_grad()
    def read(self) -> Tensor:
        return self._cut(self._parameters)

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        self._paste(flat, self._parameters)

    def _gradient_parts(self) -> Iterator[Tensor]:
        for segment in self._local:
            parameter = self._parameters[segment.name]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield gradient.reshape(-1)[segment.start : segment.stop]

    def step(self, engine: Any, norm: float, coefficient: float | None) -> None:
        if coefficient is None:
            with replaced(engine.optimizer, step=lambda *_, **__: None):
                engine.step()
            return
        if coefficient < 1:
            gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
            torch._foreach_mul_(gradients, coefficient)
        engine.step()

    def optimizer_state(self) -> dict[str, Tensor]:
        states = {name: self._optimizer.state.get(parameter, {}) for name, parameter in self._parameters.items()}
        first = next(iter(states.values()))
        if not first:
            return {}
        flat = {key: self._cut({name: state[key] for name, state in states.items()}) for key in moments(first)}
        return {**flat, "step": step_tensor(first)}

    @torch.no_grad()
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        self._optimizer.state.clear()
        if not state:
            return
        for key in moments(state):
            whole = {name: torch.empty_like(parameter) for name, parameter in self._parameters.items()}
            self._paste(state[key], whole)
            for name, moment in whole.items():
                self._optimizer.state[self._parameters[name]][key] = moment
        for parameter in self._parameters.values():
            self._optimizer.state[parameter]["step"] = state["step"].squeeze(0).to(parameter.device, copy=True)

    def _cut(self, tensors: Mapping[str, Tensor]) -> Tensor:
        first = next(iter(tensors.values()))
        flat = first.new_zeros(self.numel, dtype=torch.float32)
        for segment in self._local:
            flat[segment.place] = tensors[segment.name].reshape(-1)[segment.start : segment.stop]
        return flat

    def _paste(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> None:
        first = next(iter(tensors.values()))
        whole = self._data.all_gather(flat.to(first.device).contiguous(), "parameter")
        begin = 0
        for tensor in tensors.values():
            tensor.copy_(whole[begin : begin + tensor.numel()].view_as(tensor))
            begin += tensor.numel()
