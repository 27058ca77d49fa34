"""What the GPU benchmarks measure with: events, inputs that rotate out of the cache, and the card's own two ceilings.

    python -m benchmarks.gpu_measure [--json FILE]                the card, its copy bandwidth, its bf16 product rate
    python -m benchmarks.gpu_measure --device cpu [--json FILE]   a rehearsal: tiny sizes, figures without meaning

Copy bandwidth counts bytes read plus bytes written. Inputs are random: the same product of zeros is faster.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WARM_UP, LEAST_CALLS, MOST_CALLS, REHEARSED_CALLS = 3, 15, 300, 3
COPY_BYTES = {"cuda": 4 << 30, "cpu": 4 << 20}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 128}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: `median` and `best` of `calls`, and the middle half's width over the median."""

    median: float
    best: float
    spread: float
    calls: int


def time_calls(call: Callable[[int], object], sets: int, device: torch.device, seconds: float = 0.5) -> Timing:
    """Time `call(i)` for i = 0, 1, .., each on input set i % sets, for about `seconds` after a warm-up.

    On a GPU events stand around each call, all queued before any is read, so that the host is never waited for.
    """
    for index in range(WARM_UP):
        call(index % sets)
    synchronize(device)
    began = time.perf_counter()
    call(0)
    synchronize(device)
    calls = int(min(MOST_CALLS, max(LEAST_CALLS, seconds / max(1e-6, time.perf_counter() - began))))
    if device.type != "cuda":
        calls = REHEARSED_CALLS
    if device.type == "cuda":
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for index, (start, stop) in enumerate(events):
            start.record()
            call(index % sets)
            stop.record()
        synchronize(device)
        taken = [start.elapsed_time(stop) / 1000 for start, stop in events]
    else:
        taken = []
        for index in range(calls):
            began = time.perf_counter()
            call(index % sets)
            taken.append(time.perf_counter() - began)
    quarter, middle, three = statistics.quantiles(taken, n=4)
    return Timing(middle, min(taken), (three - quarter) / middle, calls)


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def input_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs rotate: several times the last-level cache between two uses of one, at least two."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20
    return max(2, -(-4 * cache // max(1, bytes_of_one)))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written a second by a large copy within the device's memory."""
    elements = COPY_BYTES[device.type] // 4
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    timing = time_calls(lambda index: target.copy_(source), 1, device)
    return 2 * source.numel() * source.element_size() / timing.median


def product_rate(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product of random numbers."""
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    timing = time_calls(lambda index: torch.mm(left, right, out=out), 1, device)
    return 2 * size**3 / timing.median


def facts(device: torch.device) -> dict[str, Any]:
    """The card, the software, and the two ceilings that everything else is held against."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "card": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "card": card.name,
            "compute_capability": f"{card.major}.{card.minor}",
            "memory_gib": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
            "l2_mib": round(card.L2_cache_size / 2**20, 1),
            "cuda_of_torch": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": _driver(),
        }
    found["copy_tb_per_second"] = round(copy_bandwidth(device) / 1e12, 4)
    found["bf16_product_tflops"] = round(product_rate(device) / 1e12, 3)
    return found


def _driver() -> str:
    """The driver's version, as its own tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "not told"


def run_within(command: list[str], limit: float) -> tuple[int | None, list[str]]:
    """(exit code, lines of output) of a command; after `limit` seconds it and all that it started are ended: None."""
    with tempfile.TemporaryFile() as output:
        # Not a pipe: a compiler that outlives its parent would hold it open.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        code = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=limit)
        finally:
            # Also where this process itself is asked to end meanwhile.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace").strip().splitlines()


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """What all GPU benchmarks take."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal with tiny sizes")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")


def write_figures(path: Path | None, figures: Any) -> None:
    """Written again after every case, whole: whoever is stopped half-way has lost the case under way alone."""
    if path is not None:
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
        temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_option(parser)
    arguments = parser.parse_args()
    found = facts(torch.device(arguments.device))
    print(json.dumps(found, indent=2))
    write_figures(arguments.json, found)


if __name__ == "__main__":
    main()
