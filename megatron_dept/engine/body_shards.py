"""A rank's fp32 partition of the body, whatever the ZeRO stage: read, written, and known by parameter name.

Everything here reaches into DeepSpeed 0.19's private attributes; this is the only file that does, and setup.py pins
that version. The known trap: masters are written first, then the low-precision copies are refreshed from them; weights
written alone would be undone by the next step.

Shapes: `n` elements of this rank's partition, flat, padding included; padding is never named by a segment.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dept.common.segments import Segment
from megatron_dept.federation.communicator import Communicator


class BodyShards(ABC):
    """The partition of one engine. `segments` name every element of it that is not padding."""

    numel: int
    segments: list[Segment]

    @abstractmethod
    def read(self) -> Tensor:
        """A copy of the fp32 masters: [n] on the CPU or the masters' device, padding zero."""

    @abstractmethod
    def write(self, flat: Tensor) -> None:
        """Write [n] into the masters, then refresh every low-precision copy. Collective over the silo."""

    @abstractmethod
    def gradient_norm(self) -> float:
        """L2 norm of the silo's averaged body gradient; not finite where a gradient is not. Collective."""

    @abstractmethod
    def step(self, engine: Any, norm: float, coefficient: float | None) -> None:
        """`engine.step()` with the gradient scaled by `coefficient` (<= 1); None discards the gradient instead.

        `norm` is what `gradient_norm` returned for this step.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """The inner optimizer's state as flat [n] tensors by name, and its step count as "step" ([1])."""

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `optimizer_state` gave; an empty dictionary forgets all state. Collective under stage 0."""


def body_shards(engine: Any, body: nn.Module, stage: int, silo: Communicator) -> BodyShards:
    """The adapter for an initialised engine's ZeRO stage."""
    if stage == 0:
        return _ReplicatedShards(engine, body, silo)
    if stage == 3:
        return _Stage3Shards(engine, body)
    return _Stage12Shards(engine, body)


class _ReplicatedShards(BodyShards):
    """Stage 0: every data rank holds the whole fp32 body; rank d speaks for the d-th equal slice of it."""

    def __init__(self, engine: Any, body: nn.Module, silo: Communicator) -> None:
        self._silo = silo
        self._parameters = list(body.named_parameters())
        self._optimizer = engine.optimizer
        total = sum(parameter.numel() for _, parameter in self._parameters)
        self.numel = -(-total // silo.size)
        low, high = silo.rank * self.numel, min((silo.rank + 1) * self.numel, total)
        self.segments = []
        begin = 0
        for name, parameter in self._parameters:
            start, stop = max(low, begin), min(high, begin + parameter.numel())
            if start < stop:
                self.segments.append(Segment(name, start - begin, stop - begin, start - low))
            begin += parameter.numel()

    @torch.no_grad()
    def read(self) -> Tensor:
        return self._cut([parameter for _, parameter in self._parameters])

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        self._paste(flat, [parameter for _, parameter in self._parameters])

    @torch.no_grad()
    def gradient_norm(self) -> float:
        gradients = [parameter.grad for _, parameter in self._parameters if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def step(self, engine: Any, norm: float, coefficient: float | None) -> None:
        if coefficient is None:
            with _replaced(engine.optimizer, step=lambda *_, **__: None):
                engine.step()
            return
        if coefficient < 1:
            gradients = [parameter.grad for _, parameter in self._parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, coefficient)
        engine.step()

    def optimizer_state(self) -> dict[str, Tensor]:
        states = [self._optimizer.state.get(parameter, {}) for _, parameter in self._parameters]
        if not states[0]:
            return {}
        flat = {key: self._cut([state[key] for state in states]) for key in _moments(states[0])}
        return {**flat, "step": _step_tensor(states[0])}

    @torch.no_grad()
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        self._optimizer.state.clear()
        if not state:
            return
        for key in _moments(state):
            whole = [torch.empty_like(parameter) for _, parameter in self._parameters]
            self._paste(state[key], whole)
            for (_, parameter), moment in zip(self._parameters, whole, strict=True):
                self._optimizer.state[parameter][key] = moment
        for _, parameter in self._parameters:
            self._optimizer.state[parameter]["step"] = state["step"].squeeze(0).to(parameter.device, copy=True)

    def _cut(self, tensors: list[Tensor]) -> Tensor:
        by_name = dict(zip((name for name, _ in self._parameters), tensors, strict=True))
        flat = tensors[0].new_zeros(self.numel, dtype=torch.float32)
        for segment in self.segments:
            flat[segment.place] = by_name[segment.name].reshape(-1)[segment.start : segment.stop]
        return flat

    def _paste(self, flat: Tensor, tensors: list[Tensor]) -> None:
        whole = self._silo.all_gather(flat.contiguous(), "parameter")
        begin = 0
        for tensor in tensors:
            tensor.copy_(whole[begin : begin + tensor.numel()].view_as(tensor))
            begin += tensor.numel()


class _FlatShards(BodyShards):
    """Stages 1 to 3: the wrapped torch optimizer steps flat fp32 masters, one per group."""

    _zero: Any

    def _masters(self) -> list[Tensor]:
        raise NotImplementedError

    def _refresh(self) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def read(self) -> Tensor:
        flat = torch.cat([master.detach().view(-1).float() for master in self._masters()])
        # Stage 3 leaves its padding uninitialised: no norm, hash or sum of partitions may depend on it.
        for place in _padding(self.segments, self.numel):
            flat[place] = 0
        return flat

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        offset = 0
        for master in self._masters():
            master.data.view(-1).copy_(flat[offset : offset + master.numel()])
            offset += master.numel()
        self._refresh()

    def optimizer_state(self) -> dict[str, Tensor]:
        states = [self._zero.optimizer.state.get(master, {}) for master in self._masters()]
        if not states[0]:
            return {}
        flat = {key: torch.cat([state[key].view(-1).float() for state in states]) for key in _moments(states[0])}
        return {**flat, "step": _step_tensor(states[0])}

    @torch.no_grad()
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        inner = self._zero.optimizer.state
        inner.clear()
        if not state:
            return
        offset = 0
        for master in self._masters():
            place = slice(offset, offset + master.numel())
            inner[master] = {key: state[key][place].to(master.device).clone() for key in _moments(state)}
            inner[master]["step"] = state["step"].squeeze(0).to(master.device, copy=True)
            offset += master.numel()


class _Stage12Shards(_FlatShards):
    """Stages 1 and 2: groups flattened, padded to divide, cut evenly over the data ranks."""

    def __init__(self, engine: Any, body: nn.Module) -> None:
        self._zero = engine.optimizer
        names = {id(parameter): name for name, parameter in body.named_parameters()}
        self.segments = []
        offset = 0
        for group, flat in enumerate(self._zero.bit16_groups_flat):
            size = self._zero.single_partition_of_fp32_groups[group].numel()
            low = torch.distributed.get_rank(self._zero.real_dp_process_group[group]) * size
            for parameter in self._zero.bit16_groups[group]:
                # A parameter is a view of the flat buffer: its address says where it begins, padding and all.
                begin = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
                start, stop = max(low, begin), min(low + size, begin + parameter.numel())
                if start < stop:
                    name = names[id(parameter)]
                    self.segments.append(Segment(name, start - begin, stop - begin, offset + start - low))
            offset += size
        self.numel = offset

    def _masters(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def _refresh(self) -> None:
        self._zero.update_lp_params()

    def gradient_norm(self) -> float:
        return _unmasked(float(self._zero.scaled_global_norm()))

    def step(self, engine: Any, norm: float, coefficient: float | None) -> None:
        zero = self._zero
        if coefficient is None:
            with _replaced(zero, check_grad_overflow=True, check_overflow=lambda **_: _mark_overflow(zero)):
                engine.step()
            return
        known = torch.tensor(norm, device=zero.device)
        with _replaced(zero, clip_grad=_clip_value(norm, coefficient), scaled_global_norm=lambda *_, **__: known):
            engine.step()


class _Stage3Shards(_FlatShards):
    """Stage 3: each parameter cut by itself, the pieces of a sub-group laid end to end."""

    def __init__(self, engine: Any, body: nn.Module) -> None:
        self._zero = engine.optimizer
        names = {id(parameter): name for name, parameter in body.named_parameters()}
        rank = torch.distributed.get_rank(self._zero.dp_process_group)
        self.segments = []
        offset = 0
        for group in self._zero.fp16_groups:
            for parameter in group:
                size = parameter.partition_numel()
                start, stop = min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)
                if start < stop:
                    self.segments.append(Segment(names[id(parameter)], start, stop, offset))
                offset += size
        self.numel = offset
        assert offset == sum(m.numel() for m in self._masters()), "DeepSpeed's partitions are not what is known here"

    def _masters(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def _refresh(self) -> None:
        self._zero.checkpoint_event_prologue()
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()

    def gradient_norm(self) -> float:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return _unmasked(float(combine_grad_norm_groups(self._zero._get_norm_groups())))

    def step(self, engine: Any, norm: float, coefficient: float | None) -> None:
        zero = self._zero
        if coefficient is None:

            def overflow(update_scale: bool = True) -> bool:
                zero.overflow = True
                return True

            with _replaced(zero, _overflow_check_and_loss_scale_update=overflow):
                engine.step()
            return
        known = [torch.tensor(norm, device=zero.device)]
        with _replaced(zero, clip_grad=_clip_value(norm, coefficient), _get_norm_groups=lambda: known):
            engine.step()


def _padding(segments: list[Segment], numel: int) -> Iterator[slice]:
    """The places of a partition that no segment names."""
    at = 0
    for place in sorted((segment.place for segment in segments), key=lambda place: place.start):
        if at < place.start:
            yield slice(at, place.start)
        at = place.stop
    if at < numel:
        yield slice(at, numel)


def _moments(state: Any) -> list[str]:
    return sorted(key for key in state if key != "step")


def _step_tensor(state: Any) -> Tensor:
    return torch.as_tensor(state["step"], dtype=torch.float32).detach().cpu().reshape(1).clone()


def _unmasked(norm: float) -> float:
    """DeepSpeed reports a norm that is not finite as -1."""
    return norm if norm >= 0 else float("nan")


def _clip_value(norm: float, coefficient: float) -> float:
    """The `clip_grad` with which ZeRO scales by exactly `coefficient`: it divides by (norm + 1e-6) / clip_grad."""
    return (norm + 1e-6) * coefficient if coefficient < 1 else 0.0


def _mark_overflow(zero: Any) -> None:
    zero.overflow = True


@contextmanager
def _replaced(target: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of one object for the length of a block: how one step is told what DeepSpeed has no option for."""
    own = {name: target.__dict__[name] for name in attributes if name in target.__dict__}
    for name, value in attributes.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in own:
                setattr(target, name, own[name])
            else:
                delattr(target, name)
