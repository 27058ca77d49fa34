"""The plan of a run, worked out before anything is allocated: what `--dry-run` prints.

Layout and rank map, parameters by part, memory of a rank by part, bytes of a round by kind for every variant that the
configured datasets allow. Figures of memory are of tensors (`planning.memory`); the Python process itself, and what
DeepSpeed allocates to communicate, are not counted.
"""

import itertools
from dataclasses import asdict
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from megatron_dept.common.errors import ConfigError, UserError
from megatron_dept.config.schema import RunConfig, Variant
from megatron_dept.dept.sampling import sample_sources
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.federation.named_plan import CanonicalOrder
from megatron_dept.models.build import body_shapes
from megatron_dept.models.flops import body_parameters, head_flops_per_token, layer_flops_per_token
from megatron_dept.models.pipeline import stage_layers
from megatron_dept.topology.layout import Layout, SiloShape, accumulation_steps
from megatron_dept.training.partitions import silo_parts
from megatron_dept.training.planning.cut import Cut
from megatron_dept.training.planning.memory import memory_of_rank
from megatron_dept.training.planning.steps import bytes_of_step
from megatron_dept.training.resume import changes_line, resume_point
from megatron_dept.training.save_schedule import waiting_rounds
from megatron_dept.training.sources import SourceSet
from megatron_dept.training.traffic_plan import TrafficPlan, itemised_body_bytes, silo_body_bytes


def build_plan(config: RunConfig, ranks: int, sources: SourceSet | None = None) -> dict[str, Any]:
    """The plan as plain values; raises the `UserError`s that the run itself would raise for its configuration.

    With `sources`, those of `config` already open, it is of the run's own variant alone; without, of every variant
    whose datasets are there, why it is not of the others, and which sources have joined or left the run in `run_dir`.
    """
    layout = Layout.cut(config.parallel, ranks)
    if config.federation.silos is not None:
        # Of the other launches nothing is known before they meet: they are planned like this one.
        layout = Layout(layout.shapes * config.federation.silos)
    training = config.training
    accumulation = [
        accumulation_steps(training.global_batch_size, training.micro_batch_size, shape.data) for shape in layout.shapes
    ]
    variants: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    for variant in get_args(Variant) if sources is None else (config.dept.variant,):
        try:
            variants[variant] = _variant(config, layout, variant, sources)
        except UserError as error:
            if variant == config.dept.variant:
                raise
            unavailable[variant] = str(error)
    chosen = variants[config.dept.variant]
    changed = None
    if sources is None and (checkpoint := resume_point(config, opened := SourceSet(config))) is not None:
        changed = changes_line(checkpoint, opened)
    return {
        "source_changes": changed,
        "layout": {
            "silos": layout.silos,
            "ranks": ranks,
            "shapes": [
                {**asdict(shape), "gradient_accumulation_steps": steps}
                for shape, steps in zip(layout.shapes, accumulation, strict=True)
            ],
        },
        "idle_silos": _idle_silos(config, layout),
        "rank_map": [asdict(layout.coordinate(rank)) for rank in range(ranks)],
        "stages": chosen["stages"],
        "body_parameters": body_parameters(config.model),
        "position_parameters": config.model.has_position_table * config.model.seq_length * config.model.hidden_size,
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
    for shape, silos in _grouped(layout["shapes"]):
        console.print(
            f"{silos} silos x pipe {shape['pipe']} x data {shape['data']} x tensor {shape['tensor']}, "
            f"ZeRO {shape['zero_stage']}, {config.training.precision}, "
            f"{shape['gradient_accumulation_steps']} micro-batches a step"
        )
    console.print(
        f"{ranks} ranks; {config.dept.rounds} rounds x {config.dept.n_local} inner steps = {plan['total_steps']} "
        f"sequential steps; {config.training.global_batch_size} sequences x {config.model.seq_length} tokens a silo "
        "and step"
    )
    if config.dept.outer.overlap:
        console.print(_overlap_line(config), markup=False)
    if plan["source_changes"] is not None:
        console.print(plan["source_changes"], markup=False)
    if plan["idle_silos"]:
        console.print(_idle_line(config, plan["idle_silos"], layout["silos"]), markup=False)
    ranks_table = Table("rank", "silo", "pipe", "data", "tensor", title="Rank map")
    for rank, place in enumerate(plan["rank_map"]):
        ranks_table.add_row(str(rank), *(str(place[axis]) for axis in ("silo", "pipe", "data", "tensor")))
    console.print(ranks_table)
    if any(len(stages) > 1 for stages in plan["stages"]):
        console.print(_stages_table(plan))
    console.print(f"body {plan['body_parameters']:,} parameters, positions {plan['position_parameters']:,}")
    console.print(_variants_table(plan))
    console.print(_memory_table(plan))
    for variant, reason in plan["unavailable"].items():
        console.print(f"{variant} is not planned: {reason}", markup=False)


def _idle_silos(config: RunConfig, layout: Layout) -> int:
    """How many silos, at least, have nothing to train in each round: its sources are fewer than silos."""
    if config.dept.synchronous:
        return 0
    sampled = config.dept.sources_per_round or len(config.sources)
    trained = sampled if config.homes is None else min(sampled, len(set(config.homes.values())))
    return max(0, layout.silos - trained)


def _overlap_line(config: RunConfig) -> str:
    dept = config.dept
    return (
        f"the body's exchange of a round may run on in the first {dept.outer.overlap} of the next one's {dept.n_local} "
        f"steps (dept.outer.overlap); {waiting_rounds(config)} of {dept.rounds} rounds wait for it: the last one, and "
        "those that end with a save or a validation"
    )


def _idle_line(config: RunConfig, idle: int, silos: int) -> str:
    remedy = f"set parallel.silos: {silos - idle}"
    if config.federation.silos is not None:
        remedy = f"set federation.silos: {silos - idle}"
    elif config.parallel.shapes is not None:
        remedy = f"remove {idle} of parallel.shapes"
    return f"{idle} of {silos} silos idle in every round; {remedy}"


def _variant(config: RunConfig, layout: Layout, variant: Variant, sources: SourceSet | None) -> dict[str, Any]:
    """One variant on the same ranks (std and act: as one silo); `UserError` where its datasets are not there."""
    parallel = config.parallel
    if VARIANTS[variant].synchronous and layout.silos > 1:
        if parallel.shapes is not None:
            raise ConfigError("parallel.shapes are silos of different shapes, and std and act train one; remove them")
        parallel = parallel.model_copy(update={"silos": 1})
        layout = Layout.cut(parallel, layout.world_size)
    same = config.model_copy(update={"dept": config.dept.model_copy(update={"variant": variant}), "parallel": parallel})
    missing = [
        source.name for source in same.sources if same.is_at_home(source) and getattr(source, same.data_field) is None
    ]
    if missing:
        raise ConfigError(f"sources: {', '.join(missing)} have no {same.data_field}, which variant {variant} trains on")
    sources = sources or SourceSet(same)
    sizes = {name: sources.cards[name].vocabulary_size for name in sources.vocabularies}
    largest = max(sizes.values())
    vocab_size = sources.vocab_size or largest
    sampled = sources.trained
    if not VARIANTS[variant].synchronous:
        sampled = sample_sources(config.seed, 0, sources.trained, config.dept.sources_per_round or len(sources.trained))
    parts = [part for shape in layout.shapes for part in silo_parts(same, shape, largest)]
    itemised: dict[str, int] = {}
    if VARIANTS[variant].averages_body:
        itemised = itemised_body_bytes(layout, parts, CanonicalOrder(body_shapes(config.model)), config.dept.outer.wire)
    silo, body_bytes = config.federation.silo, sum(itemised.values())
    if silo is not None:
        body_bytes //= layout.silos
        if itemised and layout.equal:
            own = parts[: layout.shapes[0].size]
            body_bytes = silo_body_bytes(own, layout.silos, silo, config.dept.outer.wire)
    traffic = TrafficPlan(same, layout, sources, body_bytes, silo)
    momentum = VARIANTS[variant].averages_body and config.dept.outer.momentum > 0
    turns = len(sources.slots(sampled, layout.silos))
    cuts = {shape: _cut(same, layout, shape, turns) for shape in layout.shapes}
    memory = max(
        (
            memory_of_rank(config.model, cut, variant, largest, vocab_size, stage, momentum)
            for cut in cuts.values()
            for stage in range(cut.pipe)
        ),
        key=lambda each: each.device,
    )
    inside = {"gradient": 0, "parameter": 0, "activation": 0}
    for slot in sources.slots(sampled, layout.silos):
        for shape in itertools.compress(layout.shapes, slot):
            for kind, sent in bytes_of_step(config.model, cuts[shape], largest).items():
                inside[kind] += sent * config.dept.n_local
    return {
        "vocabulary_sizes": sizes,
        "embedding_parameters_largest_source": largest * config.model.hidden_size,
        "first_round_sources": list(sampled),
        "bytes_first_round": traffic.round_bytes(sampled),
        "silo_bytes_first_round": inside,
        "body_bytes_itemised": itemised,
        "body_partition": {"elements": max(part.partition for part in parts)},
        "stages": [_stages(same, shape, largest) for shape in layout.shapes],
        "memory": {**asdict(memory), "device": memory.device},
    }


def _cut(config: RunConfig, layout: Layout, shape: SiloShape, turns: int) -> Cut:
    """A silo of `shape` that trains `turns` sources a round, as the planning formulas want it."""
    training, outer = config.training, config.dept.outer
    return Cut(
        silos=layout.silos,
        pipe=shape.pipe,
        data=shape.data,
        tensor=shape.tensor,
        zero_stage=shape.zero_stage,
        precision=training.precision,
        sequence_parallel=config.parallel.sequence_parallel and shape.tensor > 1,
        activation_checkpointing=training.activation_checkpointing,
        micro_batch=training.micro_batch_size,
        global_batch=training.global_batch_size,
        loss_chunk_tokens=training.loss_chunk_tokens,
        optimizer_moments=2 if config.optimizer.optimizer == "adamw" else 0,
        offload_optimizer=config.parallel.offload_optimizer,
        rows_on_disk=config.embedding.row_table == "disk",
        separate=config.federation.separate,
        wire=outer.wire,
        bucket_mb=outer.bucket_mb,
        overlap=outer.overlap,
        turns=turns,
        all_ranks=None if layout.equal else layout.world_size,
        all_embedding_ranks=None if layout.equal else len(layout.embedding_ranks()),
    )


def _stages(config: RunConfig, shape: SiloShape, vocabulary: int) -> list[dict[str, Any]]:
    """Each pipeline stage's layers, and its share of the operations, the head of the largest vocabulary included."""
    cuts = stage_layers(config.model, shape.pipe, vocabulary)
    layer, head = layer_flops_per_token(config.model), head_flops_per_token(config.model, vocabulary)
    loads = [len(layers) * layer + (head if layers is cuts[-1] else 0) for layers in cuts]
    return [
        {"first_layer": layers.start, "layers": len(layers), "share_of_operations": round(load / sum(loads), 4)}
        for layers, load in zip(cuts, loads, strict=True)
    ]


def _variants_table(plan: dict[str, Any]) -> Table:
    columns = (
        "variant",
        "rows, largest source",
        "model",
        "body",
        "between silos + inside silos"
        if _is_named(plan)
        else "formula + copies + padding of partitions + scales of int8",
        "embedding",
        "position",
        "gradients",
        "parameters",
        "activations",
    )
    table = Table(
        *columns, title="Bytes that all ranks send in the first round (last three: inside silos, of the largest source)"
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
            *(f"{inside:,}" for inside in entry["silo_bytes_first_round"].values()),
        )
    return table


def _stages_table(plan: dict[str, Any]) -> Table:
    table = Table("silo", "stage", "layers", "share of operations", title="Pipeline stages (the last has the head)")
    for silo, stages in enumerate(plan["stages"]):
        if stages == plan["stages"][0] and silo:
            continue
        for stage, entry in enumerate(stages):
            first, count = entry["first_layer"], entry["layers"]
            layers = f"{first} to {first + count - 1}" if count else "none"
            table.add_row(str(silo), str(stage), layers, f"{entry['share_of_operations']:.1%}")
    return table


def _is_named(plan: dict[str, Any]) -> bool:
    """Whether the body is exchanged by names: between silos that are cut differently."""
    return len(_grouped(plan["layout"]["shapes"])) > 1


def _grouped(shapes: list[dict[str, int]]) -> list[tuple[dict[str, int], int]]:
    """Shapes in order, each with how many silos in a row have it."""
    return [(shape, len(list(same))) for shape, same in itertools.groupby(shapes)]


def _memory_table(plan: dict[str, Any]) -> Table:
    entries = plan["variants"]
    table = Table("MB a rank", *entries, title="Memory of the fullest rank")
    for part in next(iter(entries.values()))["memory"]:
        names = {
            "device": "device in all",
            "host": "optimizer (host)",
            "row_table": "row table (host)",
            "row_deltas": "rows' deltas (host)",
            "row_files": "row table (disk)",
        }
        figures = (f"{entry['memory'][part] / 1e6:,.1f}" for entry in entries.values())
        table.add_row(names.get(part, part), *figures)
    return table
