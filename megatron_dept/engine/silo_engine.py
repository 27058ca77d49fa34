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
from deepspeed.runtime import bf16_optimizer  # noqa: E402

from megatron_dept.common.sizes import LARGEST_BUCKET  # noqa: E402
from megatron_dept.config.schema import RunConfig  # noqa: E402
from megatron_dept.engine.body_shards import body_shards  # noqa: E402
from megatron_dept.engine.body_shards.base import replaced  # noqa: E402
from megatron_dept.engine.embedding_owner import EmbeddingOwner, build_optimizer  # noqa: E402
from megatron_dept.engine.traffic import count_silo_traffic  # noqa: E402
from megatron_dept.engine.world import World  # noqa: E402
from megatron_dept.models.build import body_shapes  # noqa: E402
from megatron_dept.models.embedding import SourceEmbedding  # noqa: E402
from megatron_dept.models.tags import check_tagged  # noqa: E402
from megatron_dept.tensor_parallel.shards import shard_of  # noqa: E402
from megatron_dept.topology.layout import accumulation_steps  # noqa: E402


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
    """Mean L2 norm over tokens of the body's output, where asked for (of each data rank its last micro-batch)."""


class SiloEngine:
    """The body of one silo in a DeepSpeed engine. `shards` is this rank's fp32 partition of it.

    `_initialise` and `_accumulate` are what a pipeline does differently; everything else holds for every layout.
    """

    def __init__(self, config: RunConfig, body: nn.Module, world: World) -> None:
        check_tagged(body)
        _quieten()
        self._world = world
        self._clip = config.optimizer.clip_grad
        self.accumulation_steps = accumulation_steps(
            config.training.global_batch_size, config.training.micro_batch_size, world.shape.data
        )
        self.body_shapes = {name: list(shape) for name, shape in body_shapes(config.model).items()}
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        if backend == "gloo":
            # DeepSpeed would compile this optional op at start for minutes; gloo needs none of it, a GPU has none.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        count_silo_traffic(world.ledger, world.layout.members(world.place.silo))
        built = _copies(body) if config.training.precision == "bf16" else {}
        cut = {name: shard_of(parameter) for name, parameter in body.named_parameters()}
        # Of BF16_Optimizer's memory statistics, printed unasked, no user can make anything.
        with replaced(bf16_optimizer, see_memory_usage=lambda *_, **__: None):
            self.engine = self._initialise(config, body)
        self.shards = body_shards(self.engine, body, cut, world)
        if built:
            # DeepSpeed casts the body first and makes its fp32 masters of what the rounding left.
            self.shards.write_local(built)

    def _initialise(self, config: RunConfig, body: nn.Module) -> Any:
        """The DeepSpeed engine of `body`; collective over the silo."""
        engine, *_ = deepspeed.initialize(
            model=body,
            optimizer=build_optimizer(list(body.parameters()), config.optimizer),
            config=self._deepspeed_config(config, sum(p.numel() for p in body.parameters())),
            mpu=self._world.mpu,
            dist_init_required=False,
        )
        if config.parallel.zero_stage == 0 and self._world.shape.data == 1:
            # DeepSpeed would copy all gradients into a bucket, reduce it over this rank alone, and copy them back.
            engine.enable_backward_allreduce = False
        return engine

    def train_step(
        self,
        micro_batches: Sequence[tuple[Tensor, Tensor]],
        owner: EmbeddingOwner | None,
        learning_rate: float,
        embedding_learning_rate: float,
        stop: Callable[[], bool] = lambda: False,
        want_activation_norm: bool = False,
    ) -> StepResult:
        """One inner step over this rank's micro-batches of (inputs, targets), local ids int64 [b, s] each.

        `owner` is None on the stages of a pipeline that hold no embedding. `stop` is asked at the end of the step, so
        that a request made during it is known after it. Collective over the silo.
        """
        assert len(micro_batches) == self.accumulation_steps
        self.engine.train()
        loss_sum, activation_norm = self._accumulate(micro_batches, owner, want_activation_norm)
        squares = self.shards.gradient_square() + (owner.reduce_gradients() if owner else 0.0)
        # Read before the step is asked for: on a GPU the look waits for the backward, not for the optimizers too.
        mean_loss = float(loss_sum) / len(micro_batches)
        norm = self._world.root_of_sum(squares)
        coefficient = self._clip_coefficient(norm)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.shards.step(self.engine, norm, coefficient)
        if owner is not None:
            owner.step(embedding_learning_rate, coefficient)
        loss, wants_stop, mean_norm = self._agree(mean_loss, stop(), activation_norm)
        return StepResult(
            loss=loss,
            gradient_norm=norm,
            skipped=coefficient is None,
            stop=wants_stop,
            activation_norm=mean_norm if want_activation_norm else None,
        )

    def _accumulate(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], owner: EmbeddingOwner | None, want_activation_norm: bool
    ) -> tuple[Tensor, float | None]:
        """Forward and backward of all micro-batches and the body gradient's reduction over the data ranks; no step.

        Returns the losses' sum (fp32 scalar; zero on a stage that computes none) and, where it is wanted and this rank
        has the body's output, the mean over its tokens of their L2 norm.
        """
        assert owner is not None, "only a pipeline has ranks without embedding"
        loss_sum = torch.zeros((), device=self._world.device)
        for index, (inputs, targets) in enumerate(micro_batches):
            hidden = self.engine(owner.module(inputs))
            loss = owner.module.loss(hidden, targets)
            self.engine.backward(loss)
            loss_sum += loss.detach()
            if index + 1 < len(micro_batches):
                self.engine.step()
        return loss_sum, float(hidden.detach().float().norm(dim=-1).mean()) if want_activation_norm else None

    def _agree(self, loss: float, stop: bool, activation_norm: float | None) -> tuple[float, bool, float]:
        """Mean loss over the data ranks, whether any rank is to stop, mean activation norm: equal on every rank."""
        world, shape = self._world, self._world.shape
        agreed = torch.tensor([0.0, float(stop), 0.0], dtype=torch.float64)
        if world.last_stage:
            # All tensor ranks have computed the loss; under sequence parallelism each has its own tokens' norms.
            agreed[0] = loss if world.place.tensor == 0 else 0.0
            agreed[2] = activation_norm or 0.0
        world.silo.all_reduce_sum(agreed, "control")
        total, stops, norms = agreed.tolist()
        return total / shape.data, stops > 0, norms / (shape.data * shape.tensor)

    @torch.no_grad()
    def token_losses(self, embedding: SourceEmbedding | None, inputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each target: fp32 [b, s]; inputs and targets int64 [b, s] of local ids.

        Collective over the tensor ranks, and under ZeRO-3 over the data ranks. `embedding` is None only on the stages
        of a pipeline that hold none.
        """
        assert embedding is not None, "only a pipeline has ranks without embedding"
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
        """DeepSpeed's own configuration of a rank that has `elements` of the body."""
        training, log = config.training, config.logging
        bf16 = training.precision == "bf16"
        monitor = {
            "output_path": str(config.run_dir / "monitor"),
            "job_name": f"silo{self._world.place.silo}",
            "enabled": True,
        }
        return {
            "train_batch_size": training.global_batch_size,
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation_steps,
            "zero_optimization": _zero_config(config, elements, self._world.device.type == "cuda"),
            # DeepSpeed calls plain SGD untested; tests/engine tests it.
            "zero_allow_untested_optimizer": config.optimizer.optimizer == "sgd",
            # The optimizer of an offloaded body is torch's too: its state is saved and loaded like any other.
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": bf16, "immediate_grad_update": bf16, "check_grad_overflow": False},
            # Micro-batches' bf16 gradients are summed, and averaged over the data ranks, in fp32.
            **({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"} if bf16 else {}),
            # The joint norm is clipped by this engine; DeepSpeed only knows the body.
            "gradient_clipping": 0.0,
            "steps_per_print": None,
            # DeepSpeed's own timer would wait for the GPU before every forward and after every step; ours is outside.
            "timers": {"throughput": {"enabled": False}},
            **({"tensorboard": monitor} if log.tensorboard else {}),
            **({"csv_monitor": monitor} if log.csv else {}),
            **({"wandb": {"enabled": True, "project": config.run_dir.name}} if log.wandb else {}),
        }


def _zero_config(config: RunConfig, elements: int, on_gpu: bool) -> dict[str, Any]:
    parallel, stage = config.parallel, config.parallel.zero_stage
    # DeepSpeed wants an even number.
    bucket = min(elements + elements % 2, LARGEST_BUCKET)
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {"overlap_comm": on_gpu, "reduce_bucket_size": bucket}
    if stage in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if stage == 3:
        # A gathered parameter is let go after its use: at DeepSpeed's default distance, 1e9 elements, the forward of a
        # smaller body would leave all of it whole. About one layer is fetched ahead.
        layer = min(-(-elements // config.model.num_layers), LARGEST_BUCKET)
        zero |= {
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 2 * layer,
        }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return zero


def _copies(body: nn.Module) -> dict[str, Tensor]:
    """The body's fp32 parameters as they were built, by name."""
    return {name: parameter.detach().clone() for name, parameter in body.named_parameters()}


def _quieten() -> None:
    """Silence, by its message, what the libraries say of each other; of what a user can act on nothing."""
    # torch 2.13 renames collectives that DeepSpeed 0.19 still calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
