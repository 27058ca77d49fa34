"""What outer.overlap hides of the body's exchange, on two silos over gloo, with and without a slow link between them.

    python -m benchmarks.overlap [--repeats 3] [--json FILE]

Whole runs of two CPU ranks of one thread in the same two processes, one overlap after the other, again and again. Each
of a run's rounds but the first and the last counts: seconds that the body's exchange took, and that training waited for
it; seconds of inner steps while it could be under way, and of the others. A slow link is made up: the exchange sleeps
as long as its bytes would take at so many Mbit/s, which costs no processor time, as a real wait does not.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.layouts import dataset
from megatron_dept.config.load import validate_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.world import World, start_world
from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout
from megatron_dept.training.setup import build_trainer
from megatron_dept.training.sources import SourceSet
from tests.support.distributed import run_ranks

OVERLAPS = (0, 1, 4)
LINKS: dict[str, float | None] = {"loopback": None, "200 Mbit/s": 200e6, "50 Mbit/s": 50e6}
N_LOCAL, ROUNDS = 8, 6


def config_of(data: Path, run_dir: Path, overlap: int) -> RunConfig:
    outer = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9, "overlap": overlap}
    return validate_config(
        {
            "run_dir": str(run_dir),
            "model": {"num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 64},
            "sources": [{"name": f"words{i}", "data": str(data)} for i in range(2)],
            "dept": {"variant": "glob", "rounds": ROUNDS, "n_local": N_LOCAL, "outer": outer},
            "parallel": {"silos": 2},
            "training": {"micro_batch_size": 4, "global_batch_size": 4, "threads_per_rank": 1, "timeout_seconds": 600},
            "evaluation": {"interval_rounds": 0},
            "checkpoint": {"save_interval": 0},
            "logging": {"peak_tflops": 1.0, "interval_steps": 10_000, "norm_interval_steps": 10_000},
        },
        "benchmark",
    )


def runs(launch: Launch, data: Path, root: Path, repeats: int) -> dict[str, dict[int, dict[str, list[float]]]]:
    """By link, overlap and figure, each counted round's (or step's) seconds on this rank."""
    torch.set_num_threads(1)
    world: World | None = None
    finish, took, link = BodyExchange.finish, [0.0], [0.0]

    def finishing(self: BodyExchange, sources: int) -> None:
        began = time.perf_counter()
        finish(self, sources)
        if link[0]:
            time.sleep(8 * self.round_bytes / link[0])
        took[0] = time.perf_counter() - began

    BodyExchange.finish = finishing  # type: ignore[method-assign]
    found: dict[str, dict[int, dict[str, list[float]]]] = {name: {} for name in LINKS}
    for repeat in range(repeats):
        for name, bits in LINKS.items():
            link[0] = bits or 0.0
            for overlap in OVERLAPS:
                config = config_of(data, root / f"{name.split()[0]}-{overlap}-{repeat}", overlap)
                world = world or start_world(launch, Layout.cut(config.parallel, 2), 600, overlaps=True)
                figures = found[name].setdefault(overlap, defaultdict(list))
                one_run(world, config, overlap, took, figures)
    return {name: {overlap: dict(of) for overlap, of in by_overlap.items()} for name, by_overlap in found.items()}


def one_run(world: World, config: RunConfig, overlap: int, took: list[float], figures: dict[str, list[float]]) -> None:
    """Train `config`; add its rounds' seconds to `figures`."""
    trainer = build_trainer(config, world, SourceSet(config))
    train = trainer._step

    def stepping(local: Any, source: Any) -> None:
        began = time.perf_counter()
        train(local, source)
        if 0 < trainer.progress.round < ROUNDS - 1:
            when = "beside" if local.step < overlap else "apart"
            figures[f"step {when}"].append(time.perf_counter() - began)

    trainer._step = stepping  # type: ignore[method-assign]
    for round in range(ROUNDS):
        began = time.perf_counter()
        trainer._round()
        seconds, overlapped = time.perf_counter() - began, trainer._overlapped
        if 0 < round < ROUNDS - 1:
            figures["round"].append(seconds)
            # Of an overlapped exchange, the one that this round hid: its predecessor's.
            figures["exchange"].append(took[0] if overlapped is None else overlapped.whole)
            figures["waited"].append(took[0] if overlapped is None else overlapped.waited)
    trainer._write_down_round()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="overlap-"))
    try:
        figures = run_ranks(2, runs, dataset(root), root, arguments.repeats, limit=3000)[0]
    finally:
        shutil.rmtree(root)
    columns = ("link", "overlap", "exchange", "waited", "hidden", "step beside", "step apart", "round")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for link, by_overlap in figures.items():
        for overlap, of in by_overlap.items():
            middle = {name: statistics.median(values) for name, values in of.items()}
            hidden = 1 - sum(of["waited"]) / sum(of["exchange"])
            beside = f"{middle['step beside']:.3f}" if overlap else "-"
            cells = [link, str(overlap), f"{middle['exchange']:.3f}", f"{middle['waited']:.3f}", f"{hidden:.0%}"]
            print("| " + " | ".join([*cells, beside, f"{middle['step apart']:.3f}", f"{middle['round']:.2f}"]) + " |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
