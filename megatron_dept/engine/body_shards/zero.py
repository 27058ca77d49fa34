"""Stages 1 to 3: a torch optimizer steps flat fp32 masters that ZeRO has cut over the data ranks, one a group.

Shapes: `n` elements of this rank's partition, flat, padding included.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dept.common.segments import Segment
from megatron_dept.engine.body_shards.base import BodyShards, moments, replaced, step_tensor, without_padding
from megatron_dept.tensor_parallel.shards import ParameterShard


class _FlatShards(BodyShards):
    """`_zero` is DeepSpeed's optimizer, `_zero.optimizer` torch's."""

    _zero: Any

    @abstractmethod
    def _masters(self) -> list[Tensor]: ...

    @abstractmethod
    def _refresh(self) -> None: ...

    @torch.no_grad()
    def read(self) -> Tensor:
        flat = torch.cat([master.detach().view(-1).float() for master in self._masters()])
        # Stage 3 leaves its padding uninitialised: no norm, hash or sum of partitions may depend on it.
        return without_padding(flat, self._local)

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
        flat = {key: torch.cat([state[key].view(-1).float() for state in states]) for key in moments(states[0])}
        return {**flat, "step": step_tensor(states[0])}

    @torch.no_grad()
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        inner = self._zero.optimizer.state
        inner.clear()
        if not state:
            return
        offset = 0
        for master in self._masters():
            place = slice(offset, offset + master.numel())
            inner[master] = {key: state[key][place].to(master.device).clone() for key in moments(state)}
            inner[master]["step"] = state["step"].squeeze(0).to(master.device, copy=True)
            offset += master.numel()


class Stage12Shards(_FlatShards):
    """Stages 1 and 2: groups flattened, padded to divide, cut evenly over the data ranks."""

    def __init__(self, engine: Any, body: nn.Module, cut: Mapping[str, ParameterShard]) -> None:
        self._zero = zero = engine.optimizer
        local, numel = _even_cut(zero, body, zero.bit16_groups, zero.bit16_groups_flat, self._masters())
        super().__init__(local, cut, numel)

    def _masters(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def _refresh(self) -> None:
        self._zero.update_lp_params()

    def _gradient_parts(self) -> Iterator[Tensor]:
        for group, master in enumerate(self._masters()):
            if self._zero.cpu_offload:
                self._zero._wait_for_offload_copies()
                assert master.grad is not None
                yield master.grad
            else:
                left = master.numel()
                for part in self._zero.averaged_gradients[group]:
                    yield part
                    left -= part.numel()
                yield master.new_zeros(left)

    def step(self, engine: Any, norm: float, coefficient: float | None) -> None:
        zero = self._zero
        if coefficient is None:
            with replaced(zero, check_grad_overflow=True, check_overflow=lambda **_: _mark_overflow(zero)):
                engine.step()
            # DeepSpeed forgets these but for an offloaded body, whose next gradient would be added to the bad one.
            zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))
            return
        known = torch.tensor(norm, device=zero.device)
        with replaced(zero, clip_grad=_clip_value(norm, coefficient), scaled_global_norm=lambda *_, **__: known):
            engine.step()


class Bf16Shards(_FlatShards):
    """Stage 1 of a bf16 body whose gradients are summed in fp32 (DeepSpeed's BF16_Optimizer); cut like stage 1.

    Every data rank has the whole averaged gradient; each steps its own partition.
    """

    def __init__(self, engine: Any, body: nn.Module, cut: Mapping[str, ParameterShard]) -> None:
        self._zero = zero = engine.optimizer
        local, numel = _even_cut(zero, body, zero.bf16_groups, zero.bf16_groups_flat, self._masters())
        super().__init__(local, cut, numel)

    def _masters(self) -> list[Tensor]:
        return list(self._zero.fp32_groups_flat_partition)

    def _refresh(self) -> None:
        self._zero.update_lp_params()

    def _gradient_parts(self) -> list[Tensor]:
        return list(self._zero.fp32_groups_gradient_flat_partition)

    def step(self, engine: Any, norm: float, coefficient: float | None) -> None:
        # Its own step begins with a norm of its own, over the tensor ranks: this is what it does besides.
        with replaced(self._zero, step=lambda *_, **__: self._step(coefficient)):
            engine.step()

    @torch.no_grad()
    def _step(self, coefficient: float | None) -> None:
        zero = self._zero
        zero.overflow = coefficient is None
        if coefficient is not None:
            for master, gradient in zip(self._masters(), self._gradient_parts(), strict=True):
                master.grad = gradient.mul_(coefficient) if coefficient < 1 else gradient
            zero.optimizer.step()
            zero.update_lp_params()
        zero.clear_hp_grads()


class Stage3Shards(_FlatShards):
    """Stage 3: each parameter cut by itself, the pieces of a sub-group laid end to end."""

    def __init__(self, engine: Any, body: nn.Module, cut: Mapping[str, ParameterShard]) -> None:
        self._zero = engine.optimizer
        names = {id(parameter): name for name, parameter in body.named_parameters()}
        rank = torch.distributed.get_rank(self._zero.dp_process_group)
        local = []
        offset = 0
        for group in self._zero.fp16_groups:
            for parameter in group:
                size = parameter.partition_numel()
                start, stop = min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)
                if start < stop:
                    local.append(Segment(names[id(parameter)], start, stop, offset))
                offset += size
        assert offset == sum(m.numel() for m in self._masters()), "DeepSpeed's partitions are not what is known here"
        super().__init__(local, cut, offset)

    def _masters(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def _refresh(self) -> None:
        self._zero.checkpoint_event_prologue()
        for group in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()

    def _gradient_parts(self) -> Iterator[Tensor]:
        for group, master in enumerate(self._masters()):
            if self._zero.offload_optimizer:
                assert master.grad is not None
                yield master.grad
            else:
                yield from self._zero.averaged_gradients[group]

    def step(self, engine: Any, norm: float, coefficient: float | None) -> None:
        zero = self._zero
        if coefficient is None:

            def overflow(update_scale: bool = True) -> bool:
                zero.overflow = True
                return True

            with replaced(zero, _overflow_check_and_loss_scale_update=overflow):
                engine.step()
            return
        known = [torch.tensor(norm, device=zero.device)]
        with replaced(zero, clip_grad=_clip_value(norm, coefficient), _get_norm_groups=lambda: known):
            engine.step()


def _even_cut(
    zero: Any, body: nn.Module, groups: Sequence[list[Tensor]], flats: Sequence[Tensor], masters: Sequence[Tensor]
) -> tuple[list[Segment], int]:
    """Segments of the partition where groups are flattened whole and cut evenly, and its length."""
    names = {id(parameter): name for name, parameter in body.named_parameters()}
    local = []
    offset = 0
    for group, flat, master, ranks in zip(groups, flats, masters, zero.real_dp_process_group, strict=True):
        size = master.numel()
        low = torch.distributed.get_rank(ranks) * size
        for parameter in group:
            # A parameter is a view of the flat buffer: its address says where it begins, padding and all.
            begin = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            start, stop = max(low, begin), min(low + size, begin + parameter.numel())
            if start < stop:
                local.append(Segment(names[id(parameter)], start - begin, stop - begin, offset + start - low))
        offset += size
    return local, offset


def _clip_value(norm: float, coefficient: float) -> float:
    """The `clip_grad` with which ZeRO scales by exactly `coefficient`: it divides by (norm + 1e-6) / clip_grad."""
    return (norm + 1e-6) * coefficient if coefficient < 1 else 0.0


def _mark_overflow(zero: Any) -> None:
    zero.overflow = True
