"""What a GPU machine without a network lacks: found from packages' own metadata, fetched elsewhere, installed apart.

The machine's own torch, and all that torch needs, is never asked for and never installed over.
"""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from setup_environment import SetupError, canonical, read_pins

ROOT = Path(__file__).resolve().parents[2]
NOT_NEEDED = frozenset(("torch", "mpi4py", "matplotlib", "tensorboard", "transformers"))
"""Requirements of the package that no step here imports; torch is the machine's own."""
FOR_TESTS = ("pytest", "pytest-timeout", "hypothesis")
SOURCE_ONLY = frozenset(("deepspeed",))
"""On the index as source alone: a wheel is made of it where there is a network. It holds no compiled code."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
OVER_TORCH = re.compile(r"^(torch|torchvision|torchaudio|triton|nvidia-.+)$")


@dataclass(frozen=True)
class Missing:
    """A package that is not there, by its canonical name, and what asks for it."""

    name: str
    wanted_by: str


def roots() -> list[str]:
    """What the package (by setup.py) and the tests on a GPU import, as requirements."""
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    listed = next(word.value for word in call.keywords if word.arg == "install_requires")
    required: list[str] = ast.literal_eval(listed)
    return [each for each in [*required, *FOR_TESTS] if _name(each) not in NOT_NEEDED]


def closure(
    wanted: Iterable[str],
    have: Mapping[str, str],
    requires: Callable[[str], list[str]],
    python: str,
    through_present: bool = True,
) -> list[Missing]:
    """What of `wanted` and of all it needs is not in `have` ({name: version or ""}), on x86-64 Linux.

    `requires(name)`: a package's own requirements under Python `python`; with `through_present` those of what is there
    count too. A version that does not satisfy counts as missing, and so does one that is not known ("") and would have
    to satisfy something.
    """
    requirement_type, environment = _packaging(python)
    known = {canonical(name): version for name, version in have.items()}
    found: dict[str, str] = {}
    left = [(requirement_type(each), "megatron_dept") for each in wanted]
    seen: set[tuple[str, str]] = set()
    while left:
        requirement, asker = left.pop(0)
        name = canonical(requirement.name)
        if OVER_TORCH.match(name):
            continue
        if not _satisfied(known.get(name), requirement.specifier):
            found.setdefault(name, asker)
        elif not through_present:
            continue
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in requires(name):
                further = requirement_type(text)
                if further.marker is None or further.marker.evaluate({**environment, "extra": extra}):
                    left.append((further, name))
    return [Missing(name, asker) for name, asker in sorted(found.items())]


def _satisfied(version: str | None, specifier: Any) -> bool:
    """Whether a package of `version` ("": not known, None: not there) is what `specifier` asks for."""
    if version:
        return bool(specifier.contains(version, prereleases=True))
    return version is not None and not str(specifier)


def _packaging(python: str) -> tuple[Any, dict[str, str]]:
    """The class `Requirement`, and the markers' environment of Python `python` on x86-64 Linux."""
    try:
        markers, requirements = (importlib.import_module(f"packaging.{name}") for name in ("markers", "requirements"))
    except ImportError:  # pip brings its own
        markers, requirements = (
            importlib.import_module(f"pip._vendor.packaging.{name}") for name in ("markers", "requirements")
        )
    environment: dict[str, str] = dict(markers.default_environment())
    environment |= {"python_version": python, "python_full_version": f"{python}.0", "implementation_name": "cpython"}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    environment |= {"platform_machine": "x86_64"}
    return requirements.Requirement, environment


def requirements_here(name: str) -> list[str]:
    """A package's requirements by the metadata in this environment; none where it is not here."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def missing_there(have: Mapping[str, str], python: str) -> list[Missing]:
    """What a machine that has `have` lacks, by the metadata in this environment, where all of it is installed.

    Of what it has it is taken that it has what that needs: its versions may need other things than the ones here.
    """
    absent = [root for root in map(_name, roots()) if not requirements_here(root) and not _is_here(root)]
    if absent:
        raise SetupError(f"{', '.join(absent)} are not installed here, so what they need is not known; make venv first")
    return closure(roots(), have, requirements_here, python, through_present=False)


def _is_here(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def missing_here() -> list[Missing]:
    """What this very environment lacks for the steps."""
    have = {each.metadata["Name"]: each.version for each in metadata.distributions() if each.metadata["Name"]}
    return closure(roots(), have, requirements_here, ".".join(map(str, sys.version_info[:2])))


def parse_installed(text: str) -> dict[str, str]:
    """{name: version} of `pip list` in any of its formats, or of bare names, one a line or parted by commas."""
    text = text.strip()
    if text.startswith("["):
        return {entry["name"]: entry.get("version", "") for entry in json.loads(text)}
    found: dict[str, str] = {}
    for line in re.split(r"[\n,]", text):
        line = line.split("#")[0].strip()
        if not line or line.startswith(("Package ", "---", "-e ")):
            continue
        parts = re.split(r"\s*(?:==|@)\s*|\s+", line, maxsplit=1)
        # Of editable installs pip names a folder too.
        found[parts[0]] = parts[1].split()[0] if len(parts) > 1 and parts[1][:1].isdigit() else ""
    return found


def download_commands(missing: Iterable[Missing], python: str, folder: str, interpreter: str) -> list[list[str]]:
    """The pip commands that put wheels of all `missing` into `folder`, at the versions pinned here."""
    pins = read_pins((ROOT / "constraints.txt").read_text())
    names = [each.name for each in missing]
    exact = {name: f"{name}=={pins[name]}" if name in pins else name for name in names}
    binary = [exact[name] for name in names if name not in SOURCE_ONLY]
    commands = []
    if binary:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        commands.append([interpreter, "-m", "pip", "download", *options, *platforms, "-d", folder, *binary])
    commands += [
        ["env", "DS_BUILD_OPS=0", interpreter, "-m", "pip", "wheel", "--no-deps", "-w", folder, exact[name]]
        for name in names
        if name in SOURCE_ONLY
    ]
    return commands


def check_folder(folder: Path) -> list[Path]:
    """The wheels of a folder, to be installed; SetupError where there are none or two of one package."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SetupError(f"{folder} holds no wheels; tools/gpu_check.py --list-wheels says how to fetch them")
    by_name: dict[str, Path] = {}
    for wheel in wheels:
        name = canonical(wheel.name.split("-")[0])
        if name in by_name:
            raise SetupError(f"{folder} holds {by_name[name].name} and {wheel.name}; keep one of them")
        by_name[name] = wheel
    return [wheel for name, wheel in by_name.items() if not OVER_TORCH.match(name)]


def install(python: Path, folder: Path, site: Path, log: Path) -> None:
    """Install a folder's wheels into `site`, a place of their own; nothing where it holds them already."""
    wheels = check_folder(folder)
    stamp, wanted = site / "installed.txt", "".join(f"{wheel.name} {wheel.stat().st_size}\n" for wheel in wheels)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    command = [str(python), "-m", "pip", "install", "-q", *options, "--target", str(site), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True)
    log.write_text(" ".join(command) + "\n" + done.stdout + done.stderr)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SetupError(f"the wheels of {folder} cannot be installed ({line}); the whole output is in {log}")
    stamp.write_text(wanted)


def total_bytes(folder: Path) -> int:
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def _name(requirement: str) -> str:
    return canonical(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


if __name__ == "__main__":
    print(json.dumps([[each.name, each.wanted_by] for each in missing_here()]))
