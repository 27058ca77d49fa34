"""Achieved bandwidth of each kernel over the card's measured copy bandwidth, beside torch and the named peers.

    python -m benchmarks.gpu_kernels [--json FILE] [--only body_pack]     on a GPU
    python -m benchmarks.gpu_kernels --device cpu                         a rehearsal: tiny sizes, no torch.compile
    python -m benchmarks.gpu_kernels --once                               each kernel once on odd shapes, held against
                                                                          the reference: what a memory checker runs

CUDA events around each call, warm-up, the median; inputs rotate so that none is in the cache when it is used again.
A peer that cannot be imported or built here is told as "not present".
"""

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import GOALS, LARGE, ODD, TINY, Case, Sizes, cases, size_of
from benchmarks.gpu_measure import (
    Timing,
    add_device_option,
    copy_bandwidth,
    input_sets,
    run_within,
    time_calls,
    write_figures,
)
from megatron_dept.ops import reference, wires
from megatron_dept.ops.native import native_kernels

GOAL = 0.88
NOT_PRESENT = "not present"
QUANTIZER = "DeepSpeed's quantizer"


def measure(
    case: Case, size: Sizes, device: torch.device, copy: float, variants: dict[str, Callable[[dict[str, Any]], object]]
) -> dict[str, Any]:
    """The figures of one case: of each of `variants`, seconds and bandwidth by the bytes that the kernel must move."""
    first = case.make(size, device, 1)
    moved = case.moved(first)
    held = size_of(*(value for value in first.values() if isinstance(value, Tensor)))
    sets = [first] + [case.make(size, device, seed) for seed in range(2, input_sets(held, device) + 1)]
    figures: dict[str, Any] = {"case": case.name, "bytes": moved, "goal": case.name.startswith(GOALS), "variants": {}}
    for name, variant in variants.items():
        try:
            timing = time_calls(lambda index, v=variant: v(sets[index]), len(sets), device)  # type: ignore[misc]
        except (ImportError, AttributeError, RuntimeError) as error:
            if name == "kernel":
                raise
            figures["variants"][name] = {NOT_PRESENT: _first_line(error)}
            continue
        figures["variants"][name] = _figures(timing, moved, copy)
    return figures


def _figures(timing: Timing, moved: int, copy: float) -> dict[str, float]:
    return {
        "microseconds": round(timing.median * 1e6, 2),
        "best_microseconds": round(timing.best * 1e6, 2),
        "spread": round(timing.spread, 3),
        "gb_per_second": round(moved / timing.median / 1e9, 1),
        "of_copy": round(moved / timing.median / copy, 4),
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def quantizer(size: Sizes, device: torch.device, copy: float) -> dict[str, Any]:
    """DeepSpeed's quantizer beside body_pack int8: fp16 in, blocks of 256, without subtraction and error feedback."""
    from deepspeed.ops.op_builder import QuantizerBuilder

    began = time.perf_counter()
    module = QuantizerBuilder().load()
    built = time.perf_counter() - began
    elements = size.elements // wires.BLOCK * wires.BLOCK
    inputs = [torch.randn(elements, device=device, dtype=torch.float16) for _ in range(2)]
    groups = elements // wires.BLOCK
    timing = time_calls(
        lambda index: module.quantize(inputs[index], groups, 8, module.Symmetric), len(inputs), device
    )  # fmt: skip
    moved = elements * 3 + groups * 4
    return {
        "case": f"{QUANTIZER}, fp16 to int8",
        "bytes": moved,
        "goal": False,
        "build_seconds": round(built, 1),
        "variants": {"DeepSpeed": _figures(timing, moved, copy)},
    }


def _add_quantizer(figures: dict[str, Any], copy: float, limit: float) -> None:
    """In a process of its own: DeepSpeed builds it first, which may take minutes or never end."""
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--quantizer", str(copy)]
    code, lines = run_within(command, max(1.0, limit))
    if code == 0:
        figures["cases"].append(json.loads(lines[-1]))
        figures["peers"][QUANTIZER] = "present"
    elif code is None:
        figures["peers"][QUANTIZER] = f"{NOT_PRESENT} (not built within {limit:.0f} s)"
    else:
        figures["peers"][QUANTIZER] = f"{NOT_PRESENT} ({(lines or ['no message'])[-1][:160]})"


def optional_peers() -> dict[str, str]:
    """Which named peers can be imported here; FBGEMM registers its operators when it is."""
    found = {}
    for name, module in (("FBGEMM", "fbgemm_gpu"), ("apex", "apex")):
        try:
            present = importlib.util.find_spec(module) is not None
            if present:
                importlib.import_module(module)
            found[name] = "present" if present else NOT_PRESENT
        except Exception as error:  # whatever its own import stumbles over is no failure of ours
            found[name] = f"{NOT_PRESENT} ({_first_line(error)})"
    return found


def run_once(device: torch.device) -> int:
    """Each case once on odd shapes, against plain torch; the number of cases that differ."""
    wrong = 0
    for case in cases():
        inputs, again = (case.make(ODD, device, 1) for _ in range(2))
        result = case.run(inputs)
        expected = _reference_run(case, again)
        differing = [name for name in inputs if not _same(inputs[name], again[name])]
        differing += [] if _same(result, expected) else ["what is returned"]
        wrong += bool(differing)
        print(f"{case.name}: {'differs in ' + ', '.join(differing) if differing else 'equal'}", flush=True)
    return wrong


def _reference_run(case: Case, inputs: dict[str, Any]) -> object:
    """The case's call with every face replaced by its reference."""
    import benchmarks.gpu_cases as faces

    names = [name for name in vars(faces) if hasattr(reference, name) and name.startswith(("trim_", "remap_", "body_"))]
    kept = {name: getattr(faces, name) for name in names}
    try:
        for name in names:
            setattr(faces, name, getattr(reference, name))
        return case.run(inputs)
    finally:
        for name, face in kept.items():
            setattr(faces, name, face)


def _same(left: Any, right: Any) -> bool:
    """Bit for bit, whatever is not a number included."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        alike = left.shape == right.shape and left.dtype == right.dtype
        return alike and torch.equal(
            left.cpu().contiguous().view(torch.uint8), right.cpu().contiguous().view(torch.uint8)
        )
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def print_table(figures: dict[str, Any]) -> None:
    """One line a variant."""
    print(f"copy {figures['copy_tb_per_second']:.3f} TB/s, read + write; native kernels: {figures['native']}")
    for entry in figures["cases"]:
        for name, values in entry["variants"].items():
            if NOT_PRESENT in values:
                print(f"{entry['case']:38} {name:32} {NOT_PRESENT}: {values[NOT_PRESENT]}")
            else:
                print(f"{entry['case']:38} {name:32} {values['microseconds']:>10.1f} us {values['of_copy']:>7.1%}")


def run_all(device: torch.device, only: str, path: Path | None, seconds: float) -> int:
    """Every case whose name holds `only`, figures written after each; the number of cases that failed.

    First all kernels beside what is there at once, then what must be compiled, as long as `seconds` are not over.
    """
    began = time.monotonic()
    on_gpu = device.type == "cuda"
    size, copy = LARGE if on_gpu else TINY, copy_bandwidth(device)
    figures: dict[str, Any] = {
        "device": device.type,
        "native": native_kernels(device.type),
        "goal": GOAL,
        "copy_tb_per_second": copy / 1e12,
        "peers": optional_peers(),
        "cases": [],
        "failed": {},
    }
    if on_gpu and not figures["native"]:
        # What would be timed as ours is the reference: figures of it are no kernel's.
        figures["failed"]["all kernels"] = "they are not built for this device; run the step build first"
        return _ended(path, figures)
    wanted = [case for case in cases() if only in case.name]
    for case in wanted:
        variants = {"kernel": case.run, "torch eager": case.eager, **case.peers}
        try:
            figures["cases"].append(measure(case, size, device, copy, variants))
        except Exception as error:  # the other kernels' figures are wanted all the same
            figures["failed"][case.name] = _first_line(error)
        _between(device, path, figures)
    entries = {entry["case"]: entry["variants"] for entry in figures["cases"]}
    for case in wanted:
        # A half of the time is for compiling: a third peer is to be built, too.
        if not on_gpu or case.name not in entries or time.monotonic() - began > seconds / 2:
            continue
        torch._dynamo.reset()
        compiled = {"torch.compile": torch.compile(case.eager, dynamic=False)}
        try:
            entries[case.name] |= measure(case, size, device, copy, compiled)["variants"]
        except Exception as error:
            entries[case.name]["torch.compile"] = {NOT_PRESENT: _first_line(error)}
        _between(device, path, figures)
    if on_gpu and only in QUANTIZER:
        _add_quantizer(figures, copy, seconds - (time.monotonic() - began))
    return _ended(path, figures)


def _ended(path: Path | None, figures: dict[str, Any]) -> int:
    write_figures(path, figures)
    print_table(figures)
    for name, message in figures["failed"].items():
        print(f"{name}: FAILED: {message}")
    return len(figures["failed"])


def _between(device: torch.device, path: Path | None, figures: dict[str, Any]) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    write_figures(path, figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_option(parser)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="begin nothing that must be compiled after so long (default 300)"
    )
    parser.add_argument("--once", action="store_true", help="each kernel once, against the reference")
    parser.add_argument("--quantizer", type=float, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.quantizer is not None:
        print(json.dumps(quantizer(LARGE, device, arguments.quantizer)))
        return 0
    return run_once(device) if arguments.once else run_all(device, arguments.only, arguments.json, arguments.seconds)


if __name__ == "__main__":
    raise SystemExit(min(1, main()))
