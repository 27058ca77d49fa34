"""What a method costs: embedding in memory, bytes moved as the ledger counted them, and the formulas beside both.

Letters: `V` global vocabulary, `V_k` a source's, `d` hidden size, `M` = body + (V + L) d, `n` ranks that exchange.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_dept.config.presets import PRESETS
from megatron_dept.config.schema import ModelConfig
from megatron_dept.dept import costs
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.evaluation.report.runs import RunRecord
from megatron_dept.evaluation.report.schema import Communication, Memory, PaperSetting
from megatron_dept.models.flops import body_parameters

TRAINING_KINDS = ("gradient", "parameter", "body", "embedding", "position")
"""What training itself sends; control messages and evaluation are shown and left out of the comparison."""

FP32_BYTES = 4
BF16_BYTES = 2


def vocabulary_sizes(record: RunRecord) -> dict[str, int] | None:
    """{source: ids its embedding has} in this run, as its plan has them; None without a plan."""
    if record.plan is None:
        return None
    return dict(record.plan["variants"][record.base.dept.variant]["vocabulary_sizes"])


def global_vocabulary(records: Sequence[RunRecord]) -> int | None:
    """V of the comparison: rows of the embedding of any variant that uses the global tokenizer whole."""
    for record in records:
        for variant, entry in (record.plan or {"variants": {}})["variants"].items():
            if VARIANTS[variant].vocabulary == "global":
                return int(max(entry["vocabulary_sizes"].values()))
    return None


def run_sizes(record: RunRecord, vocabulary: int) -> costs.Sizes | None:
    """What the formulas take of a run; None where its vocabularies are not known."""
    found = vocabulary_sizes(record)
    if found is None:
        return None
    model = record.base.model
    return costs.Sizes(
        body=body_parameters(model),
        vocabulary=vocabulary,
        source_vocabulary=float(np.mean(list(found.values()))),
        positions=model.seq_length if model.has_position_table else 0,
        hidden=model.hidden_size,
        n_local=record.base.dept.n_local,
    )


def memory_table(records: Sequence[RunRecord], vocabulary: int | None) -> list[Memory]:
    """Embedding in memory, of every pre-training run that has a plan."""
    rows = []
    for record in records:
        found = None if record.adapt else vocabulary_sizes(record)
        if found is None:
            continue
        hidden, ids = record.base.model.hidden_size, list(found.values())
        mean = float(np.mean(ids)) * hidden
        positions = record.base.model.seq_length * hidden if record.base.model.has_position_table else 0
        rows.append(
            Memory(
                method=record.method,
                run=record.name,
                vocabulary_mean=float(np.mean(ids)),
                vocabulary_largest=max(ids),
                parameters_mean=mean,
                parameters_largest=max(ids) * hidden,
                megabytes_mean=mean * FP32_BYTES / 1e6,
                model_parameters_mean=body_parameters(record.base.model) + positions + mean,
                reduction=None if vocabulary is None else vocabulary * hidden / mean,
            )
        )
    return rows


def communication_table(records: Sequence[RunRecord], vocabulary: int | None) -> list[Communication]:
    """Bytes measured beside the formula, of every pre-training run that has a ledger."""
    pretrain = [record for record in records if not record.adapt and record.ledger is not None and record.last_step]
    std = [record for record in pretrain if record.base.dept.variant == "std"]
    reference = max(std, key=lambda record: record.base.dept.std_tau == 1.0, default=None)
    rows = []
    for record in pretrain:
        sizes = None if vocabulary is None else run_sizes(record, vocabulary)
        if sizes is not None:
            rows.append(_communication(record, sizes, reference))
    return rows


def _communication(record: RunRecord, sizes: costs.Sizes, reference: RunRecord | None) -> Communication:
    variant, config = record.base.dept.variant, record.base
    gradient_bytes = BF16_BYTES if config.training.precision == "bf16" else FP32_BYTES
    # STD's formula has no N_local; the others' share of a payload is that of their own.
    ranks = _exchanging_ranks(record)
    payload = costs.communication_bytes_per_step(variant, sizes, gradient_bytes, FP32_BYTES)
    sent = training_bytes(record)
    steps, tokens = record.last_step, record.total_tokens
    predicted = _predicted(record)
    per_step, per_token = sent / steps, sent / max(1, tokens)
    against = None if reference is None else training_bytes(reference)
    return Communication(
        method=record.method,
        run=record.name,
        baseline=record.baseline,
        steps=steps,
        bytes_by_kind=bytes_by_kind(record),
        training_bytes_per_step=per_step,
        training_bytes_per_token=per_token,
        predicted_bytes_per_step=None if predicted is None else predicted / steps,
        formula_parameters_per_step=costs.communication_per_step(variant, sizes),
        formula_bytes_per_step=None if ranks is None else payload * 2 * (ranks - 1),
        exchanging_ranks=ranks,
        reduction_measured=_ratio(against, None if reference is None else reference.last_step, sent, steps),
        reduction_measured_per_token=_ratio(
            against, None if reference is None else reference.total_tokens, sent, tokens
        ),
        reduction_formula_parameters=None if reference is None else costs.reduction(variant, sizes),
        reduction_formula_bytes=None
        if reference is None
        else costs.reduction_in_bytes(variant, sizes, gradient_bytes, FP32_BYTES),
    )


def bytes_by_kind(record: RunRecord) -> dict[str, int]:
    """`scope/kind`: bytes sent in the whole run, summed over ranks; only what was sent."""
    assert record.ledger is not None, "chosen by the caller"
    totals: dict[str, int] = defaultdict(int)
    for entry in record.ledger["per_round"]:
        for group, count in entry["groups"].items():
            totals[group] += count
    return {group: count for group, count in sorted(totals.items()) if count}


def training_bytes(record: RunRecord) -> int:
    """Bytes that training itself sent in the whole run."""
    return sum(count for group, count in bytes_by_kind(record).items() if group.split("/")[-1] in TRAINING_KINDS)


def _predicted(record: RunRecord) -> int | None:
    """What was computed beforehand for the whole run; None for a run without an outer exchange."""
    assert record.ledger is not None, "chosen by the caller"
    entries = [entry["predicted"] for entry in record.ledger["per_round"]]
    return sum(sum(entry.values()) for entry in entries) if entries and all(entries) else None


def _exchanging_ranks(record: RunRecord) -> int | None:
    """Silos; for a synchronous run its data-parallel ranks, which its plan tells."""
    if record.plan is None:
        return None
    layout = record.plan["layout"]
    return int(layout["shapes"][0]["data"] if record.baseline else layout["silos"])


def _ratio(their_bytes: int | None, their_units: int | None, bytes_sent: int, units: int) -> float | None:
    """Bytes a unit of the reference over bytes a unit of this run; None where either is zero or unknown."""
    if not their_bytes or not their_units or not bytes_sent or not units:
        return None
    return (their_bytes / their_units) / (bytes_sent / units)


def paper_settings() -> list[PaperSetting]:
    """The formulas at the paper's sizes (arXiv 2410.05021, Table 9), computed from our presets' bodies."""
    settings = (
        ("multilingual, 12 blocks (125M)", "dept-125m", 250_112, 216_135.0, 50_257),
        ("Pile, 24 blocks (350M)", "dept-350m", 50_257, 45_554.0, 50_257),
        ("multilingual, 24 blocks (1.3B)", "dept-1.3b", 250_112, 216_135.0, 50_257),
    )
    rows = []
    for setting, preset, vocabulary, trimmed, own in settings:
        model = ModelConfig.model_validate(PRESETS[preset])
        sizes = costs.Sizes(body_parameters(model), vocabulary, trimmed, model.seq_length, model.hidden_size, 500)
        for variant, label in (
            ("std", "STD"), ("glob", "GLOB"), ("trim", "TRIM"), ("spec", "SPEC"), ("spec_opt", "SPEC-OPT")
        ):  # fmt: skip
            of_variant = replace(sizes, source_vocabulary=float(own)) if variant == "spec_opt" else sizes
            rows.append(
                PaperSetting(
                    setting=setting,
                    method=label,
                    embedding_parameters=costs.embedding_parameters(variant, of_variant),
                    model_parameters=costs.model_parameters(variant, of_variant),
                    parameters_per_step=costs.communication_per_step(variant, of_variant),
                    reduction_parameters=costs.reduction(variant, of_variant),
                    reduction_bytes=costs.reduction_in_bytes(variant, of_variant),
                )
            )
    return rows
