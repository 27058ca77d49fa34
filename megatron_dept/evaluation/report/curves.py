"""Lines of the figures, from metrics lines: over the tokens trained by the whole federation."""

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_dept.evaluation.report.runs import RunRecord, finite
from megatron_dept.evaluation.report.schema import Curve, Curves

MOST_POINTS = 60  # of a line of training loss or norms: more than a figure can show


def build_curves(records: Sequence[RunRecord], sources: Sequence[str]) -> Curves:
    """All lines; a run that logged no such number has no line."""
    pretrain = [record for record in records if not record.adapt]
    adapt = [record for record in records if record.protocol == "random"]
    return Curves(
        heldout_bits_per_byte=[curve for r in pretrain for curve in validation_curves(r, sources)],
        training_loss=[curve for r in pretrain for curve in training_curves(r, sources)],
        adapt_bits_per_byte=[curve for r in adapt for curve in validation_curves(r, sources)],
        activation_norm=[curve for r in pretrain for curve in norm_curve(r, "activation_norm")],
        parameter_norm=[curve for r in pretrain for curve in norm_curve(r, "parameter_norm")],
    )


def validation_curves(record: RunRecord, sources: Sequence[str]) -> list[Curve]:
    """Held-out bits per byte by source, and their mean at the moments when every source was scored."""
    curves = []
    for source in sources:
        lines = [line for line in record.validations if line["source"] == source and finite(line["bits_per_byte"])]
        if lines:
            tokens = [line["step"] * record.tokens_per_step for line in lines]
            curves.append(_curve(record, source, tokens, [line["bits_per_byte"] for line in lines]))
    if len(curves) == len(sources) > 1:
        # Under SPEC a source has no embedding to be scored with until it was sampled once.
        points = [dict(zip(curve.tokens, curve.values, strict=True)) for curve in curves]
        shared = sorted(set.intersection(*(set(of_source) for of_source in points)))
        if shared:
            means = [float(np.mean([of_source[tokens] for of_source in points])) for tokens in shared]
            curves.append(_curve(record, None, shared, means))
    return curves


def training_curves(record: RunRecord, sources: Sequence[str]) -> list[Curve]:
    """Training loss by source and their mean; of a synchronous run, which blends the sources, one line."""
    whole = _smoothed(record, None, "loss", record.steps)
    if record.baseline:
        return whole
    of_sources = [
        curve
        for source in sources
        for curve in _smoothed(record, source, "loss", [line for line in record.steps if line["source"] == source])
    ]
    return of_sources + whole


def norm_curve(record: RunRecord, field: str) -> list[Curve]:
    """A norm's mean over the sources that logged it at a step."""
    return _smoothed(record, None, field, record.steps)


def _smoothed(record: RunRecord, source: str | None, field: str, lines: Iterable[dict]) -> list[Curve]:
    """Mean of a field over stretches of steps, at most MOST_POINTS of them; values that are not finite are left out."""
    by_step: dict[int, list[float]] = {}
    for line in lines:
        if finite(line.get(field)) and not line.get("skipped", False):
            by_step.setdefault(int(line["step"]), []).append(float(line[field]))
    if not by_step:
        return []
    steps = np.array(sorted(by_step))
    values = np.array([np.mean(by_step[step]) for step in steps])
    stretches = np.array_split(np.arange(len(steps)), min(MOST_POINTS, len(steps)))
    # Steps are counted from 0: after step i, i + 1 steps' tokens have been trained.
    tokens = [float(steps[part].mean() + 1) * record.tokens_per_step for part in stretches]
    return [_curve(record, source, tokens, [float(values[part].mean()) for part in stretches])]


def _curve(record: RunRecord, source: str | None, tokens: list[float], values: list[float]) -> Curve:
    return Curve(run=record.name, method=record.method, source=source, tokens=tokens, values=values)
