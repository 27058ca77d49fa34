"""Embedding memory of every variant, and the time of a step by the size of the vocabulary, with the paper's 12 blocks.

    make bench-vocabulary
    python -m benchmarks.large_vocabulary [--vocabularies 4000 250112] [--repeats 2] [--json FILE] [--picture FILE]

V = 250,112, the paper's multilingual tokenizer. Memory is that of the run's own objects, measured in a process of its
own a variant, beside the paper's Table 9. Steps of this project and of plain torch take turns in one process (see
`benchmarks.vocabulary_steps`); the best of each counts, by clock and by CPU seconds. Some 10 minutes on two idle cores,
at most 8 GB. With --json, steps are added to those that the file has, so that a busy machine can do it in parts:
`--skip-memory --vocabularies 4000 12000`, then others, or the same again.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import vocabulary_memory, vocabulary_steps
from megatron_dept.common.progress import Progress
from megatron_dept.config.presets import PRESETS
from megatron_dept.config.schema import ModelConfig, Variant
from megatron_dept.dept.costs import Sizes, communication_per_step, model_parameters
from megatron_dept.evaluation.report.style import FAINT, INK, colour_of, heading, new_figure, save
from megatron_dept.models.flops import body_parameters
from tests.support.distributed import run_ranks

GLOBAL, TRIMMED, OWN = 250_112, 216_135, 50_257
"""The paper's multilingual tokenizer, the mean |V_k| under it, and a source's own tokenizer."""
VOCABULARIES = (4_000, 12_000, 20_000, OWN, 100_000, 200_000, TRIMMED, GLOBAL)
N_LOCAL = 500
# (variant, name, preset, rows, with gradients and moments, Table 9: embedding, model, communication a step)
PAPER: list[tuple[Variant, str, str, int, bool, tuple[str, str, str]]] = [
    ("std", "STD", "dept-125m", GLOBAL, True, ("192M", "278M", "278M")),
    ("glob", "GLOB", "dept-125m", GLOBAL, True, ("192M", "278M", "0.56M")),
    ("trim", "TRIM", "dept-125m", TRIMMED, True, ("166M", "252M", "0.5M")),
    ("spec", "SPEC", "dept-125m", TRIMMED, True, ("166M", "252M", "0.17M")),
    ("spec_opt", "SPEC-OPT", "dept-125m", OWN, True, ("38.6M", "125M", "0.17M")),
    ("std", "STD, 1.3B", "dept-1.3b", GLOBAL, False, ("512.2M", "1.71B", "1.71B")),
    ("spec_opt", "SPEC-OPT, 1.3B", "dept-1.3b", OWN, True, ("102.9M", "1.3B", "2.4M")),
]


def measure_memory() -> dict[str, dict[str, Any]]:
    """By the names of `PAPER`, each in a process of its own."""
    found = {}
    with Progress("memory", total=len(PAPER), unit="variants") as progress:
        for variant, name, preset, rows, trains, _ in PAPER:
            vocabulary = rows if variant == "spec_opt" else GLOBAL
            (held,) = run_ranks(1, vocabulary_memory.measure, variant, preset, vocabulary, rows, trains, limit=600)
            found[name] = asdict(held)
            progress.note(f"{name}: {held.parameters / 1e6:.1f}M")
            progress.advance()
    return found


def measure_steps(vocabularies: list[int], sequences: int, repeats: int, threads: int) -> dict[str, Any]:
    """`vocabulary_steps.measure` as plain values, timings by vocabulary."""
    run_dir = Path(tempfile.mkdtemp(prefix="vocabulary-"))
    try:
        (told,) = run_ranks(
            1, vocabulary_steps.measure, run_dir, vocabularies, sequences, repeats, threads, limit=24 * 3600
        )
    finally:
        shutil.rmtree(run_dir)
    return {
        "multiplies": told.multiplies,
        "copies": told.copies,
        "peak_bytes": told.peak_bytes,
        "tokens": sequences * vocabulary_steps.LENGTH,
        "threads": threads,
        "timings": {str(timing.vocabulary): asdict(timing) for timing in told.timings},
    }


def add_steps(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What `measure_steps` found before and now: all steps of each vocabulary, the best rates, the highest peak."""
    timings = dict(before["timings"])
    for key, timing in now["timings"].items():
        if key in timings:
            timing = timing | {
                kind: {name: timings[key][kind][name] + timing[kind][name] for name in timing[kind]}
                for kind in ("wall", "cpu")
            }
        timings[key] = timing
    best = {name: max(now[name], before.get(name, 0)) for name in ("multiplies", "copies", "peak_bytes")}
    return now | best | {"timings": timings}


def memory_table(memory: dict[str, dict[str, Any]]) -> list[str]:
    """Measured embedding memory beside Table 9; what is not measured is marked."""
    lines = [
        "| variant | rows | embedding parameters | Table 9 | weights MB | + gradients and moments MB | host MB "
        "| process grew by MB | model (Table 9) | parameters sent a step (Table 9) |",
        "|---" * 10 + "|",
    ]
    for variant, name, preset, rows, trains, (embedding, model, sent) in PAPER:
        if name not in memory:
            continue
        held, config = memory[name], ModelConfig.model_validate(PRESETS[preset])
        sizes = Sizes(body_parameters(config), GLOBAL, rows, config.seq_length, config.hidden_size, N_LOCAL)
        training = held["weights"] + held["gradients"] + held["moments"]
        trained = f"{training / 1e6:,.0f}" if trains else f"{4 * held['weights'] / 1e6:,.0f} by arithmetic"
        lines.append(
            f"| {name} | {rows:,} | {held['parameters'] / 1e6:.1f}M | {embedding} | {held['weights'] / 1e6:,.0f} "
            f"| {trained} | {held['host'] / 1e6:,.0f} | {held['resident'] / 1e6:,.0f} "
            f"| {model_parameters(variant, sizes) / 1e6:,.0f}M ({model}) "
            f"| {communication_per_step(variant, sizes) / 1e6:,.2f}M ({sent}) |"
        )
    return lines


def steps_table(steps: dict[str, Any]) -> list[str]:
    """Best seconds of a step at each vocabulary, and what operations and the optimizer's bytes would make of it."""
    lines = [
        "| V | plain torch s | ours s | ours / plain | CPU s: plain | ours | ours / plain | ours, of V = 250,112's "
        "| operations, of V = 250,112's | optimizer GB |",
        "|---" * 10 + "|",
    ]
    timings = steps["timings"]
    last = timings.get(str(GLOBAL))
    for key in sorted(timings, key=int):
        timing = timings[key]
        wall, cpu = ({name: min(values) for name, values in timing[kind].items()} for kind in ("wall", "cpu"))
        of_last = ["", ""]
        if last is not None:
            of_last[0] = f"{cpu['ours'] / min(last['cpu']['ours']):.2f}"
            of_last[1] = f"{timing['operations'] / last['operations']:.2f}"
        lines.append(
            f"| {int(key):,} | {wall['plain']:.2f} | {wall['ours']:.2f} | {wall['ours'] / wall['plain']:.2f} "
            f"| {cpu['plain']:.2f} | {cpu['ours']:.2f} | {cpu['ours'] / cpu['plain']:.2f} "
            f"| {of_last[0]} | {of_last[1]} | {timing['optimizer_bytes'] / 1e9:.1f} |"
        )
    return lines


def draw(figures: dict[str, Any], path: Path) -> None:
    """Seconds of a step against the vocabulary, and what a rank holds of an embedding in training."""
    figure, (left, right) = new_figure(9.4, 3.7, columns=2)
    timings = sorted(figures["steps"]["timings"].values(), key=lambda timing: timing["vocabulary"])
    sizes = [timing["vocabulary"] / 1000 for timing in timings]
    ours, plain = ([min(timing["cpu"][name]) for timing in timings] for name in ("ours", "plain"))
    for values, label, colour, style in (
        (plain, "plain torch", INK, (0, (4, 2))),
        (ours, "this project", "#1f6fb4", "-"),
    ):
        left.plot(sizes, values, marker="o", markersize=3, color=colour, linestyle=style, linewidth=1.4, label=label)
    scale = ours[-1] / timings[-1]["operations"]
    by_operations = [scale * timing["operations"] for timing in timings]
    left.plot(sizes, by_operations, ":", color=FAINT, linewidth=1.2, label="by operations alone")
    for rows, method in ((OWN, "SPEC-OPT"), (TRIMMED, "TRIM"), (GLOBAL, "GLOB")):
        if rows / 1000 in sizes:
            at = sizes.index(rows / 1000)
            left.annotate(
                method,
                (sizes[at], ours[at]),
                (4, -12),
                textcoords="offset points",
                color=colour_of(method),
                fontsize=8,
                fontweight="bold",
            )
    left.set_ylim(bottom=0)
    left.set_xlabel("vocabulary, thousand ids", fontsize=8, color=INK)
    left.legend(frameon=False, fontsize=8, loc="upper left")
    heading(left, "A training step", f"CPU seconds, {figures['steps']['tokens']} tokens, 12 blocks of 768")
    names = [name for _, name, preset, *_ in PAPER if preset == "dept-125m" and name in figures["memory"]]
    for at, name in enumerate(names):
        held, base = figures["memory"][name], 0.0
        for part, opacity in (("weights", 1.0), ("gradients", 0.65), ("moments", 0.4), ("host", 0.18)):
            amount = held[part] / 1e9
            right.bar(at, amount, 0.62, bottom=base, color=colour_of(name), alpha=opacity)
            if amount > 0.25:
                right.text(at, base + amount / 2, part, ha="center", va="center", fontsize=6.5, color=INK)
            base += amount
        right.text(at, base + 0.06, f"{held['parameters'] / 1e6:.1f}M", ha="center", fontsize=8, color=INK)
    right.set_xticks(range(len(names)), names)
    heading(right, "An embedding in training", "GB; above: parameters")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="*", default=list(VOCABULARIES), help="sizes to time")
    parser.add_argument("--repeats", type=int, default=2, help="steps of each that count (default 2)")
    parser.add_argument("--sequences", type=int, default=2, help="sequences of 256 tokens a step (default 2)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--skip-memory", action="store_true", help="steps alone")
    parser.add_argument("--json", type=Path, default=None, help="figures, added to those that the file has")
    parser.add_argument("--picture", type=Path, default=None, help="where to draw them")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"memory": {}, "steps": {"timings": {}}}
    if arguments.json is not None and arguments.json.is_file():
        figures = json.loads(arguments.json.read_text())
    if not arguments.skip_memory:
        figures["memory"] |= measure_memory()
    if arguments.vocabularies:
        steps = measure_steps(arguments.vocabularies, arguments.sequences, arguments.repeats, arguments.threads)
        figures["steps"] = add_steps(figures["steps"], steps)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    print("\n".join(memory_table(figures["memory"])))
    print()
    print("\n".join(steps_table(figures["steps"])))
    steps = figures["steps"]
    if "multiplies" in steps:
        print(
            f"\nat most {steps['peak_bytes'] / 1e9:.1f} GB; {steps['threads']} threads; this machine's matrix product "
            f"{steps['multiplies'] / 1e9:.0f} GFLOP/s, its copy {steps['copies'] / 1e9:.0f} GB/s read and written"
        )
    if arguments.picture is not None:
        draw(figures, arguments.picture)


if __name__ == "__main__":
    main()
