"""The steps of a GPU check: what each runs, in which order, and how long it may take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setup_environment import SetupError

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 15.0
"""A step is not begun with less than this left."""


@dataclass(frozen=True)
class Step:
    """One step. `seconds`: the most it may take."""

    name: str
    what: str
    seconds: float


STEPS = (
    Step("facts", "the card, its copy bandwidth and bf16 product rate", 120),
    Step("build", "native code for CUDA, registers and spills of each kernel", 300),
    Step("parity", "pytest -m gpu: kernels against their references, steps and whole runs against the CPU", 420),
    Step("bandwidth", "each kernel's bandwidth over the copy's, beside torch and named peers", 300),
    Step("step", "tokens a second and MFU of the trainer's step", 540),
    Step("sanitizer", "compute-sanitizer over every kernel", 240),
)
"""By importance: what is left when the time is over is missed least."""


def chosen(only: str | None) -> list[Step]:
    """The steps named in `only` (parted by commas; all of them without), in the fixed order."""
    if only is None:
        return list(STEPS)
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = [step.name for step in STEPS]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SetupError(f"--only {only}: {', '.join(unknown) or 'nothing'} is no step; choose of {', '.join(known)}")
    return [step for step in STEPS if step.name in names]


def command_of(name: str, python: str, device: str, figures: Path, seconds: float) -> list[str]:
    """What a step runs; it writes `figures` itself, or what it prints is read (see `parse`)."""
    # What a step is told it has: it shall end by itself, and write what it has, before it is ended.
    told = f"{max(1.0, seconds - 20):.0f}"
    commands: dict[str, Sequence[str]] = {
        "facts": ["-m", "benchmarks.gpu_measure", "--device", device, "--json", str(figures)],
        "build": ["tools/gpu_check_steps/build.py", "--device", device, "--json", str(figures)],
        "parity": ["-m", "pytest", *gpu_tests(ROOT), "-m", "gpu", "-v", "-p", "no:cacheprovider", *JUNIT, str(figures)],
        "bandwidth": ["-m", "benchmarks.gpu_kernels", "--device", device, "--json", str(figures), "--seconds", told],
        "step": ["-m", "benchmarks.gpu_step", "--device", device, "--json", str(figures), "--seconds", told],
        "sanitizer": ["tools/gpu_check_steps/sanitizer.py", "--device", device, "--json", str(figures)],
    }
    extra = ["--seconds", told] if name == "sanitizer" else []
    return [python, *commands[name], *extra]


JUNIT = ("-o", "junit_family=xunit2", "--junit-xml")


def gpu_tests(root: Path) -> list[str]:
    """The test files that have GPU tests: the others' imports need not work on a GPU machine."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [str(file.relative_to(root)) for file in files if "pytest.mark.gpu" in file.read_text(errors="replace")]


def environment_of(device: str, site: Path | None, base: dict[str, str]) -> dict[str, str]:
    """The environment of every step: the tree first on the path, then the carried wheels, then the machine's own."""
    environment = dict(base)
    paths = [str(ROOT), *([str(site)] if site is not None else []), base.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = ":".join(path for path in paths if path)
    environment["PYTHONUNBUFFERED"] = "1"
    environment["DS_ACCELERATOR"] = device
    environment["TORCH_EXTENSIONS_DIR"] = str(ROOT / "build" / "gpu_check" / "torch_extensions")
    if device == "cuda":
        environment["MEGATRON_DEPT_CUDA"] = "1"
        environment.pop("CUDA_LAUNCH_BLOCKING", None)
    else:
        environment["MEGATRON_DEPT_REHEARSE_GPU"] = "1"
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment
