"""Where a run goes on from: its newest checkpoint, checked to be whole and its own before any rank meets another."""

from collections.abc import Iterator
from typing import Any

from megatron_dept.checkpoint.reader import Checkpoint, committed
from megatron_dept.common.errors import CheckpointError
from megatron_dept.config.schema import RunConfig
from megatron_dept.training.sources import SourceSet

# What a resumed run must share with its checkpoint: all that its numbers depend on, but not the layout.
SHARED = ("seed", "phase", "model", "optimizer", "adapt")
SHARED_DEPT = ("variant", "rounds", "n_local", "sources_per_round", "inner_state", "outer", "std_tau")
SHARED_TRAINING = ("global_batch_size", "precision")


def resume_point(config: RunConfig, sources: SourceSet, name: str | None = None) -> Checkpoint | None:
    """The newest checkpoint in `config.run_dir`, or the one called `name`; None where the run has none yet.

    No collective: every rank finds the same mistake by itself, and none is left waiting for another that has. Raises
    `CheckpointError` where the checkpoint is damaged, or naming the first field in which it is another run's.
    """
    if not committed(config.run_dir / "checkpoints"):
        return None
    checkpoint = Checkpoint.open(config.run_dir / "checkpoints" / name if name is not None else config.run_dir)
    checkpoint.index.paths("")  # reads every file's header: damage is found here, not when ranks wait for one another
    for field, before, after in _differences(checkpoint, config, sources):
        raise CheckpointError(
            f"{checkpoint.directory} was trained with {field} {before}, this run has {after}; "
            "set it back, or choose another run_dir for a new run"
        )
    return checkpoint


def _differences(checkpoint: Checkpoint, config: RunConfig, sources: SourceSet) -> Iterator[tuple[str, Any, Any]]:
    """(what, then, now) of all that should be equal and is not."""
    then, now = checkpoint.manifest["trained_with"], config.model_dump(mode="json")
    for prefix, fields in (("", SHARED), ("dept", SHARED_DEPT), ("training", SHARED_TRAINING)):
        before, after = (then[prefix], now[prefix]) if prefix else (then, now)
        for field in fields:
            yield from _leaves(f"{prefix}.{field}" if prefix else field, before.get(field), after.get(field))
    known = checkpoint.manifest["sources"]
    before_names, now_names = checkpoint.manifest["all_sources"], list(sources.names)
    if sorted(before_names) != sorted(now_names):
        yield "sources", ", ".join(before_names), ", ".join(now_names)
    if known.keys() != sources.directories.keys():
        yield "sources at home", ", ".join(known), ", ".join(sources.directories)
    for name in sources.directories:
        card = sources.cards[name]
        before, after = known[name]["tokenizer_fingerprint"], card.tokenizer_fingerprint
        if before != after:
            yield f"source {name} under tokenizer", before[:12], after[:12]
        before, after = known[name]["text_fingerprint"], card.text_fingerprint
        if before != after:
            yield f"source {name} of text", before, after


def _leaves(path: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """The fields below `path` whose values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from _leaves(f"{path}.{key}", before.get(key), after.get(key))
    elif before != after:
        yield path, before, after
