"""One plan: a model, a variant and a cut on a cluster, as plain values; the JSON's schema is this file's to keep."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_dept.common.errors import ConfigError
from megatron_dept.config.schema import ModelConfig, Variant
from megatron_dept.dept.costs import (
    Sizes,
    communication_per_step,
    embedding_parameters,
    model_parameters,
    reduction,
    reduction_in_bytes,
)
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.models.flops import body_parameters
from megatron_dept.training.planning.cut import Cut, check_cut, layers_of_stages
from megatron_dept.training.planning.memory import Memory, memory_of_rank
from run_plan.cluster import Cluster
from run_plan.timing import bubble, exchange_time, hidden_time, step_time
from run_plan.traffic import bytes_of_round

FORMAT_VERSION = 3


@dataclass(frozen=True)
class Vocabularies:
    """Rows of a source's embedding by what the variant trains it on; of the largest source."""

    whole: int
    trimmed: int
    own: int

    def rows(self, variant: Variant) -> int:
        """Rows that a silo trains under `variant`."""
        return {"global": self.whole, "trimmed": self.trimmed, "own": self.own}[VARIANTS[variant].vocabulary]


def fill_silo(cut: Cut, cluster: Cluster, data: int | None) -> Cut:
    """`cut` with as many data ranks as told, else as a silo's devices leave; `ConfigError` where they are too few."""
    devices, fixed = cluster.gpus_per_silo, cut.pipe * cut.tensor
    if data is None and devices % fixed:
        raise ConfigError(
            f"{devices} devices a silo cannot be cut into pipe {cut.pipe} x tensor {cut.tensor}; "
            f"choose sizes whose product divides {devices}"
        )
    cut = replace(cut, data=data or devices // fixed)
    if cut.silo_size > devices:
        raise ConfigError(
            f"pipe {cut.pipe} x data {cut.data} x tensor {cut.tensor} are {cut.silo_size} ranks, a silo of "
            f"{cluster.name} has {devices} devices; choose smaller sizes, or raise nodes_per_silo"
        )
    return cut


def build_plan(
    name: str,
    model: ModelConfig,
    cluster: Cluster,
    cut: Cut,
    variant: Variant,
    vocabularies: Vocabularies,
    n_local: int,
    momentum: bool = False,
) -> dict[str, Any]:
    """Memory, bytes and times of one run; raises `ConfigError` where it cannot be cut so.

    STD and ACT train one stream on all silos together: the same tokens a step as all silos of the other variants.
    """
    check_cut(model, cut)
    if cut.overlap > n_local:
        raise ConfigError(
            f"an overlap of {cut.overlap} steps is longer than a round of {n_local}; use at most {n_local}"
        )
    rows = vocabularies.rows(variant)
    if rows < cut.tensor:
        raise ConfigError(f"{rows} rows of vocabulary leave some of {cut.tensor} tensor ranks without one; use fewer")
    # ZeRO cuts over all data ranks of the run, which for a synchronous one are those of all silos.
    held = cut
    if VARIANTS[variant].synchronous:
        held = replace(cut, silos=1, data=cut.data * cut.silos, global_batch=cut.global_batch * cut.silos)
    memories = [
        memory_of_rank(model, held, variant, rows, vocabularies.whole, stage, momentum) for stage in range(cut.pipe)
    ]
    heaviest = max(range(cut.pipe), key=lambda stage: memories[stage].device)
    step = step_time(model, cut, cluster, variant, rows)
    exchange = exchange_time(model, cut, cluster, variant, rows)
    hidden = hidden_time(model, cut, cluster, variant, rows, step.total)
    # The paper's sizes: STD, which the others are compared with, has the whole vocabulary.
    positions = model.seq_length * model.has_position_table
    sizes = Sizes(body_parameters(model), vocabularies.whole, rows, positions, model.hidden_size, n_local)
    inner = n_local * step.total
    total = inner + exchange - hidden
    return {
        "model": name,
        "variant": variant,
        "rows": rows,
        "n_local": n_local,
        "cut": {**asdict(cut), "micro_batches": cut.micro_batches, "ranks": cut.silos * cut.silo_size},
        "body_parameters": sizes.body,
        "layers_of_stages": layers_of_stages(model, cut, rows),
        "bubble": bubble(cut.pipe, cut.micro_batches),
        "memory": {**_memory(memories[heaviest]), "stage": heaviest},
        "memory_of_stages": [_memory(memory) for memory in memories],
        "fits": memories[heaviest].device <= cluster.memory_bytes(),
        "bytes_of_round": [asdict(flow) for flow in bytes_of_round(model, cut, cluster, variant, rows, n_local)],
        "step_seconds": {**asdict(step), "total": step.total},
        "round_seconds": {"inner_steps": inner, "exchange": exchange, "hidden": hidden, "total": total},
        "busy": inner / total * (step.arithmetic / step.total),
        "tokens_per_second": n_local * cut.silos * cut.global_batch * model.seq_length / total,
        "paper": _paper(variant, sizes),
    }


def _memory(memory: Memory) -> dict[str, int]:
    return {**asdict(memory), "device": memory.device}


def _paper(variant: Variant, sizes: Sizes) -> Mapping[str, float]:
    """The paper's counts of parameters (Tables 1 and 9)."""
    return {
        "embedding_parameters": embedding_parameters(variant, sizes),
        "model_parameters": model_parameters(variant, sizes),
        "communication_per_step": communication_per_step(variant, sizes),
        "reduction": reduction(variant, sizes),
        "reduction_in_bytes": reduction_in_bytes(variant, sizes),
    }
