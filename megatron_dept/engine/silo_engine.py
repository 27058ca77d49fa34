"""One silo's training engine: the body under DeepSpeed and ZeRO, the embedding beside it, one clip norm over both.

Shapes: `b` sequences of a micro-batch on this rank, `s` tokens a sequence, `h` hidden.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed  # noqa: E402  the accelerator is chosen above, before DeepSpeed looks for one
import deepspeed.ops  # noqa: E402

from megatron_dept.config.schema import RunConfig  # noqa: E402
from megatron_dept.engine.body_shards import body_shards  # noqa: E402
from megatron_dept.engine.embedding_owner import EmbeddingOwner, build_optimizer  # noqa: E402
from megatron_dept.engine.traffic import count_silo_traffic  # noqa: E402
from megatron_dept.engine.world import World  # noqa: E402
from megatron_dept.models.embedding import SourceEmbedding  # noqa: E402
from megatron_dept.models.tags import check_tagged  # noqa: E402
from megatron_dept.topology.layout import accumulation_steps  # noqa: E402

LARGEST_BUCKET = 50_000_000
"""Elements of a reduction bucket at most; DeepSpeed allocates it whole, so small bodies get a small one."""


@dataclass(frozen=True)
class StepResult:
    """One inner step, equal on every rank of the silo."""

    loss: float
    gradient_norm: float
    skipped: bool
    """The gradient was not finite: neither body nor embedding moved."""
    stop: bool
    """Some rank of the silo was asked to stop."""
    activation_norm: float | None
    """Mean L2 norm over tokens of the body's output, where it was asked for (this rank's last micro-batch)."""


class SiloEngine:
    """The body of one silo in a DeepSpeed engine. `shards` is this rank's fp32 partition of it."""

    def __init__(self, config: RunConfig, body: nn.Module, world: World) -> None:
        check_tagged(body)
        _quieten()
        self._world = world
        self._clip = config.optimizer.clip_grad
        self.accumulation_steps = accumulation_steps(
            config.training.global_batch_size, config.training.micro_batch_size, world.layout.data
        )
        self.body_shapes = {name: list(parameter.shape) for name, parameter in body.named_parameters()}
        # DeepSpeed would compile this optional op at start for minutes; gloo needs none of it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        count_silo_traffic(world.ledger, world.layout.silo_size)
        built = _copies(body) if config.training.precision == "bf16" else {}
        self.engine, *_ = deepspeed.initialize(
            model=body,
            optimizer=build_optimizer(list(body.parameters()), config.optimizer),
            config=self._deepspeed_config(config, sum(p.numel() for p in body.parameters())),
            dist_init_required=False,
        )
        self.shards = body_shards(self.engine, body, config.parallel.zero_stage, world.silo)
        if built:
            # DeepSpeed casts the body first and makes its fp32 masters of what the rounding left.
            flat = self.shards.read()
            for segment in self.shards.segments:
                flat[segment.place] = built[segment.name].view(-1)[segment.start : segment.stop]
            self.shards.write(flat)

    def train_step(
        self,
        micro_batches: Sequence[tuple[Tensor, Tensor]],
        owner: EmbeddingOwner,
        learning_rate: float,
        embedding_learning_rate: float,
        stop: Callable[[], bool] = lambda: False,
        want_activation_norm: bool = False,
    ) -> StepResult:
        """One inner step over this rank's micro-batches of (inputs, targets), local ids int64 [b, s] each.

        `stop` is asked at the end of the step, so that a request made during it is known after it.
        """
        assert len(micro_batches) == self.accumulation_steps
        self.engine.train()
        loss_sum = torch.zeros((), device=self._world.device)
        activation_norm = None
        for index, (inputs, targets) in enumerate(micro_batches):
            hidden = self.engine(owner.module(inputs))
            loss = owner.module.loss(hidden, targets)
            self.engine.backward(loss)
            loss_sum += loss.detach()
            if index + 1 < len(micro_batches):
                self.engine.step()
        if want_activation_norm:
            activation_norm = float(hidden.detach().float().norm(dim=-1).mean())
        body_norm = self.shards.gradient_norm()
        norm = math.sqrt(body_norm**2 + owner.reduce_gradients())
        coefficient = self._clip_coefficient(norm)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.shards.step(self.engine, body_norm, coefficient)
        owner.step(embedding_learning_rate, coefficient)
        agreed = torch.tensor([float(loss_sum) / len(micro_batches), float(stop())], dtype=torch.float64)
        self._world.silo.all_reduce_sum(agreed, "control")
        return StepResult(
            loss=float(agreed[0]) / self._world.silo.size,
            gradient_norm=norm,
            skipped=coefficient is None,
            stop=bool(agreed[1] > 0),
            activation_norm=activation_norm,
        )

    @torch.no_grad()
    def token_losses(self, embedding: SourceEmbedding, inputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each target: fp32 [b, s]. Collective under ZeRO-3."""
        self.engine.eval()
        return embedding.token_losses(self.engine(embedding(inputs)), targets)

    def write_monitor(self, events: list[tuple[str, float, int]]) -> None:
        """Hand (name, value, step) to DeepSpeed's monitors, where any is enabled."""
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events(events)

    def _clip_coefficient(self, norm: float) -> float | None:
        """torch's clip_grad_norm_ over body and embedding as one; None where the gradient is not finite."""
        if not math.isfinite(norm):
            return None
        return min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0

    def _deepspeed_config(self, config: RunConfig, elements: int) -> dict[str, Any]:
        training, log = config.training, config.logging
        bucket = min(max(elements, 1), LARGEST_BUCKET)
        zero: dict[str, Any] = {"stage": config.parallel.zero_stage}
        if config.parallel.zero_stage:
            zero |= {
                "overlap_comm": self._world.device.type == "cuda",
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
            }
        if config.parallel.zero_stage == 3:
            zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": max(elements, 1)}
            del zero["allgather_bucket_size"]
        monitor = {
            "output_path": str(config.run_dir / "monitor"),
            "job_name": f"silo{self._world.place.silo}",
            "enabled": True,
        }
        return {
            "train_batch_size": training.global_batch_size,
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation_steps,
            "zero_optimization": zero,
            # DeepSpeed calls plain SGD untested; tests/engine tests it.
            "zero_allow_untested_optimizer": config.optimizer.optimizer == "sgd",
            "bf16": {"enabled": training.precision == "bf16"},
            # The joint norm is clipped by this engine; DeepSpeed only knows the body.
            "gradient_clipping": 0.0,
            "steps_per_print": None,
            **({"tensorboard": monitor} if log.tensorboard else {}),
            **({"csv_monitor": monitor} if log.csv else {}),
            **({"wandb": {"enabled": True, "project": config.run_dir.name}} if log.wandb else {}),
        }


def _copies(body: nn.Module) -> dict[str, Tensor]:
    """The body's fp32 parameters as they were built, by name."""
    return {name: parameter.detach().clone() for name, parameter in body.named_parameters()}


def _quieten() -> None:
    """Silence, by its message, what the libraries say of each other; of what a user can act on nothing."""
    # torch 2.13 renames collectives that DeepSpeed 0.19 still calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
