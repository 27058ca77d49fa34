"""How long a step and a round take: arithmetic at the cluster's achieved rate, plus traffic over its links.

What is left out: start-up of a transfer (latency), the optimizer's own time, loading of data, evaluation, checkpoints.
"""

from dataclasses import asdict, dataclass

from megatron_dept.config.schema import ModelConfig, Variant
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.training.planning.cut import Cut, flops_of_stages
from megatron_dept.training.planning.steps import stage_traffic
from run_plan.cluster import Cluster
from run_plan.traffic import exchange_bytes, leaving_share, synchronous_bytes


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part. `bubble`: stages waiting for one another, arithmetic and tensor traffic alike."""

    arithmetic: float
    tensor: float
    bubble: float
    pipe: float
    data: float
    between_silos: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def bubble(pipe: int, micro_batches: int) -> float:
    """The share of a pipeline's time in which a stage waits: (P - 1) / (m + P - 1) of 1F1B with equal stages."""
    return (pipe - 1) / (micro_batches + pipe - 1)


def step_time(model: ModelConfig, cut: Cut, cluster: Cluster, variant: Variant, rows: int) -> StepTime:
    """One inner step of one silo; STD and ACT: of all silos together, gradients between them not hidden.

    The slowest stage sets the pace: m + P - 1 turns of one micro-batch there, forward and backward. Tensor and pipeline
    traffic waits for arithmetic and arithmetic for it; gradients are hidden as far as the cluster's gradient_overlap.
    """
    m, turns = cut.micro_batches, cut.micro_batches + cut.pipe - 1
    tokens = cut.micro_batch * model.seq_length
    stages = [stage_traffic(model, cut, rows, stage) for stage in range(cut.pipe)]
    operations = [flops * tokens / cut.tensor for flops in flops_of_stages(model, cut, rows)]
    arithmetic = [each / cluster.flops(cut.precision) for each in operations]
    tensor = [_seconds(cut, cluster, stage.tensor / m, 1, cut.tensor) for stage in stages]
    slowest = max(range(cut.pipe), key=lambda stage: arithmetic[stage] + tensor[stage])
    stride = cut.data * cut.tensor
    a_turn = _seconds(cut, cluster, max(stage.pipe for stage in stages) / m, stride, cut.pipe, closed=False)
    data = max(_seconds(cut, cluster, stage.gradient + stage.parameter, cut.tensor, cut.data) for stage in stages)
    ends = _seconds(cut, cluster, stages[0].ends, stride * max(1, cut.pipe - 1), 2, closed=False)
    between = 0.0
    if VARIANTS[variant].synchronous and cut.silos > 1:
        between = _seconds_between(cut, cluster, sum(synchronous_bytes(model, cut, rows).values()))
    return StepTime(
        arithmetic=m * arithmetic[slowest],
        tensor=m * tensor[slowest],
        bubble=(turns - m) * (arithmetic[slowest] + tensor[slowest]),
        pipe=turns * a_turn,
        data=data * (1 - cluster.gradient_overlap) + ends,
        between_silos=between,
    )


def exchange_time(model: ModelConfig, cut: Cut, cluster: Cluster, variant: Variant, rows: int) -> float:
    """Seconds of the outer exchange between silos, shared rows included; each silo sends as much as every other."""
    if VARIANTS[variant].synchronous:
        return 0.0
    return _seconds_between(cut, cluster, sum(exchange_bytes(model, cut, variant, rows).values()) / cut.silos)


def hidden_time(
    model: ModelConfig, cut: Cut, cluster: Cluster, variant: Variant, rows: int, step_seconds: float
) -> float:
    """Of `exchange_time`, what the next round's first `cut.overlap` steps hide: of the body alone, rows are waited for.

    Expected where steps and transfers do not slow each other down, and where the round ends with no save or validation.
    """
    if VARIANTS[variant].synchronous:
        return 0.0
    body = _seconds_between(cut, cluster, exchange_bytes(model, cut, variant, rows)["body"] / cut.silos)
    return min(body, cut.overlap * step_seconds)


def _seconds_between(cut: Cut, cluster: Cluster, silo_bytes: float) -> float:
    """A silo's uplink is one; InfiniBand between silos is each device's own."""
    if cluster.between_silos == "WAN":
        return silo_bytes / (cluster.rank_bytes_per_second("WAN") * cluster.gpus_per_silo)
    return silo_bytes / cut.silo_size / cluster.rank_bytes_per_second("InfiniBand")


def _seconds(cut: Cut, cluster: Cluster, sent: float, stride: int, count: int, closed: bool = True) -> float:
    """Seconds of a rank's `sent` bytes over the hops of its group: two links work at once, the slower is waited for."""
    if not sent:
        return 0.0
    leaving = leaving_share(cut, cluster.gpus_per_node, stride, count, closed)
    inside = (1 - leaving) * sent / cluster.rank_bytes_per_second(cluster.node_link)
    return max(inside, leaving * sent / cluster.rank_bytes_per_second("InfiniBand") if leaving else 0.0)
