"""Writing a checkpoint: every rank its slices, then one manifest renamed into place.

A directory without a manifest is no checkpoint: a run killed while saving leaves the earlier ones as they were, and the
next save sweeps the remains. Silos that are launches of their own write one each: those of one save have the same
`save_id`, and no others have it, of whatever name.
"""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_dept.checkpoint.reader import FORMAT_VERSION, MANIFEST, committed
from megatron_dept.checkpoint.slice_file import Entry
from megatron_dept.checkpoint.slices import save_slices
from megatron_dept.checkpoint.store import SOURCE_MARK
from megatron_dept.common.errors import CheckpointError, UserError
from megatron_dept.common.files import flush_to_disk, write_json

_NAME = re.compile(r"step-\d+(?:-(\d+))?")
"""A checkpoint of a run; what a user has put beside them under another name is the user's."""
GatherAll = Callable[[object], list[object]]
"""Everyone's picklable value, in rank order: the one collective a save needs."""


def save_checkpoint(
    directory: Path,
    rank: int,
    together: range,
    gather_all: GatherAll,
    tensors: Mapping[str, Entry],
    links: Iterable[Path],
    manifest: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Save and commit one checkpoint. Collective: every rank calls it with its own `tensors` and `links`.

    Returns where: `directory`, or, where that is committed already, a neighbour that sorts after it. Committed ones
    that sort after that are of an attempt that was given up: they are removed, with all but the last older ones.
    `together`: the ranks that write into one directory; silos that are launches of their own have one each, and none
    commits its manifest before all have written everything (two phases).
    `links`: files of the source store that this rank answers for, linked in (copied across file systems). `manifest`:
    the same on every rank of them, or the first's counts. Raises `CheckpointError` on every rank where any rank
    failed; earlier checkpoints are then untouched.
    """
    failure, chosen = _attempt(lambda: _fresh(directory) if rank == together[0] else None)
    answers: list[Any] = gather_all((failure, chosen, uuid.uuid4().hex if rank == 0 else None))
    _agree([answer[0] for answer in answers], directory, sweep=False)
    directory, save_id = answers[together[0]][1], answers[0][2]
    names: list[str] = []

    def write() -> None:
        part = directory / f"part-{rank:05d}.safetensors"
        save_slices(part, tensors)
        names.append(part.name)
        for source in links:
            target = directory / f"{source.parent.name}{SOURCE_MARK}{source.name}"
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
                flush_to_disk(target)
            names.append(target.name)
        flush_to_disk(directory)

    failure, _ = _attempt(write)
    sizes = {name: (directory / name).stat().st_size for name in names} if not failure else {}
    reports: list[Any] = gather_all((failure, sizes))
    _agree([report[0] for report in reports], directory, sweep=rank == together[0])
    files: dict[str, int] = {}
    for report in reports[together.start : together.stop]:
        files |= report[1]
    full = {"format_version": FORMAT_VERSION, "save_id": save_id, **manifest, "files": files}

    def commit() -> None:
        write_json(directory / MANIFEST, full)
        # Before an older checkpoint is removed, this one is where a power cut leaves it.
        flush_to_disk(directory)
        flush_to_disk(directory.parent)

    failure, _ = _attempt(commit) if rank == together[0] else (None, None)
    _agree(gather_all(failure), directory, sweep=rank == together[0])
    if rank == together[0]:
        remove_newer(directory)
        for old in _ours(directory.parent)[:-keep_last]:
            _remove(old)
    return directory


def remove_newer(checkpoint: Path) -> list[Path]:
    """Remove the run's checkpoints that sort after `checkpoint`, newest first; which. For one rank of a directory."""
    newer = [path for path in _ours(checkpoint.parent) if path.name > checkpoint.name]
    for path in reversed(newer):
        _remove(path)
    return newer


def _ours(directory: Path) -> list[Path]:
    """The run's committed checkpoints, oldest first."""
    return [path for path in committed(directory) if _NAME.fullmatch(path.name)]


def _remove(checkpoint: Path) -> None:
    """The manifest goes first, so that a half-removed checkpoint is none."""
    (checkpoint / MANIFEST).unlink()
    shutil.rmtree(checkpoint)


def _attempt(action: Callable[[], Path | None]) -> tuple[str | None, Path | None]:
    """(what failed, None), or (None, what `action` returned)."""
    try:
        return None, action()
    except UserError as error:
        return str(error), None
    except OSError as error:
        return f"{error.filename or 'checkpoint'}: {error.strerror or error}", None


def _agree(failures: Iterable[object], directory: Path, sweep: bool) -> None:
    """Raise `CheckpointError` where any rank failed; `sweep` removes what was written so far."""
    failed = [(who, failure) for who, failure in enumerate(failures) if failure]
    if not failed:
        return
    if sweep:
        shutil.rmtree(directory, ignore_errors=True)
    who, failure = failed[0]
    raise CheckpointError(
        f"checkpoint {directory} was not saved: rank {who}: {failure}; then start again, earlier checkpoints are intact"
    )


def _fresh(directory: Path) -> Path:
    """Sweep what was never committed; make `directory`, or a neighbour where that holds a committed checkpoint."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    keep = {path.name for path in committed(directory.parent)}
    for path in directory.parent.glob("step-*"):
        if path.is_dir() and path.name not in keep:
            shutil.rmtree(path)
    # After the last neighbour: where the first has been pruned, a new one in its place would sort before the others.
    same = [_NAME.fullmatch(name) for name in keep if name.startswith(directory.name)]
    again = 1 + max((int(found[1] or 0) for found in same if found), default=-1)
    chosen = directory.with_name(f"{directory.name}-{again:02d}" if again else directory.name)
    chosen.mkdir()
    return chosen
