"""The main job on real text, as resumable steps: each is the very command that a user would type, printed as it runs.

    python tools/demo.py           STD, GLOB, TRIM, SPEC-OPT, each with one adapt; under 10 minutes on 2 cores
    python tools/demo.py --all     every method, both adapt protocols

Text, tokenizers, datasets, runs, logs and the report are in demo/. A step that is done is not done again; a run that
was stopped goes on from its last checkpoint. One-core steps run side by side, each with OMP_NUM_THREADS=1.
"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo_job.runner import Runner
from demo_job.steps import Sources, Step, fetch_step, plan_steps

from megatron_dept.common.cli import ToolParser, positive_int, run_tool
from megatron_dept.common.files import read_json
from megatron_dept.common.progress import format_seconds

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = ToolParser(description="The main job on real text, from fetching it to the report.")
    parser.add_argument("--all", action="store_true", help="every method and both adapt protocols")
    parser.add_argument("--offline", action="store_true", help="use the text that this installation has")
    parser.add_argument("--cores", type=positive_int, help="cores to use at most; default: all of them")
    parser.add_argument("--list", action="store_true", help="print the commands and stop (after fetching the text)")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    runner = Runner(ROOT, arguments.cores)
    try:
        runner.run([fetch_step(arguments.offline)], title="demo: text")
        sources = Sources.read(ROOT / "demo" / "text")
        if not sources.online:
            print(
                "NO NETWORK (or --offline): the text is this installation's own, code and English only; "
                f"sources: {', '.join(sources.trained)}, held out: {', '.join(sources.held_out)}",
                file=sys.stderr,
            )
        steps = plan_steps(ROOT, sources, arguments.all, arguments.offline)
        if arguments.list:
            print("\n".join(step.text for step in steps))
            return 0
        runner.run(steps)
    except KeyboardInterrupt:
        print("stopping: the same command goes on from here", file=sys.stderr)
        raise
    _show(steps, runner, time.monotonic() - began)
    return 0


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _show(steps: Sequence[Step], runner: Runner, seconds: float) -> None:
    """What was found, what an exported model says, and where to look."""
    for step in steps:
        if step.name.startswith("generate-"):
            # A step that was done by `make demo` has there another number than in `make demo-all`.
            log = max(runner.logs.glob(f"[0-9]*-{step.name}.log"), key=lambda path: path.stat().st_mtime)
            said = log.read_text(encoding="utf-8", errors="replace").split("\n", 1)[1]
            print(f"\n{step.name}:\n    " + "\n    ".join(said.strip().splitlines()))
    print("\nWhat the runs found:")
    for sentence in read_json(ROOT / "demo" / "report" / "report.json")["findings"]:
        print(f"- {sentence}")
    print(f"\nreport: demo/report/index.html ({format_seconds(seconds)} in all)")


if __name__ == "__main__":
    run_tool(main)
