"""Where a run goes on from: its newest checkpoint, checked to be whole and its own before any rank meets another."""

from collections.abc import Iterator
from typing import Any

from megatron_dept.checkpoint.reader import Checkpoint, committed
from megatron_dept.common.errors import CheckpointError
from megatron_dept.config.schema import RunConfig
from megatron_dept.training.progress_state import RunProgress
from megatron_dept.training.source_changes import SourceChanges, source_differences
from megatron_dept.training.sources import SourceSet

# What a resumed run must share with its checkpoint: all that its numbers depend on, but not the layout.
SHARED = ("seed", "phase", "model", "optimizer", "adapt")
SHARED_DEPT = ("variant", "rounds", "n_local", "sources_per_round", "inner_state", "outer", "std_tau")
SHARED_TRAINING = ("global_batch_size", "precision")
SHARED_EMBEDDING = ("wire",)
# Fields of these that no number depends on, and what fields were before there was a choice.
WITHOUT_EFFECT = ("dept.outer.bucket_mb",)
BEFORE = {"dept.outer.wire": "fp32", "dept.outer.overlap": 0}


def resume_point(config: RunConfig, sources: SourceSet, name: str | None = None) -> Checkpoint | None:
    """The newest checkpoint in `config.run_dir`, or the one called `name`; None where the run has none yet.

    No collective: every rank finds the same mistake by itself, and none is left waiting for another that has. Raises
    `CheckpointError` where the checkpoint is damaged, or naming the first field in which it is another run's.
    """
    if not committed(config.run_dir / "checkpoints"):
        return None
    checkpoint = Checkpoint.open(config.run_dir / "checkpoints" / name if name is not None else config.run_dir)
    checkpoint.index.paths("")  # reads every file's header: damage is found here, not when ranks wait for one another
    changes = SourceChanges.since(checkpoint.manifest, sources.names)
    if changes and config.dept.synchronous:
        raise CheckpointError(
            f"{checkpoint.directory}: variant {config.dept.variant} trains on one blend of all sources and has come so "
            f"far in that blend, so none can join or leave; set sources to "
            f"{', '.join(checkpoint.manifest['all_sources'])}, or choose another run_dir for a new run"
        )
    progress = RunProgress.load(checkpoint.manifest["progress"])
    if changes and progress.mid_round and not progress.sampled:
        raise CheckpointError(
            f"{checkpoint.directory} is of an earlier release, in the middle of a round, and does not say which "
            f"sources that drew; end the round with the sources {', '.join(checkpoint.manifest['all_sources'])} first"
        )
    for field, before, after in _differences(checkpoint, config, sources, changes):
        raise CheckpointError(
            f"{checkpoint.directory} was trained with {field} {before}, this run has {after}; "
            "set it back, or choose another run_dir for a new run"
        )
    return checkpoint


def changes_line(checkpoint: Checkpoint, sources: SourceSet) -> str | None:
    """One line on which sources have joined, left or come back since the checkpoint; None where none has."""
    changes = SourceChanges.since(checkpoint.manifest, sources.names)
    return changes.describe(RunProgress.load(checkpoint.manifest["progress"])) if changes else None


def _differences(
    checkpoint: Checkpoint, config: RunConfig, sources: SourceSet, changes: SourceChanges
) -> Iterator[tuple[str, Any, Any]]:
    """(what, then, now) of all that should be equal and is not."""
    then, now = checkpoint.manifest["trained_with"], config.model_dump(mode="json")
    if changes:
        # With fewer sources there may be too few for it; the round under way keeps its sample.
        then = {**then, "dept": {**then["dept"], "sources_per_round": config.dept.sources_per_round}}
    # An earlier release had rows travel in fp32 alone, and no section embedding.
    then = {"embedding": {"wire": "fp32"}, **then}
    for prefix, fields in (
        ("", SHARED),
        ("dept", SHARED_DEPT),
        ("training", SHARED_TRAINING),
        ("embedding", SHARED_EMBEDDING),
    ):
        before, after = (then[prefix], now[prefix]) if prefix else (then, now)
        for field in fields:
            yield from _leaves(f"{prefix}.{field}" if prefix else field, before.get(field), after.get(field))
    yield from source_differences(checkpoint.manifest, sources)


def _leaves(path: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """The fields below `path` whose values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from _leaves(f"{path}.{key}", before.get(key), after.get(key))
    elif path not in WITHOUT_EFFECT and after != (BEFORE.get(path) if before is None else before):
        yield path, before, after
