"""Reading run directories: configuration, metrics, ledger, evaluation, and what to call the method."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dept.common.errors import UserError
from megatron_dept.common.files import read_json
from megatron_dept.config.load import load_config
from megatron_dept.config.schema import RunConfig

METHOD_ORDER = ("std", "act", "glob", "trim", "spec", "spec_opt")
_LABELS = {"act": "ACT", "glob": "GLOB", "trim": "TRIM", "spec": "SPEC", "spec_opt": "SPEC-OPT"}


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says. Metrics lines are in the order of steps, each kept once, the last written."""

    name: str
    path: Path
    config: RunConfig
    base: RunConfig
    """Of pre-training: the run's own, or for an adapt run that of the run it continues."""
    base_name: str | None
    method: str
    steps: tuple[dict[str, Any], ...]
    validations: tuple[dict[str, Any], ...]
    rounds: tuple[dict[str, Any], ...]
    plan: dict[str, Any] | None
    ledger: dict[str, Any] | None
    evaluation: dict[str, Any] | None

    @property
    def adapt(self) -> bool:
        """Whether this is continued pre-training."""
        return self.config.phase == "adapt"

    @property
    def protocol(self) -> str | None:
        """ "random" or "own" for an adapt run."""
        return self.config.adapt.embedding if self.adapt and self.config.adapt is not None else None

    @property
    def baseline(self) -> bool:
        """STD or ACT."""
        return self.base.dept.synchronous

    @property
    def last_step(self) -> int:
        """Sequential steps done."""
        return max((int(line["step"]) for line in (*self.steps, *self.rounds)), default=0)

    @property
    def total_tokens(self) -> int:
        """Tokens trained by the whole federation; 0 before the first round's end."""
        return int(self.rounds[-1]["total_tokens"]) if self.rounds else 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens of the whole federation per sequential step: turns a step into a place on the axis of tokens."""
        return self.total_tokens / max(1, int(self.rounds[-1]["step"])) if self.rounds else 0.0


def load_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs at `paths`, baselines first, then DEPT, pre-training before adapt.

    Raises:
        UserError: a path is no run directory, or one of its files is malformed.
    """
    if len({path.resolve() for path in paths}) != len(paths):
        raise UserError("a run directory was given twice; give each once")
    records = sorted((load_run(path) for path in paths), key=_order)
    # Two runs of one method and phase (other seeds, other settings) are told apart by their names.
    keys = [(record.method, record.adapt, record.protocol) for record in records]
    labels = [r.method if keys.count(k) == 1 else f"{r.method} ({r.name})" for r, k in zip(records, keys, strict=True)]
    return [RunRecord(**{**vars(r), "method": label}) for r, label in zip(records, labels, strict=True)]


def load_run(path: Path) -> RunRecord:
    """One run directory; without config.yaml or metrics a `UserError`; plan, ledger and evaluation may be missing."""
    if not (path / "config.yaml").exists():
        raise UserError(f"{path} is no run directory: it has no config.yaml; give a run_dir of pretrain_dept.py")
    config = load_config(path / "config.yaml")
    base, base_name = config, None
    if config.adapt is not None:
        base_path = _run_of(config.adapt.checkpoint, path)
        base, base_name = load_config(base_path / "config.yaml"), base_path.name
    files = sorted(path.glob("metrics.silo*.jsonl"))
    if not files:
        raise UserError(f"{path} has no metrics.silo*.jsonl; let the run make a step first")
    lines = [line for file in files for line in _read_lines(file)]
    return RunRecord(
        name=path.name,
        path=path,
        config=config,
        base=base,
        base_name=base_name,
        method=method_label(base),
        steps=_last_of(lines, "step"),
        validations=_last_of(lines, "validation"),
        rounds=_last_of(lines, "round"),
        plan=_optional(path / "plan.json"),
        ledger=_optional(path / "ledger.json"),
        evaluation=_optional(path / "evaluation.json"),
    )


def method_label(config: RunConfig) -> str:
    """`GLOB`, `SPEC-OPT`, `ACT`, `STD τ=1`."""
    if config.dept.variant == "std":
        return f"STD τ={config.dept.std_tau:g}"
    return _LABELS[config.dept.variant]


def _order(record: RunRecord) -> tuple[Any, ...]:
    place = METHOD_ORDER.index(record.base.dept.variant)
    return (record.adapt, record.protocol != "random", place, record.base.dept.std_tau, record.name)


def _run_of(checkpoint: Path, run: Path) -> Path:
    """The run directory that a checkpoint path is in; looked for beside `run` too (runs that were moved)."""
    places = (checkpoint, *checkpoint.parents)
    for candidate in (*places, *(run.parent / place.name for place in places if place.name)):
        if (candidate / "config.yaml").exists():
            return candidate
    raise UserError(
        f"{run}: adapt.checkpoint {checkpoint} is in no run directory with a config.yaml; run from the folder "
        "the run was started in"
    )


def _read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The JSON objects of a metrics file; a last line cut short (the run was killed) is left out."""
    raw = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(raw, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(raw):
                return
            raise UserError(f"{path} line {number} is not JSON ({error}); remove the line") from error


def _last_of(lines: Iterable[dict[str, Any]], kind: str) -> tuple[dict[str, Any], ...]:
    """Lines of a kind by step and source; of steps done twice (a resumed run) the later writing counts."""
    kept: dict[tuple[int, str], dict[str, Any]] = {}
    for line in lines:
        if line.get("kind") == kind:
            kept[int(line["step"]), str(line.get("source"))] = line
    return tuple(kept[key] for key in sorted(kept))


def _optional(path: Path) -> dict[str, Any] | None:
    return dict(read_json(path)) if path.exists() else None


def finite(value: Any) -> bool:
    """Whether a metric is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)
