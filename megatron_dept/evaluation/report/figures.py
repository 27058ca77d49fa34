"""The report's pictures as PNG files, each drawn from `Report` alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_dept.evaluation.report.schema import Curve, Report, Table
from megatron_dept.evaluation.report.style import (
    FAINT,
    GRID,
    INK,
    apart,
    colour_of,
    heading,
    label_ends,
    line_style,
    new_figure,
    save,
)
from megatron_dept.evaluation.report.tables import AVERAGE, cell

COLUMNS = 3  # panels side by side
LEAP = 4  # times the usual distance between points: what interrupts a line


def draw_figures(report: Report, folder: Path) -> dict[str, str]:
    """Draw what there are numbers for; returns {figure name: file name}."""
    curves = report.curves
    drawn = {
        "heldout_bits_per_byte": panels(
            curves.heldout_bits_per_byte,
            report.trained_sources,
            "bits per byte",
            "mean of the sources",
            folder / "heldout.png",
        ),
        "adapt_bits_per_byte": panels(
            curves.adapt_bits_per_byte,
            report.trained_sources,
            "bits per byte",
            "mean of the sources",
            folder / "adapt.png",
        ),
        "training_loss": panels(
            curves.training_loss, report.trained_sources, "nats a token", "all sources", folder / "training.png"
        ),
        "improvement": improvement(
            [table for table in report.tables if table.when == "after_adapt_random"], folder / "improvement.png"
        ),
        "norms": norms(curves.activation_norm, curves.parameter_norm, folder / "norms.png"),
        "embedding_memory": memory(report, folder / "memory.png"),
        "communication": communication(report, folder / "communication.png"),
    }
    return {name: path.name for name, path in drawn.items() if path is not None}


def panels(curves: Sequence[Curve], sources: Sequence[str], unit: str, whole: str, path: Path) -> Path | None:
    """A panel for each source and one for all of them (source null), a line for each method."""
    if not curves:
        return None
    shown: list[str | None] = [s for s in sources if any(curve.source == s for curve in curves)]
    shown += [None] if any(curve.source is None for curve in curves) else []
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(11.5, 2.75 * rows + 0.3, rows, columns)
    scale, tokens_unit = _token_scale(max(max(curve.tokens) for curve in curves))
    for axis, source in zip(axes, shown, strict=False):
        lines = [curve for curve in curves if curve.source == source]
        for curve in lines:
            x, y = broken(np.asarray(curve.tokens) / scale, np.asarray(curve.values))
            axis.plot(
                x, y, color=colour_of(curve.method), linewidth=1.6, linestyle=line_style(curve.method),
                marker="o" if len(x) < 3 else None, markersize=3,
            )  # fmt: skip
        heading(axis, whole if source is None else source, unit)
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlim(right=max(curve.tokens[-1] for curve in lines) / scale)
        axis.set_xlabel(f"tokens trained by the whole run, {tokens_unit}", fontsize=8, color=FAINT)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.draw_without_rendering()  # settles the layout, so that labels know how tall their panel is
    for axis, source in zip(axes, shown, strict=False):
        ends = [(c.method, c.tokens[-1] / scale, c.values[-1]) for c in curves if c.source == source]
        label_ends(axis, ends)
    save(figure, path)
    return path


def broken(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line with gaps where x leaps: a source that was not sampled for a round has no values there."""
    steps = np.diff(x)
    leaps = np.flatnonzero(steps > LEAP * np.median(steps)) + 1 if len(steps) > LEAP else np.array([], dtype=int)
    return np.insert(x, leaps, np.nan), np.insert(y, leaps, np.nan)


def improvement(tables: Sequence[Table], path: Path) -> Path | None:
    """How far below the best baseline each DEPT method ends, by source: right of zero is better, left is worse."""
    rows = []
    for table in tables:
        columns = table.sources + ([AVERAGE] if not table.out_of_distribution else [])
        for column in columns:
            found = [
                (row.method, score.perplexity_improvement)
                for row in table.rows
                if (score := cell(row, column)) is not None and score.perplexity_improvement is not None
            ]
            if found:
                rows.append((column + (" (never seen)" if table.out_of_distribution else ""), found))
    if not rows:
        return None
    figure, (axis,) = new_figure(8.5, 0.42 * len(rows) + 1.3)
    for place, (_, found) in enumerate(rows):
        axis.axhline(place, color=GRID, linewidth=0.7, zorder=0)
        for method, percent in found:
            axis.plot(percent, place, "o", markersize=7, color=colour_of(method), markeredgecolor="white", zorder=3)
    axis.plot([0, 0], [-0.4, len(rows) - 0.4], color=INK, linewidth=0.9)
    axis.grid(visible=False)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9, color=INK)
    axis.set_ylim(len(rows) - 0.4, -1.1)
    axis.xaxis.set_major_formatter(FuncFormatter(_better_or_worse))
    axis.xaxis.set_major_locator(MaxNLocator(7))
    axis.set_xlabel("perplexity, against the best baseline of the row", fontsize=8, color=FAINT)
    figure.draw_without_rendering()
    _label_dots(axis, [(method, value) for method, value in rows[0][1] if value is not None])
    save(figure, path)
    return path


def _better_or_worse(percent: float, _: int | None) -> str:
    if abs(percent) < 1e-9:
        return "equal"
    return f"{abs(percent):.3g} % {'better' if percent > 0 else 'worse'}"


def _label_dots(axis: Axes, dots: Sequence[tuple[str, float]]) -> None:
    """Methods' names above the dots of the first row, moved apart where they would overlap."""
    low, high = axis.get_xlim()
    ordered = sorted(dots, key=lambda dot: dot[1])
    for (method, x), place in zip(ordered, apart([x for _, x in ordered], (high - low) * 0.1, low, high), strict=True):
        axis.annotate(
            method, xy=(x, -0.14), xytext=(place, -0.62), color=colour_of(method), fontsize=8.5, fontweight="bold",
            ha="center", va="bottom", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour_of(method), "lw": 0.5, "shrinkA": 0, "shrinkB": 0,
                "relpos": (0.5, 0),
            },
        )  # fmt: skip


def norms(activation: Sequence[Curve], parameter: Sequence[Curve], path: Path) -> Path | None:
    """Activation and parameter norms side by side."""
    shown = [
        (curves, title)
        for curves, title in ((activation, "activation norm"), (parameter, "parameter norm of the body"))
        if curves
    ]
    if not shown:
        return None
    figure, axes = new_figure(9.5, 3.2, 1, len(shown))
    for axis, (curves, title) in zip(axes, shown, strict=True):
        scale, unit = _token_scale(max(max(curve.tokens) for curve in curves))
        for curve in curves:
            axis.plot(
                np.asarray(curve.tokens) / scale, curve.values, color=colour_of(curve.method), linewidth=1.6,
                linestyle=line_style(curve.method),
            )  # fmt: skip
        heading(axis, title, "L2")
        axis.set_xlim(right=max(curve.tokens[-1] for curve in curves) / scale)
        axis.set_xlabel(f"tokens trained by the whole run, {unit}", fontsize=8, color=FAINT)
        axis.yaxis.set_major_locator(MaxNLocator(5))
    figure.draw_without_rendering()
    for axis, (curves, _) in zip(axes, shown, strict=True):
        scale, _ = _token_scale(max(max(curve.tokens) for curve in curves))
        label_ends(axis, [(c.method, c.tokens[-1] / scale, c.values[-1]) for c in curves])
    save(figure, path)
    return path


def memory(report: Report, path: Path) -> Path | None:
    """Token-table parameters in memory, mean over sources, a bar for each method."""
    if not report.memory:
        return None
    figure, (axis,) = new_figure(7.5, 0.42 * len(report.memory) + 0.9)
    largest = max(entry.parameters_mean for entry in report.memory)
    for place, entry in enumerate(report.memory):
        axis.barh(place, entry.parameters_mean, height=0.62, color=colour_of(entry.method))
        times = "" if entry.reduction is None or entry.reduction < 1.005 else f"   1/{entry.reduction:.1f}"
        text = f"{short(entry.parameters_mean)}{times}"
        axis.text(entry.parameters_mean + 0.01 * largest, place, text, va="center", fontsize=8.5, color=INK)
    _method_axis(axis, [entry.method for entry in report.memory])
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.set_xlim(0, 1.18 * largest)
    heading(axis, "token-table parameters in memory while a source is trained", "mean over sources")
    save(figure, path)
    return path


def communication(report: Report, path: Path) -> Path | None:
    """Bytes a step on a logarithmic axis: measured as a dot, the formula as a tick."""
    entries = [entry for entry in report.communication if entry.training_bytes_per_step > 0]
    if not entries:
        return None
    figure, (axis,) = new_figure(8.5, 0.42 * len(entries) + 1.2)
    axis.set_xscale("log")
    for place, entry in enumerate(entries):
        colour = colour_of(entry.method)
        axis.axhline(place, color=GRID, linewidth=0.7, zorder=0)
        axis.plot(entry.training_bytes_per_step, place, "o", markersize=8, color=colour, zorder=3)
        if entry.formula_bytes_per_step:
            axis.plot(entry.formula_bytes_per_step, place, "|", markersize=16, markeredgewidth=1.6, color=INK, zorder=4)
        times = (
            ""
            if not entry.reduction_measured or entry.reduction_measured < 1.005
            else f"  1/{entry.reduction_measured:,.0f}"
        )
        text = f"{short(entry.training_bytes_per_step)}B{times}"
        axis.annotate(
            text, (entry.training_bytes_per_step, place), xytext=(0, 8), textcoords="offset points", fontsize=8.5,
            color=colour, ha="center", va="bottom",
        )  # fmt: skip
    _method_axis(axis, [entry.method for entry in entries])
    axis.grid(visible=False)
    values = [entry.training_bytes_per_step for entry in entries]
    values += [entry.formula_bytes_per_step for entry in entries if entry.formula_bytes_per_step]
    axis.set_xlim(min(values) / 3, max(values) * 3)
    axis.xaxis.set_major_locator(LogLocator(numticks=8))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{short(value)}B"))
    heading(axis, "bytes sent a sequential step", "dot: measured   |: formula")
    save(figure, path)
    return path


def _method_axis(axis: Axes, methods: Sequence[str]) -> None:
    axis.set_yticks(range(len(methods)), methods, fontsize=9)
    for label, method in zip(axis.get_yticklabels(), methods, strict=True):
        label.set_color(colour_of(method))
        label.set_fontweight("bold")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(visible=False)
    axis.set_ylim(len(methods) - 0.45, -0.75)


def _token_scale(largest: float) -> tuple[float, str]:
    """What to divide tokens by, and the word for it."""
    for scale, word in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= scale:
            return scale, word
    return 1.0, "single"


def short(value: float) -> str:
    """`714`, `2.4 k`, `1.71 M`, `38.6 G`: three significant digits."""
    for scale, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}" if abs(value) < 999.5 * scale else f"{value / scale:.0f}{letter}"
    return f"{value:.3g} "
