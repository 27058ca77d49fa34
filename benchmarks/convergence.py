"""The same federation on one process, on tensor ranks and on pipelines: loss curves that lie on one another.

    python -m benchmarks.convergence [--steps 60] [--picture docs/images/layouts.png]

Three sources of seeded text, TRIM, fp32, AdamW as in the recipe. The picture shows the curves of all layouts, and below
them how far each layout's losses are from one process's.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from megatron_dept.evaluation.report.style import INK, new_figure, save
from tests.support.corpus import build_corpus
from tests.support.runs import final_state, largest_difference, losses, small_config, train

LAYOUTS = {
    "1 process": (1, {}),
    "2 silos × tensor 2": (4, {"silos": 2, "tensor_model_parallel_size": 2}),
    "2 silos × pipe 2 × data 2": (8, {"silos": 2, "pipeline_model_parallel_size": 2}),
}
COLOURS = {"latin": "#1f6fb4", "greek": "#e07b1a", "code": "#2a9d8f"}
STYLES = {
    "1 process": ("-", 4.0, 0.35),
    "2 silos × tensor 2": ("-", 1.2, 1.0),
    "2 silos × pipe 2 × data 2": (":", 1.6, 1.0),
}
FLOOR = 1e-7
"""Where the lower panel ends: half a unit in the last place of a loss of 3."""
ROUND = 10
"""Inner steps a round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="sequential steps (default 60)")
    parser.add_argument("--picture", type=Path, default=None, help="where to draw the curves")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="convergence-"))
    try:
        corpus = build_corpus(root / "corpus", train=200)
        curves, states = {}, {}
        for label, (ranks, parallel) in LAYOUTS.items():
            config = small_config(
                corpus,
                root / label,
                model={"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64},
                dept={"variant": "trim", "rounds": max(1, arguments.steps // ROUND), "n_local": ROUND},
                optimizer={"learning_rate": 2e-3, "warmup_steps": 10},
                parallel=parallel,
                logging={"peak_tflops": 1.0, "interval_steps": 1000},
            )
            train(config, ranks)
            curves[label], states[label] = losses(config.run_dir), final_state(config.run_dir)
    finally:
        shutil.rmtree(root)
    reference = curves["1 process"]
    print("| layout | largest difference of a loss | of the final state, relative |")
    print("|---|---|---|")
    for label, curve in curves.items():
        largest = max(abs(curve[key] - reference[key]) for key in reference)
        print(f"| {label} | {largest:.1e} | {largest_difference(states[label], states['1 process']):.1e} |")
    if arguments.picture is not None:
        draw(curves, arguments.picture)


def draw(curves: dict[str, dict[tuple[str, int], float]], path: Path) -> None:
    """The curves of every source on every layout, and their distances from one process's."""
    figure, (above, below) = new_figure(7.2, 5.6, rows=2)
    reference = curves["1 process"]
    for label, curve in curves.items():
        style, width, opacity = STYLES[label]
        for source, colour in COLOURS.items():
            steps = sorted(step for name, step in curve if name == source)
            values = [curve[source, step] for step in steps]
            above.plot(steps, values, style, color=colour, linewidth=width, alpha=opacity)
            if label == "1 process":
                above.annotate(
                    source, (steps[-1], values[-1]), (6, 0), textcoords="offset points", va="center", color=colour
                )
        if label != "1 process":
            distance = [max(abs(curve[source, s] - reference[source, s]) for source in COLOURS) for s in steps]
            below.plot(steps, [max(value, FLOOR) for value in distance], style, color=INK, linewidth=width)
    for label, (style, width, opacity) in STYLES.items():
        above.plot([], [], style, color=INK, linewidth=width, alpha=opacity, label=label)
    above.legend(frameon=False, fontsize=8, loc="upper right")
    above.set_ylabel("training loss")
    below.set_yscale("log")
    below.set_ylabel("largest |loss − one process's|")
    below.set_xlabel("inner step")
    save(figure, path)


if __name__ == "__main__":
    main()
