"""Each kernel of csrc beside the best torch composition known for it, on the CPU: one thread, CPU time.

    python -m benchmarks.kernels

Variants of a case are interleaved, after one call each whose results are compared; the least of all calls counts, as
the machine may be busy. Writes benchmarks/results/kernels.md and kernels.json.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from benchmarks.kernel_cases import body, rows
from benchmarks.kernel_cases.case import Case
from megatron_dept.ops.native import native_kernels

RESULTS = Path(__file__).parent / "results"
COPIED = 64 << 20
COMPILER = "inductor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="calls of each variant; the least counts")
    parser.add_argument("--only", default="", help="measure only cases with this in their name; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not native_kernels():
        raise SystemExit("the native kernels are not built; see the warning above")
    torch.manual_seed(0)
    found = []
    for name, make in {**rows.groups("cpu"), **body.groups("cpu")}.items():
        if arguments.only in name:
            found.append(measure(make(), arguments.rounds))
            print(line(found[-1]), flush=True)
            torch._dynamo.reset()
    if not arguments.only:
        write(found, arguments.rounds)


@torch.no_grad()
def measure(case: Case, rounds: int) -> dict:
    """Least milliseconds of ours, of each peer, and of a copy of as many bytes, taken in between."""
    variants = {"": case.fused, **case.peers}
    first = {name: [each.clone() for each in variant()] for name, variant in variants.items()}
    for name, results in first.items():
        for one, other in zip(first[""], results, strict=False):
            if one.shape == other.shape:
                # int8 elements may differ by one, rounded otherwise; everything else by fp32's or bf16's rounding.
                torch.testing.assert_close(
                    one, other, rtol=2e-2, atol=1.01 if one.dtype == torch.int8 else 2e-2, msg=name
                )
    source, target = torch.ones(COPIED // 4), torch.ones(COPIED // 4)
    variants["copy"] = lambda: (target.copy_(source),)
    least = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, variant in variants.items():
            began = time.process_time()
            variant()
            least[name] = min(least[name], (time.process_time() - began) * 1e3)
    copy = least.pop("copy") * case.bytes / (2 * COPIED)
    eager = [name for name in case.peers if name != COMPILER]
    return {
        "case": case.name,
        "bytes": case.bytes,
        "copy_ms": copy,
        "fused_ms": least[""],
        "peers_ms": {name: least[name] for name in case.peers},
        "best_eager": min(eager, key=lambda name: least[name]),
    }


def line(result: dict) -> str:
    """A row of the table."""
    fused, peers, best = result["fused_ms"], result["peers_ms"], result["best_eager"]
    inductor = f"{peers[COMPILER]:.1f} | {peers[COMPILER] / fused:.2f}" if COMPILER in peers else "- | -"
    return (
        f"| {result['case']} | {result['bytes'] / 1e6:.0f} | {result['copy_ms']:.1f} | {fused:.1f} "
        f"| {peers[best]:.1f} ({best}) | {peers[best] / fused:.2f} | {inductor} |"
    )


def write(found: list[dict], rounds: int) -> None:
    """The table and the figures behind it."""
    head = [
        "# Kernels on the CPU",
        "",
        f"`python -m benchmarks.kernels`: one thread of {processor()}, torch {torch.__version__}.",
        f"CPU time in ms, least of {rounds} interleaved calls. *Copy*: the bytes that must be read and written, at",
        "the speed of a plain copy measured in between. *Torch*: the best eager composition (kernels.json has all);",
        "*inductor*: the same by torch.compile, for these very shapes, where it was tried.",
        "20k rows of 768 from 50k (look-ups: 20,480 tokens); bodies of 16,777,216 elements, 2 silos.",
        "",
        "| operation | MB | copy | fused | torch | torch / fused | inductor | inductor / fused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kernels.md").write_text("\n".join([*head, *map(line, found)]) + "\n", encoding="utf-8")
    (RESULTS / "kernels.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """The processor's name and widest vectors, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    name = next((row.split(":")[1].strip() for row in text.splitlines() if row.startswith("model name")), "a processor")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"


if __name__ == "__main__":
    main()
