"""How figures look: one colour a method everywhere, direct labels, nothing that carries no meaning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK = "#22272e"
FAINT = "#8b929b"
GRID = "#e6e8eb"
DPI = 160

# Baselines in greys, DEPT in colours that differ in lightness too (told apart in print and by the colour-blind).
_COLOURS = {
    "STD": "#4d545c",
    "ACT": "#a1a8b0",
    "GLOB": "#1f6fb4",
    "TRIM": "#2a9d8f",
    "SPEC": "#9b5fb5",
    "SPEC-OPT": "#e07b1a",
}
_STD_TAU_0 = "#7d858e"
_OTHERS = ("#b5484b", "#6b8e23", "#5a4fcf")


def colour_of(method: str) -> str:
    """The colour of a method's label; runs of one method told apart by name share it."""
    if method.startswith("STD τ=0"):
        return _STD_TAU_0
    known = _COLOURS.get(method.split(" ")[0])
    return known if known is not None else _OTHERS[sum(method.encode()) % len(_OTHERS)]


def line_style(method: str) -> Any:
    """Baselines broken, each in its own way (their greys are near one another); DEPT solid."""
    if method.startswith("STD τ=0"):
        return (0, (1.2, 1.6))
    if method.startswith("ACT"):
        return (0, (5, 1.6, 1.2, 1.6))
    return (0, (4, 2)) if method.startswith("STD") else "-"


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure in inches and its axes, row by row, bare but for left and bottom spines."""
    spacing = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=spacing)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        bare(axis)
    return figure, axes


def bare(axis: Axes) -> None:
    """Left and bottom spines, faint ticks, a faint horizontal grid."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
        axis.spines[side].set_linewidth(0.6)
    axis.tick_params(which="both", colors=FAINT, labelsize=8, width=0.6)
    axis.grid(axis="y", color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)


def heading(axis: Axes, text: str, unit: str = "") -> None:
    """A panel's title at the left, and its unit in faint type behind it."""
    axis.set_title(text, loc="left", fontsize=9.5, color=INK, fontweight="bold", pad=8)
    if unit:
        axis.set_title(unit, loc="right", fontsize=8, color=FAINT, pad=8)


def label_ends(axis: Axes, ends: Sequence[tuple[str, float, float]], size: float = 8.0) -> None:
    """Write each (method, x, y) beside the end of its line, moved apart where they would overlap."""
    if not ends:
        return
    low, high = axis.get_ylim()
    figure = axis.figure
    panel_inches = axis.get_position().height * figure.get_figheight()  # type: ignore[union-attr]
    gap = (high - low) * (size * 1.15 / 72) / max(panel_inches, 0.5)
    left, right = axis.get_xlim()
    ordered = sorted(ends, key=lambda end: end[2])
    for (method, x, y), place in zip(ordered, apart([y for _, _, y in ordered], gap, low, high), strict=True):
        colour = colour_of(method)
        axis.annotate(
            method,
            xy=(x, y),
            xytext=(right + 0.045 * (right - left), place),
            color=colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending values moved as little as need be so that neighbours are `gap` apart, within the panel if they fit."""
    places = list(values)
    for _ in range(60):
        moved = False
        for index in range(len(places) - 1):
            missing = gap - (places[index + 1] - places[index])
            if missing > 1e-9 * gap:
                places[index] -= missing / 2
                places[index + 1] += missing / 2
                moved = True
        below = low - places[0]
        if below > 0:
            places = [max(place, low + index * gap) for index, place in enumerate(places)]
        above = places[-1] - high
        if above > 0 and len(places) * gap < high - low:
            last = len(places) - 1
            places = [min(place, high - (last - index) * gap) for index, place in enumerate(places)]
        if not moved:
            break
    return places


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without a date, so that the same numbers give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Software": None})
