"""A thousand sources on two silos beside ten: what a rank holds; and what it costs a silo to turn to another source.

    python -m benchmarks.many_sources [--sources 1000] [--rounds 40] [--part hold|switch] [--json FILE]

SPEC with kept inner state: every turn reads and writes the source's table, its moments and the body's. Sources are ids
drawn from a subset of one tokenizer's, a different one each, written as datasets without text. Ten train in a round,
five a silo, so that 40 rounds are 200 turns a silo.

The switch: the same run as it is, written behind and fetched ahead, and with every write and read waited for,
interleaved. Its seconds are of a silo's leader, from the rounds' lines in the metrics, the first round (nothing stored
yet) left out.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_dept.checkpoint.store import SourceStore
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from megatron_dept.training.setup import run
from tests.support.distributed import run_ranks
from tests.support.many_sources import Held, build_sources, build_tokenizer, many_config, run_and_measure
from tests.support.runs import metrics

MB = 1e6
QUIET = {"interval_steps": 10_000, "norm_interval_steps": 10_000, "peak_tflops": 1.0}


def hold(root: Path, count: int, rounds: int) -> dict[str, Any]:
    """What both ranks of a run of ten sources hold, and of `count`."""
    tokenizer = build_tokenizer(root / "tokenizer" / "tokenizer.model", 2000)
    sources = build_sources(root / "sources", tokenizer, count)
    results: dict[str, Any] = {}
    print("| sources | rank | start, cpu s | run s | peak MB | anonymous MB, rounds 2, half, last | files | threads |")
    print("|---|---|---|---|---|---|---|---|")
    for number in (10, count):
        of_run = dict(list(sources.items())[:number])
        config = many_config(of_run, root / f"run{number}", dept={"rounds": rounds}, logging=QUIET)
        held: list[Held] = run_ranks(2, run_and_measure, config, limit=1200)
        results[str(number)] = [asdict(each) for each in held]
        for rank, each in enumerate(held):
            resident = [f"{each.resident[at] / MB:.1f}" for at in (1, rounds // 2, -1)]
            print(
                f"| {number} | {rank} | {each.start_seconds:.2f} | {each.seconds:.1f} | {each.peak / MB:.1f} "
                f"| {', '.join(resident)} | {each.files[1]}, {each.files[-1]} | {each.threads[1]}, {each.threads[-1]} |"
            )
    return results


def waiting(launch: Launch, config: RunConfig) -> None:
    """One rank of a run that reads and writes when it must, and waits."""
    save = SourceStore.save

    def save_and_wait(self: SourceStore, source: str, part: str, version: int, tensors: Mapping[str, Tensor]) -> None:
        save(self, source, part, version, tensors)
        self.flush()

    SourceStore.save = save_and_wait  # type: ignore[method-assign]
    SourceStore.fetch_ahead = lambda *_: None  # type: ignore[method-assign, assignment]
    run(config, launch)


def behind(launch: Launch, config: RunConfig) -> None:
    """One rank of a run as it is."""
    run(config, launch)


def switch(root: Path, n_local: int, repeats: int) -> dict[str, Any]:
    """Seconds of switches in a round, both ways; the best of the repeats by its share of the round."""
    tokenizer = build_tokenizer(root / "words" / "tokenizer.model", 8000)
    sources = build_sources(root / "larger", tokenizer, 6, tokens=40_000)
    shares: dict[str, list[dict[str, float]]] = {"waited for": [], "in the background": []}
    for attempt in range(repeats):
        for name, ranks in (("waited for", waiting), ("in the background", behind)):
            config = many_config(
                sources,
                root / f"{name} {attempt}",
                model={"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 128},
                dept={"rounds": 3, "n_local": n_local, "sources_per_round": 6},
                training={"micro_batch_size": 4, "global_batch_size": 8, "threads_per_rank": 1},
                logging=QUIET,
            )
            run_ranks(2, ranks, config, limit=1200)
            lines = [line for line in metrics(config.run_dir, "round") if line["round"]]
            total = sum(line["seconds"] for line in lines)
            seconds = {key: sum(line["switch_seconds"][key] for line in lines) for key in ("total", "read", "write")}
            turns = 3 * len(lines)
            of_turn = {key: 1000 * value / turns for key, value in seconds.items()}
            shares[name].append({"share": seconds["total"] / total, "round": total / len(lines), **of_turn})
    print("| reads and writes | round s | a switch ms | of it waiting for a read | for a write | share of the round |")
    print("|---|---|---|---|---|---|")
    for name, attempts in shares.items():
        best = min(attempts, key=lambda each: each["share"])
        print(
            f"| {name} | {best['round']:.1f} | {best['total']:.1f} | {best['read']:.1f} | {best['write']:.1f} "
            f"| {best['share']:.2%} |"
        )
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--n-local", type=int, default=20, help="steps of a turn, for the switch")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--part", choices=["hold", "switch"], help="one of the two measurements; default: both")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="many-sources-"))
    results: dict[str, Any] = {}
    try:
        if options.part != "switch":
            results["hold"] = hold(root, options.sources, options.rounds)
        if options.part != "hold":
            results["switch"] = switch(root, options.n_local, options.repeats)
    finally:
        shutil.rmtree(root)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
