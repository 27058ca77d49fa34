"""Build and check everything on a GPU: parity with the CPU, bandwidth, tokens a second, memory checkers.

    make gpu-check PYTHON=python3 WHEELS=wheels OUT=results
    python3 tools/gpu_check.py --wheels wheels --out results --minutes 25
    python3 tools/gpu_check.py --only build,bandwidth
    python3 tools/gpu_check.py --device cpu                      a rehearsal with tiny sizes, without a GPU
    python3 tools/gpu_check.py --list-wheels --installed LIST    where there is a network: what to carry to the machine

It needs a copy of this tree, a Python that has torch >= 2.11 for CUDA, and nvcc; no network and no git. What is missing
there comes as wheels in a folder and is installed into build/gpu_check/site, a place of its own: the machine's torch
stays as it is. LIST is what `pip list` prints on that machine; without it, only torch is taken to be there.

Steps run one after another, each a program with a limit of its own, and are told in gpu-<card>.json and .md after each
of them. One that went well is not run again for the same tree, so that what ran out of time goes on. The exit code is 0
where all went well, 1 where a step failed or had no time, 2 where nothing could begin.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_check_steps import report, run, wheels  # noqa: E402
from gpu_check_steps.plan import ROOT, STEPS, chosen, environment_of  # noqa: E402
from setup_environment import (  # noqa: E402
    MINIMUM_TORCH,
    SetupError,
    choose_environment,
    installed,
    version_text,
    version_tuple,
)

WORK = ROOT / "build" / "gpu_check"
TARGET_PYTHON = "3.12"
MIB = 2**20


def main() -> int:
    arguments = parse()
    try:
        if arguments.list_wheels:
            return list_wheels(arguments)
        return check(arguments)
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = ", ".join(step.name for step in STEPS)
    parser.add_argument("--wheels", type=Path, default=None, help="folder of wheels that the machine lacks")
    parser.add_argument("--out", type=Path, default=None, help="folder of the report (default benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=30.0, help="time for all steps together (default 30)")
    parser.add_argument("--only", default=None, help=f"these steps, parted by commas: {steps}")
    parser.add_argument("--again", action="store_true", help="also what went well before")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--list-wheels", action="store_true", help="print how to fetch what the machine lacks, and end")
    parser.add_argument("--installed", type=Path, default=None, help="with --list-wheels: that machine's `pip list`")
    parser.add_argument(
        "--python-version", default=TARGET_PYTHON, help=f"with --list-wheels: its Python (default {TARGET_PYTHON})"
    )
    arguments = parser.parse_args()
    if arguments.out is None:
        # A rehearsal's figures are none, and no result.
        arguments.out = ROOT / "benchmarks" / "results" if arguments.device == "cuda" else WORK
    return arguments


def list_wheels(arguments: argparse.Namespace) -> int:
    """Print what a machine lacks and the commands that fetch it."""
    have = {"torch": "", "numpy": "", "pip": "", "setuptools": "", "wheel": ""}
    if arguments.installed is not None:
        have = wheels.parse_installed(arguments.installed.read_text())
    missing = wheels.missing_there(have, arguments.python_version)
    for each in missing:
        print(f"# {each.name}: needed by {each.wanted_by}")
    folder = str(arguments.wheels or "wheels")
    for command in wheels.download_commands(missing, arguments.python_version, folder, sys.executable):
        print(shlex.join(command))
    if arguments.wheels is not None and arguments.wheels.is_dir():
        print(f"# {arguments.wheels} holds {wheels.total_bytes(arguments.wheels) / MIB:.1f} MiB now")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """All chosen steps, and the report after each of them."""
    steps = chosen(arguments.only)
    python = interpreter()
    WORK.mkdir(parents=True, exist_ok=True)
    site = None
    if arguments.wheels is not None:
        site = WORK / "site"
        wheels.install(python, arguments.wheels, site, WORK / "site.log")
    bench = run.Bench(python, arguments.device, environment_of(arguments.device, site, dict(os.environ)), WORK)
    check_packages(bench)
    if arguments.device == "cuda":
        check_gpu(bench)
    command = shlex.join(["python3", "tools/gpu_check.py", *sys.argv[1:]])
    known = {step.name: run.read_entry(bench, step.name) for step in STEPS}

    def written(entry: dict[str, Any]) -> None:
        known[entry["step"]] = entry
        entries = [each for each in known.values() if each is not None]
        report.write(arguments.out, entries, command, arguments.device)

    entries = run.run_steps(bench, steps, arguments.minutes, arguments.again, written)
    both = report.write(arguments.out, [each for each in known.values() if each], command, arguments.device)
    print(f"written: {both[0]} and {both[1].name}")
    return int(any(entry["status"] in ("failed", "out of time") for entry in entries))


def interpreter() -> Path:
    """The Python that the steps run in: as for the other make targets, else this one where it has torch."""
    python, given = choose_environment()
    if given or python.exists():
        return python
    torch = installed(Path(sys.executable)).get("torch")
    if torch is None or version_tuple(torch) < MINIMUM_TORCH:
        raise SetupError(
            f"{sys.executable} has no torch >= {version_text(MINIMUM_TORCH)}; name a Python that has one: PYTHON=..."
        )
    return Path(sys.executable)


def check_packages(bench: run.Bench) -> None:
    """SetupError that lists what is missing and how to fetch it."""
    script = Path(wheels.__file__)
    environment = bench.environment | {"PYTHONPATH": f"{script.parent.parent}:{bench.environment['PYTHONPATH']}"}
    done = subprocess.run(
        [str(bench.python), str(script)], env=environment, capture_output=True, text=True, cwd=ROOT
    )  # fmt: skip
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SetupError(f"{bench.python} cannot tell its packages ({line})")
    missing = [wheels.Missing(*each) for each in json.loads(done.stdout)]
    if not missing:
        return
    version = subprocess.run(
        [str(bench.python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
    ).stdout.strip()
    lines = [f"{bench.python} lacks {', '.join(each.name for each in missing)}; where there is a network, run:"]
    lines += [shlex.join(line) for line in wheels.download_commands(missing, version, "wheels", "python3")]
    lines.append(
        "and name the folder with WHEELS=wheels (--wheels). What these need besides is found there by "
        "`python3 tools/gpu_check.py --list-wheels --installed LIST`, LIST being `pip list` of this machine."
    )
    raise SetupError("\n".join(lines))


def check_gpu(bench: run.Bench) -> None:
    """SetupError where torch sees no GPU."""
    ask = "import torch; print(torch.cuda.is_available(), torch.__version__)"
    done = subprocess.run([str(bench.python), "-c", ask], env=bench.environment, capture_output=True, text=True)
    if done.stdout.startswith("True"):
        return
    said = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
    torch = said[-1].removeprefix("False ")
    raise SetupError(
        f"torch ({torch}) of {bench.python} sees no GPU; run on a machine with one, or rehearse with --device cpu"
    )


if __name__ == "__main__":
    sys.exit(main())
