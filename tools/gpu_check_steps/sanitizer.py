"""Runs compute-sanitizer's tools over every kernel, one after another, and counts what each found.

    python tools/gpu_check_steps/sanitizer.py [--json FILE] [--seconds 240]

torch's caching allocator is switched off, so that a kernel that leaves its buffer leaves the allocation too. initcheck
tells reads of memory that nothing wrote, of torch's kernels as well: only this project's count.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OUR_KERNELS = re.compile(r"mdept")
"""The namespace of csrc/kernels."""
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)s?")
_KERNEL = re.compile(r"=========\s+(?:at|by|in|Read access by|Write access by) (?:0x[0-9a-f]+ in )?(.*)")


def find() -> str | None:
    """compute-sanitizer on the path, or beside nvcc."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
        nvcc = shutil.which("nvcc")
        homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
        candidates = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
        found = next((str(path) for path in candidates if path.exists()), None)
    return found


def parse(output: str) -> dict[str, Any]:
    """What one tool printed: `errors`, None where it came to no summary; `ours`, the lines that name our kernels."""
    counts = [int(count) for count in _SUMMARY.findall(output)]
    places = [found for line in output.splitlines() if (found := _KERNEL.match(line))]
    ours = sum(bool(OUR_KERNELS.search(place[1])) for place in places)
    kept = [line for line in output.splitlines() if line.startswith("=========")]
    return {"errors": sum(counts) if counts else None, "ours": ours, "lines": kept[:30]}


def run_tool(sanitizer: str, tool: str, device: str, limit: float) -> dict[str, Any]:
    command = [sanitizer, "--tool", tool, sys.executable, "-m", "benchmarks.gpu_kernels", "--device", device, "--once"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, errors="replace"
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"tool": tool, "status": "failed", "message": f"not done within {limit:.0f} s"}
    found = parse(done.stdout + done.stderr)
    counts = found["ours"] if tool == "initcheck" else found["errors"]
    equal = done.returncode == 0
    fine = found["errors"] is not None and counts == 0 and equal
    entry: dict[str, Any] = {"tool": tool, "status": "ok" if fine else "failed", **found}
    entry["seconds"] = round(time.monotonic() - began, 1)
    if not equal:
        entry["message"] = f"the run under it ended with exit code {done.returncode}"
        entry["tail"] = (done.stdout + done.stderr).splitlines()[-15:]
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=240.0)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"sanitizer": find(), "tools": []}
    began = time.monotonic()
    for tool in TOOLS if figures["sanitizer"] else ():
        left = arguments.seconds - (time.monotonic() - began)
        if left < 10:
            figures["tools"].append({"tool": tool, "status": "failed", "message": "no time was left"})
        else:
            figures["tools"].append(run_tool(figures["sanitizer"], tool, arguments.device, left))
        print(json.dumps(figures["tools"][-1]), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(figures))
    if not figures["sanitizer"]:
        print("compute-sanitizer is not present")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures))
    return int(any(entry["status"] == "failed" for entry in figures["tools"]))


if __name__ == "__main__":
    sys.exit(main())
