"""A silo whose body is cut into pipeline stages: DeepSpeed's 1F1B schedule, otherwise an engine like any silo's.

DeepSpeed's optimizer step is taken out of its schedule: it must wait for the norm over all stages and the embedding.
The tied table stands on the first and the last stage; what becomes of its two gradients is the owner's concern.

Shapes: `b` sequences of a micro-batch on this rank, `s` tokens a sequence.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn

from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.embedding_owner import EmbeddingOwner, build_optimizer
from megatron_dept.engine.pipeline_module import EmbeddingSlot, pipeline_module
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.models.embedding import SourceEmbedding

Batches = Iterable[tuple[Tensor, Tensor]]
"""Micro-batches of (inputs, targets), int64 [b, s] each, all of one shape; the same on every stage."""


class StagedEngine(PipelineEngine):
    """DeepSpeed's pipeline engine, its schedules run without the step, the collectives and the monitors around them."""

    def accumulate(self, batches: Batches, shape: torch.Size) -> Tensor:
        """Forward, backward and the gradients' reduction; returns the losses' sum, zero before the last stage."""
        self._run(self._train_schedule(), batches, shape)
        return torch.zeros((), device=self.device) if self.total_loss is None else self.total_loss

    @torch.no_grad()
    def score(self, batches: Batches, count: int, shape: torch.Size) -> list[Tensor]:
        """Forward of `count` micro-batches; what `loss_fn` made of each on the last stage, nothing before it."""
        self._run(self._inference_schedule(count), batches, shape)
        return self.fwd_outputs

    def step(self) -> None:
        """Step the optimizer on the gradients that `accumulate` left."""
        self._exec_optimizer_step()

    def _run(self, instructions: schedule.PipeSchedule, batches: Batches, shape: torch.Size) -> None:
        if shape != self._last_shape:
            # Stages tell one another a shape only once; all of them come by here, so all start anew.
            self.reset_activation_shape()
            self._last_shape = shape
        self.total_loss = None
        self._compute_loss = True
        self.set_dataiterator(iter(batches))
        self._exec_schedule(instructions)
        # The last micro-batch's graph would keep a source's table alive until the next step.
        self.data_iterator = self.loss = None

    def _leave_step(self, lr_kwargs: Any = None) -> None:
        """What the schedule does in place of the optimizer step."""

    _last_shape: torch.Size | None = None
    # DeepSpeed looks instructions up here: overriding the method they are named after changes nothing.
    _INSTRUCTION_MAP = PipelineEngine._INSTRUCTION_MAP | {schedule.OptimizerStep: _leave_step}


class PipelineSiloEngine(SiloEngine):
    """A rank of a silo with several stages; `body` is this rank's part (`models.parts.BodyPart`)."""

    engine: StagedEngine

    def _initialise(self, config: RunConfig, body: nn.Module) -> StagedEngine:
        self._slot = EmbeddingSlot()
        world = self._world
        module = pipeline_module(body, self._slot, world.shape, world.place.pipe)
        settings = self._deepspeed_config(config, sum(parameter.numel() for parameter in body.parameters()))
        return StagedEngine(
            args=None,
            model=module,
            optimizer=build_optimizer(list(body.parameters()), config.optimizer),
            mpu=module.mpu(),
            config=settings,
            config_class=DeepSpeedConfig(settings, module.mpu()),
            dist_init_required=False,
        )

    def _accumulate(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], owner: EmbeddingOwner | None, want_activation_norm: bool
    ) -> tuple[Tensor, float | None]:
        with self._slot.holding(None if owner is None else owner.module, training=True):
            loss_sum = self.engine.accumulate(micro_batches, micro_batches[0][0].shape)
            return loss_sum, self._slot.output_norm() if want_activation_norm else None

    @torch.no_grad()
    def token_losses(self, embedding: SourceEmbedding | None, inputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each target: fp32 [b, s]; inputs and targets int64 [b, s] of local ids.

        Collective over the stages and tensor ranks, all of which are given the same ids and know the losses
        afterwards. `embedding` is None on the stages that hold none.
        """
        self.engine.eval()
        # Equal pieces, so that the stages work at the same time; more than two a stage would hardly fill them better.
        count = max(pieces for pieces in range(1, 2 * self._world.shape.pipe + 1) if len(inputs) % pieces == 0)
        pieces = list(zip(inputs.chunk(count), targets.chunk(count), strict=True))
        with self._slot.holding(embedding, training=False):
            scored = self.engine.score(pieces, count, pieces[0][0].shape)
        if self._world.last_stage:
            losses = torch.cat(scored)
        else:
            losses = torch.empty(targets.shape, dtype=torch.float32, device=self._world.device)
        self._world.stages.broadcast(losses, self._world.shape.pipe - 1, "activation")
        return losses

    def _deepspeed_config(self, config: RunConfig, elements: int) -> dict[str, Any]:
        settings = super()._deepspeed_config(config, elements)
        if config.parallel.zero_stage:
            settings["zero_optimization"]["overlap_comm"] = False  # DeepSpeed would say so and do it itself
        # Tensor ranks' hidden states may be different parts of the sequence: none stands for another's.
        return settings | {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
