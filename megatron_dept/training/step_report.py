"""One line a step: loss, rate, MFU, norms; on the console, in the metrics file and in DeepSpeed's monitors."""

import math

from megatron_dept.common.segments import primary_square
from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.embedding_owner import EmbeddingOwner
from megatron_dept.engine.silo_engine import SiloEngine, StepResult
from megatron_dept.engine.world import World
from megatron_dept.models.flops import flops_per_token
from megatron_dept.training.hardware import peak_flops
from megatron_dept.training.metrics import Metrics, Pace


class StepReporter:
    """Reports inner steps of this silo. `pace` times them."""

    def __init__(self, config: RunConfig, world: World, engine: SiloEngine, metrics: Metrics, pace: Pace) -> None:
        self._config = config
        self._world = world
        self._engine = engine
        self._metrics = metrics
        self._pace = pace
        self._batch_tokens = config.training.global_batch_size * config.model.seq_length
        self._peak = peak_flops(world.device, config.logging.peak_tflops) * world.shape.size

    def start_phase(self) -> None:
        """A local phase begins: what came before is not a step's time."""
        self._pace.start()

    def wants_norms(self, step: int) -> bool:
        """Whether activation and parameter norms are due at sequential step `step`."""
        return step % self._config.logging.norm_interval_steps == 0

    def report(
        self,
        source: str,
        owner: EmbeddingOwner | None,
        vocabulary: int,
        round: int,
        step: int,
        source_steps: int,
        learning_rate: float,
        result: StepResult,
    ) -> None:
        """Report sequential step `step` (0-based) of `round`, the `source_steps`-th of its source."""
        seconds = self._pace.step()
        rate = self._batch_tokens / seconds
        mfu = flops_per_token(self._config.model, vocabulary) * rate / self._peak
        values = {
            "step": step,
            "round": round,
            "source": source,
            "tokens": source_steps * self._batch_tokens,
            "loss": result.loss,
            "learning_rate": learning_rate,
            "grad_norm": result.gradient_norm if math.isfinite(result.gradient_norm) else None,
            "tokens_per_second": round_to(rate),
            "mfu": round_to(mfu),
            "skipped": result.skipped,
        }
        if self.wants_norms(step):
            shards = self._engine.shards
            values |= {
                "activation_norm": result.activation_norm,
                "parameter_norm": self._world.root_of_sum(primary_square(shards.read(), shards.segments)),
                "embedding_norm": self._world.root_of_sum(owner.token_square() if owner is not None else 0.0),
            }
        self._metrics.write("step", **values)
        self._engine.write_monitor(
            [(f"{source}/{key}", float(values[key]), step) for key in ("loss", "learning_rate", "tokens_per_second")]  # type: ignore[arg-type]
        )
        self._pace.start()
        if (step + 1) % self._config.logging.interval_steps:
            return
        note = " SKIPPED (gradient not finite)" if result.skipped else ""
        self._metrics.say(
            f"round {round + 1}/{self._config.dept.rounds} step {step + 1}/{self._config.total_steps} {source} "
            f"loss {result.loss:.4f} lr {learning_rate:.2e} grad {result.gradient_norm:.2f} {rate:,.0f} tok/s "
            f"MFU {mfu:.0%} left {self._pace.time_left}{note}"
        )


def round_to(value: float, digits: int = 4) -> float:
    """To so many significant digits: metrics files are read by people too."""
    return float(f"{value:.{digits}g}")
