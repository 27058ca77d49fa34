"""The whole outer exchange of the body, from packing to the applied value, beside one all_reduce of the same bytes.

    python -m benchmarks.exchange [--mb 100] [--repeats 10] [--bucket-mb 32] [--write]

On gloo, 2 and 4 ranks of one thread, a body of so many MB in fp32 on each rank, Nesterov. Per wire, exchange and
all_reduce (a fp32 tensor of as many bytes as the body has on that wire) are interleaved in the same processes, and the
order turns round after every repeat; the best wall time of the slowest rank counts, and the least CPU time of all ranks
together. `--write` writes benchmarks/results/exchange.md.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_dept.common.sizes import FP32_BYTES
from megatron_dept.dept.outer import OuterRule
from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.federation.shares import Packing
from megatron_dept.ops.native import native_kernels
from megatron_dept.ops.wires import WIRES, Wire, wire_bytes
from megatron_dept.topology.launch import Launch
from tests.federation.groups import join_groups
from tests.support.distributed import run_ranks

RULE = OuterRule("nesterov", 0.7, 0.9)
Times = dict[str, list[tuple[float, float]]]
"""By what was done: (wall, CPU) seconds of every repeat on one rank."""


def measure(launch: Launch, ranks: int, elements: int, wire: Wire, bucket_mb: float, repeats: int) -> Times:
    """Exchange and all_reduce in turn on this rank."""
    torch.set_num_threads(1)
    peers = join_groups(launch, ranks).peers
    generator = torch.Generator().manual_seed(launch.rank)
    first = torch.randn(elements, generator=torch.Generator().manual_seed(9))
    exchange = BodyExchange(peers, first, RULE, packing=Packing(wire, bucket_mb))
    local = first + 0.01 * torch.randn(elements, generator=generator)
    reduced = torch.zeros(wire_bytes(elements, wire) // FP32_BYTES)

    def exchanged() -> None:
        exchange.add(local)
        exchange.finish(ranks)

    work: dict[str, Callable[[], None]] = {
        "exchange": exchanged,
        "all_reduce": lambda: peers.all_reduce_sum(reduced, "body"),
    }
    times: Times = defaultdict(list)
    for repeat in range(repeats + 1):
        for name in sorted(work, reverse=bool(repeat % 2)):
            peers.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            work[name]()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    # The first of each touches its memory for the first time.
    return {name: of[1:] for name, of in times.items()}


def best(ranks: list[Times], name: str) -> tuple[float, float]:
    """(wall seconds of the slowest rank, CPU seconds of all), each in its best repeat."""
    repeats = list(zip(*(of[name] for of in ranks), strict=True))
    return min(max(wall for wall, _ in of) for of in repeats), min(sum(cpu for _, cpu in of) for of in repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=100.0, help="MB of the body in fp32 (default 100)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--bucket-mb", type=float, nargs="*", default=[Packing.bucket_mb], help="outer.bucket_mb")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--wires", nargs="*", default=list(WIRES), choices=WIRES)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/exchange.md")
    arguments = parser.parse_args()
    load = f"{os.getloadavg()[0]:.1f}"
    lines = [
        "| ranks | wire | bucket MB | exchange ms | all_reduce ms | ratio | exchange CPU ms | all_reduce CPU ms |",
        "|---" * 8 + "|",
    ]
    print("\n".join(lines), flush=True)
    for ranks in arguments.ranks:
        for wire in arguments.wires:
            for bucket_mb in arguments.bucket_mb:
                elements = int(arguments.mb * 1e6) // FP32_BYTES
                told = run_ranks(ranks, measure, ranks, elements, wire, bucket_mb, arguments.repeats, limit=500)
                (wall, cpu), (reduce_wall, reduce_cpu) = best(told, "exchange"), best(told, "all_reduce")
                cells = [f"{1000 * wall:.1f}", f"{1000 * reduce_wall:.1f}", f"{wall / reduce_wall:.2f}"]
                cells += [f"{1000 * cpu:.0f}", f"{1000 * reduce_cpu:.0f}"]
                lines.append(f"| {ranks} | {wire} | {bucket_mb:g} | " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    if arguments.write:
        kernels = "native kernels" if native_kernels() else "plain torch, no native kernels"
        text = (
            "# The outer exchange beside one all_reduce\n\n"
            f"`python -m benchmarks.exchange --mb {arguments.mb:g} --write`, {kernels}, torch {torch.__version__}: "
            f"what is measured is in that file's first lines.\n\n{os.cpu_count()} cores, load average {load} (before), "
            f"{os.getloadavg()[0]:.1f} (after). Where more runs than there are cores, every wait costs a turn of the "
            "others: wall times then say little, CPU times more.\n\n"
        )
        (Path(__file__).parent / "results" / "exchange.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
