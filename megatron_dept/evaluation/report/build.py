"""Run directories in, `Report` out."""

from collections.abc import Sequence

from megatron_dept.common.errors import UserError
from megatron_dept.evaluation.report.curves import build_curves
from megatron_dept.evaluation.report.expenses import (
    communication_table,
    global_vocabulary,
    memory_table,
    paper_settings,
)
from megatron_dept.evaluation.report.runs import RunRecord
from megatron_dept.evaluation.report.schema import Communication, Report, Run
from megatron_dept.evaluation.report.tables import build_tables, findings

EQUAL_TOKENS = 0.01  # runs whose total tokens differ by more than this part are said to differ
PAPER_REDUCTION = "multilingual, 24 blocks (1.3B)"


def build_report(records: Sequence[RunRecord]) -> Report:
    """Every number of the page.

    Raises:
        UserError: there is no run to report on.
    """
    if not records:
        raise UserError("no run directories were given; pass them with --runs")
    vocabulary = global_vocabulary(records)
    sources = list(dict.fromkeys(source.name for record in records for source in record.base.sources))
    tables = build_tables(records)
    communication = communication_table(records, vocabulary)
    return Report(
        findings=findings(tables) + _step_findings(records) + _cost_findings(communication),
        notes=_notes(records, communication),
        runs=[_run(record) for record in records],
        trained_sources=sources,
        curves=build_curves(records, sources),
        tables=tables,
        memory=memory_table(records, vocabulary),
        communication=communication,
        paper=paper_settings(),
        figures={},
    )


def _run(record: RunRecord) -> Run:
    return Run(
        name=record.name,
        method=record.method,
        variant=record.base.dept.variant,
        phase=record.config.phase,
        protocol=None if not record.adapt else ("own" if record.protocol == "own" else "random"),
        base_run=record.base_name,
        seed=record.config.seed,
        sequential_steps=record.last_step,
        total_tokens=record.total_tokens,
        skipped_steps=sum(bool(line.get("skipped")) for line in record.steps),
        silos=record.config.parallel.silos,
        n_local=record.config.dept.n_local,
        evaluated=record.evaluation is not None,
    )


def _step_findings(records: Sequence[RunRecord]) -> list[str]:
    """Equal tokens are not equal time: steps one after another, the shortest DEPT run's against the first STD's."""
    finished = [record for record in records if not record.adapt and record.last_step and record.total_tokens]
    dept = min((r for r in finished if not r.baseline), key=lambda record: record.last_step, default=None)
    std = next((record for record in finished if record.base.dept.variant == "std"), None)
    if dept is None or std is None:
        return []
    return [
        f"{std.method} took {std.last_step:,} steps one after another for {std.total_tokens:,} tokens, {dept.method} "
        f"{dept.last_step:,} for {dept.total_tokens:,}."
    ]


def _cost_findings(communication: Sequence[Communication]) -> list[str]:
    dept = [entry for entry in communication if entry.reduction_measured and not entry.baseline]
    if not dept:
        return []
    best = max(dept, key=lambda entry: entry.reduction_measured or 0.0)
    per_token = (
        "" if best.reduction_measured_per_token is None else f" ({best.reduction_measured_per_token:,.1f}x a token)"
    )
    paper = next(entry for entry in paper_settings() if entry.setting == PAPER_REDUCTION and entry.method == "SPEC-OPT")
    return [
        f"{best.method} sent {best.reduction_measured:,.1f}x fewer bytes a sequential step than STD, as measured"
        f"{per_token}; by the formulas at the paper's 1.3B with 500 local steps SPEC-OPT sends "
        f"{paper.reduction_parameters:,.0f}x fewer parameters and {paper.reduction_bytes:,.0f}x fewer bytes."
    ]


def _notes(records: Sequence[RunRecord], communication: Sequence[Communication]) -> list[str]:
    notes = []
    for adapt in (False, True):
        group = [record for record in records if record.adapt is adapt]
        totals = {record.name: record.total_tokens for record in group}
        if totals and max(totals.values()) > (1 + EQUAL_TOKENS) * min(totals.values()):
            listed = ", ".join(f"{name} {tokens:,}" for name, tokens in totals.items())
            notes.append(f"Total tokens differ between {'adapt' if adapt else 'pre-training'} runs: {listed}.")
    seeds = sorted({record.config.seed for record in records})
    notes.append(
        f"One seed ({seeds[0]}): differences of a few percent may be chance."
        if len(seeds) == 1
        else f"Seeds: {', '.join(map(str, seeds))}."
    )
    unfinished = [r.name for r in records if r.last_step < r.config.total_steps]
    if unfinished:
        notes.append(f"Not finished when this report was made: {', '.join(unfinished)}.")
    for what, names in (
        ("no evaluation.json, so in the curves alone", [r.name for r in records if r.evaluation is None]),
        ("no ledger.json, so no bytes measured", [r.name for r in records if r.ledger is None and not r.adapt]),
    ):
        if names:
            notes.append(f"Runs with {what}: {', '.join(names)}.")
    described = {entry.run for entry in communication}
    missing = [r.name for r in records if not r.adapt and r.ledger is not None and r.name not in described]
    if missing:
        notes.append(f"No plan.json in these runs, so their costs are left out: {', '.join(missing)}.")
    skipped = {r.name: sum(bool(line.get("skipped")) for line in r.steps) for r in records}
    if any(skipped.values()):
        notes.append(
            "Steps skipped for a non-finite gradient: " + ", ".join(f"{n} {c}" for n, c in skipped.items() if c) + "."
        )
    return notes
