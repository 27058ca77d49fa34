"""The plan of a run, worked out before anything is allocated: what `--dry-run` prints.

Layout and rank map, parameters by part, memory of a rank by part, bytes of a round by kind for every variant that the
configured datasets allow. Figures of memory are what is allocated for weights, optimizers and exchange; activations are
an upper estimate, and the Python process itself is not counted.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from megatron_dept.common.errors import ConfigError, UserError
from megatron_dept.config.schema import ModelConfig, RunConfig, Variant
from megatron_dept.dept.sampling import sample_sources
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.federation.body_exchange import share_size
from megatron_dept.federation.row_table import block_size
from megatron_dept.models.build import body_shapes
from megatron_dept.models.flops import body_parameters
from megatron_dept.topology.layout import Layout, accumulation_steps
from megatron_dept.training.sources import SourceSet
from megatron_dept.training.traffic_plan import FP32_BYTES, TrafficPlan

ALIGNMENT = 2
"""ZeRO 1 and 2 pad the flat body to this many elements a data rank (DeepSpeed's nccl_start_alignment_factor)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part."""

    body_weights: int
    body_gradients: int
    body_optimizer: int
    outer_step: int
    embedding: int
    row_tables: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def partition_sizes(model: ModelConfig, zero_stage: int, data: int) -> list[int]:
    """Elements of each data rank's fp32 partition of the body, padding included."""
    if zero_stage == 3:
        each = sum(-(-math.prod(shape) // data) for shape in body_shapes(model).values())
    else:
        elements, step = body_parameters(model), data * (ALIGNMENT if zero_stage else 1)
        each = -(-elements // step) * step // data
    return [each] * data


def memory_of_rank(config: RunConfig, layout: Layout, variant: Variant, rows: int, vocab_size: int) -> Memory:
    """Memory of a rank that trains a source of `rows` embedding rows; `vocab_size`: rows of the global table."""
    model, stage, rule = config.model, config.parallel.zero_stage, VARIANTS[variant]
    elements, part = body_parameters(model), partition_sizes(model, stage, layout.data)[0]
    low = 2 if config.training.precision == "bf16" else FP32_BYTES
    moments = 2 if config.optimizer.optimizer == "adamw" else 0
    masters = 0 if stage == 0 else part * FP32_BYTES
    state = moments * FP32_BYTES * (elements if stage == 0 else part)
    silos = layout.silos
    momentum = rule.averages_body and config.dept.outer.momentum > 0
    outer = 0
    if rule.averages_body:
        # The round's start, the summed delta, and the momentum of this silo's share.
        outer = FP32_BYTES * (part + silos * share_size(part, silos) + (share_size(part, silos) if momentum else 0))
    positions = model.seq_length if model.has_position_table else 0
    table = (rows + positions) * model.hidden_size * FP32_BYTES
    shared = rule.token_rows == "shared"
    owned = block_size(vocab_size, silos * layout.data) + block_size(max(positions, 1), silos * layout.data)
    tokens = config.training.micro_batch_size * model.seq_length
    layer_values = 34 * model.hidden_size + 2 * model.ffn_size
    kept = tokens * model.hidden_size * model.num_layers if config.training.activation_checkpointing else 0
    layers = 1 if config.training.activation_checkpointing else model.num_layers
    logits = min(config.training.loss_chunk_tokens, tokens) * rows * FP32_BYTES
    return Memory(
        body_weights=low * (part if stage == 3 else elements) + masters,
        body_gradients=low * (part if stage >= 2 else elements),
        body_optimizer=state,
        outer_step=outer,
        embedding=table * (2 + moments + (1 if shared else 0)),
        row_tables=owned * model.hidden_size * FP32_BYTES * (3 if momentum else 2) if shared else 0,
        activations=low * (tokens * layer_values * layers + kept) + logits,
    )


def build_plan(config: RunConfig, ranks: int, sources: SourceSet | None = None) -> dict[str, Any]:
    """The plan as plain values; raises the `UserError`s that the run itself would raise for its configuration.

    With `sources`, those of `config` already open, it is of the run's own variant alone; without, of every variant
    whose datasets are there, and why it is not of the others.
    """
    layout = Layout.cut(config.parallel, ranks)
    accumulation = accumulation_steps(config.training.global_batch_size, config.training.micro_batch_size, layout.data)
    partitions = partition_sizes(config.model, config.parallel.zero_stage, layout.data)
    variants: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    for variant in get_args(Variant) if sources is None else (config.dept.variant,):
        try:
            variants[variant] = _variant(config, layout, variant, partitions, sources)
        except UserError as error:
            if variant == config.dept.variant:
                raise
            unavailable[variant] = str(error)
    return {
        "layout": {**asdict(layout), "ranks": ranks, "gradient_accumulation_steps": accumulation},
        "rank_map": [asdict(layout.coordinate(rank)) for rank in range(ranks)],
        "body_parameters": body_parameters(config.model),
        "position_parameters": config.model.has_position_table * config.model.seq_length * config.model.hidden_size,
        "body_partition": {"elements": partitions[0], "padding": sum(partitions) - body_parameters(config.model)},
        "total_steps": config.total_steps,
        "variant": config.dept.variant,
        "variants": variants,
        "unavailable": unavailable,
    }


def print_plan(config: RunConfig, ranks: int) -> None:
    """Print the plan of `config` on `ranks` ranks."""
    plan = build_plan(config, ranks)
    console = Console(width=120, soft_wrap=False)
    layout = plan["layout"]
    console.print(
        f"{ranks} ranks = {layout['silos']} silos x pipe {layout['pipe']} x data {layout['data']} x tensor "
        f"{layout['tensor']}, ZeRO {config.parallel.zero_stage}, {config.training.precision}, "
        f"{layout['gradient_accumulation_steps']} micro-batches a step"
    )
    console.print(
        f"{config.dept.rounds} rounds x {config.dept.n_local} inner steps = {plan['total_steps']} sequential steps; "
        f"{config.training.global_batch_size} sequences x {config.model.seq_length} tokens a silo and step"
    )
    ranks_table = Table("rank", "silo", "pipe", "data", "tensor", title="Rank map")
    for rank, place in enumerate(plan["rank_map"]):
        ranks_table.add_row(str(rank), *(str(place[axis]) for axis in ("silo", "pipe", "data", "tensor")))
    console.print(ranks_table)
    padding = plan["body_partition"]["padding"]
    console.print(
        f"body {plan['body_parameters']:,} parameters, positions {plan['position_parameters']:,}; "
        f"a rank's partition of the body {plan['body_partition']['elements']:,} "
        f"(padding of all: {padding:,})"
    )
    console.print(_variants_table(plan))
    console.print(_memory_table(plan))
    for variant, reason in plan["unavailable"].items():
        console.print(f"{variant} is not planned: {reason}", markup=False)


def _variant(
    config: RunConfig, layout: Layout, variant: Variant, partitions: list[int], sources: SourceSet | None
) -> dict[str, Any]:
    """One variant on the same ranks (std and act: as one silo); `UserError` where its datasets are not there."""
    parallel = config.parallel
    if VARIANTS[variant].synchronous:
        parallel = parallel.model_copy(update={"silos": 1})
        layout = Layout.cut(parallel, layout.world_size)
        partitions = partition_sizes(config.model, parallel.zero_stage, layout.data)
    same = config.model_copy(update={"dept": config.dept.model_copy(update={"variant": variant}), "parallel": parallel})
    missing = [source.name for source in same.sources if getattr(source, same.data_field) is None]
    if missing:
        raise ConfigError(f"sources: {', '.join(missing)} have no {same.data_field}, which variant {variant} trains on")
    sources = sources or SourceSet(same)
    sizes = {name: len(vocabulary) for name, vocabulary in sources.vocabularies.items()}
    largest = max(sizes.values())
    vocab_size = sources.vocab_size or largest
    sampled = sources.trained
    if not VARIANTS[variant].synchronous:
        sampled = sample_sources(config.seed, 0, sources.trained, config.dept.sources_per_round or len(sources.trained))
    traffic = TrafficPlan(same, layout, sources, partitions)
    memory = memory_of_rank(same, layout, variant, largest, vocab_size)
    body = body_parameters(config.model)
    rows = largest + (config.model.seq_length if config.model.has_position_table else 0)
    return {
        "vocabulary_sizes": sizes,
        "embedding_parameters_largest_source": largest * config.model.hidden_size,
        "first_round_sources": list(sampled),
        "bytes_first_round": traffic.round_bytes(sampled),
        "gradient_bytes_first_round": _gradient_bytes(
            same, layout, body, rows * config.model.hidden_size, len(sampled)
        ),
        "body_bytes_itemised": traffic.itemised_body_bytes(body) if VARIANTS[variant].averages_body else {},
        "memory": {**asdict(memory), "total": memory.total},
    }


def _gradient_bytes(config: RunConfig, layout: Layout, body: int, embedding: int, sources: int) -> int:
    """Leading term of what data ranks reduce within silos in a round: 2 (D - 1) / D of every gradient, every step.

    The body's gradient travels in the compute dtype, the embedding's in fp32.
    """
    width = 2 if config.training.precision == "bf16" else FP32_BYTES
    return 2 * (layout.data - 1) * (body * width + embedding * FP32_BYTES) * config.dept.n_local * sources


def _variants_table(plan: dict[str, Any]) -> Table:
    columns = (
        "variant",
        "rows, largest source",
        "parameters",
        "body",
        "formula + padding of partitions + of shares",
        "embedding",
        "position",
        "gradients",
    )
    table = Table(
        *columns, title="Bytes that all ranks send in the first round (gradients: within silos, leading term)"
    )
    for variant, entry in plan["variants"].items():
        sent = entry["bytes_first_round"]
        marked = f"[bold]{variant}[/bold]" if variant == plan["variant"] else variant
        table.add_row(
            marked,
            f"{max(entry['vocabulary_sizes'].values()):,}",
            f"{plan['body_parameters'] + entry['embedding_parameters_largest_source']:,}",
            f"{sent['body']:,}",
            " + ".join(f"{item:,}" for item in entry["body_bytes_itemised"].values()),
            f"{sent['embedding']:,}",
            f"{sent['position']:,}",
            f"{entry['gradient_bytes_first_round']:,}",
        )
    return table


def _memory_table(plan: dict[str, Any]) -> Table:
    parts = list(next(iter(plan["variants"].values()))["memory"])
    table = Table("MB a rank", *(part.replace("_", " ") for part in parts), title="Memory")
    for variant, entry in plan["variants"].items():
        table.add_row(variant, *(f"{entry['memory'][part] / 1e6:,.1f}" for part in parts))
    return table
