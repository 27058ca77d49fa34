"""Builds the native code in place, asks the package whether it took the kernels, and reads what each kernel uses.

python tools/gpu_check_steps/build.py [--device cpu] [--json FILE]
"""

import argparse
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMPILE = ROOT / "csrc" / "kernels" / "cuda" / "compile.py"
_ASK = "import sys; from megatron_dept.ops.native import native_kernels; print(native_kernels(sys.argv[1]))"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    began = time.perf_counter()
    code = _build()
    figures["native"] = code == 0 and _native(arguments.device)
    if code == 0 and not figures["native"] and arguments.device == "cuda":
        # A library without the CUDA half, built elsewhere and brought along, passes for up to date.
        code = _build("--force")
        figures["native"] = code == 0 and _native(arguments.device)
    figures["seconds"] = round(time.perf_counter() - began, 1)
    figures["exit_code"] = code
    if arguments.device == "cuda":
        figures["registers"] = registers()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures))
    print(f"built in {figures['seconds']} s; native kernels for {arguments.device}: {figures['native']}")
    # A rehearsal shows that the parts work together; where there is no compiler the reference is what runs.
    return int(code != 0 or (arguments.device == "cuda" and not figures["native"]))


def _build(*options: str) -> int:
    command = [sys.executable, "setup.py", "build_ext", "--inplace", *options]
    return subprocess.run(command, cwd=ROOT).returncode


def _native(device: str) -> bool:
    done = subprocess.run([sys.executable, "-c", _ASK, device], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or "True" not in done.stdout:
        print(done.stdout + done.stderr)
    return "True" in done.stdout


def registers() -> dict[str, Any] | str:
    """{kernel: {architecture: what it uses}} of the kernels just compiled; why not, where it cannot be told."""
    folders = sorted((ROOT / "build").glob("temp.*/cuda-*"), key=lambda folder: folder.stat().st_mtime)
    if not COMPILE.exists() or not folders:
        return "not present"
    try:
        found: dict[str, Any] = runpy.run_path(str(COMPILE))["report"](folders[-1].parent)
    except Exception as error:  # figures to read, no check: the build stands
        return f"not told: {error}"
    return found


if __name__ == "__main__":
    sys.exit(main())
