"""Committing a checkpoint: whole on all ranks or not at all, and earlier ones never at risk."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dept.checkpoint import writer
from megatron_dept.checkpoint.reader import MANIFEST, Checkpoint, committed
from megatron_dept.checkpoint.slices import save_slices, whole
from megatron_dept.checkpoint.writer import remove_newer, save_checkpoint
from megatron_dept.common.errors import CheckpointError
from megatron_dept.topology.launch import Launch
from tests.federation.groups import join_groups
from tests.support.distributed import run_ranks


def save(root: Path, step: int, value: float = 0.0, keep_last: int = 9, links: Any = ()) -> Path:
    """One rank alone."""
    return save_checkpoint(
        root / f"step-{step:08d}",
        0,
        range(1),
        lambda mine: [mine],
        whole("token", torch.full((4, 2), value)),
        links,
        {"step": step},
        keep_last,
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_is_what_its_manifest_says(tmp_path: Path) -> None:
    directory = save(tmp_path, 3, value=1.5)
    manifest = json.loads((directory / MANIFEST).read_text())
    assert manifest["step"] == 3
    assert {name: (directory / name).stat().st_size for name in manifest["files"]} == manifest["files"]
    assert (Checkpoint.open(tmp_path).index.read("token") == 1.5).all()


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_step_saved_twice_is_a_neighbour_and_the_newer_one(tmp_path: Path) -> None:
    """A round that ends without a further step has another state than the checkpoint within it: none is overwritten."""
    first, second = save(tmp_path, 3, value=1), save(tmp_path, 3, value=2)
    third = save(tmp_path, 3, value=3)
    assert [path.name for path in committed(tmp_path)] == [first.name, second.name, third.name]
    assert first.name == "step-00000003" and len({first, second, third}) == 3
    assert (Checkpoint.open(tmp_path).index.read("token") == 3).all()
    assert (Checkpoint.open(first).index.read("token") == 1).all()
    save(tmp_path, 4)
    assert committed(tmp_path)[-1].name == "step-00000004"


def test_what_an_attempt_given_up_has_left_does_not_outrank_newer_work(tmp_path: Path) -> None:
    """A run that goes on from step 1 while steps 3 and 4 are there: 2 is what it has, even with keep_last 1."""
    for step in (1, 3, 4):
        save(tmp_path, step)
    theirs = tmp_path / "zz-a-copy"
    shutil.copytree(tmp_path / "step-00000004", theirs)
    assert save(tmp_path, 2, keep_last=1).name == "step-00000002"
    assert names(tmp_path) == ["step-00000002", "zz-a-copy"], "what a user has put there stays"


def test_a_neighbour_sorts_last_where_the_first_of_them_is_gone(tmp_path: Path) -> None:
    for value in (1, 2, 3, 4):
        written = save(tmp_path, 3, value=value, keep_last=2)
        assert committed(tmp_path)[-1] == written
    assert names(tmp_path) == ["step-00000003-02", "step-00000003-03"]
    assert (Checkpoint.open(tmp_path).index.read("token") == 4).all()


def test_newer_ones_are_removed_on_request_and_told(tmp_path: Path) -> None:
    first, *newer = [save(tmp_path, step) for step in (1, 2, 2, 3)]
    assert remove_newer(first) == newer and names(tmp_path) == [first.name]
    assert remove_newer(first) == []


def _save_apart(launch: Launch, root: Path) -> list[str]:
    """Two launches, each into a directory of its own."""
    groups = join_groups(launch, silos=2)
    for value in (1.0, 2.0):
        target = root / f"site{launch.rank}" / "step-00000003"
        mine = range(launch.rank, launch.rank + 1)
        tensors = whole("token", torch.full((2, 2), value))
        save_checkpoint(target, launch.rank, mine, groups.peers.all_gather_object, tensors, [], {}, keep_last=2)
    return [Checkpoint.open(path).manifest["save_id"] for path in committed(root / f"site{launch.rank}")]


def test_all_manifests_of_a_save_have_its_id_and_no_other_has(tmp_path: Path) -> None:
    first, second = run_ranks(2, _save_apart, tmp_path)
    assert first == second and len(set(first)) == 2 and all(len(each) == 32 for each in first)


def test_what_was_never_committed_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / "step-00000002"
    half.mkdir()
    (half / "part-00000.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    assert Checkpoint.open(tmp_path).directory.name == "step-00000001"
    save(tmp_path, 3)
    assert names(tmp_path) == ["notes", "step-00000001", "step-00000003"], "what is not ours stays"


def test_linked_files_stay_what_they_were(tmp_path: Path) -> None:
    """The store replaces its files, it never changes them; a checkpoint's are found by their sizes and marks."""
    stored = tmp_path / "store" / "de" / "embedding.00000001.safetensors"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(b"first")
    directory = save(tmp_path / "checkpoints", 1, links=[stored])
    stored.unlink()
    stored.write_bytes(b"second")
    assert (directory / "de@embedding.00000001.safetensors").read_bytes() == b"first"


def test_a_committed_checkpoint_that_lost_a_file_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    part = directory / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"part-00000\.safetensors has \d+ bytes, not \d+"):
        Checkpoint.open(tmp_path)
    part.unlink()
    with pytest.raises(CheckpointError, match=r"part-00000\.safetensors is missing"):
        Checkpoint.open(tmp_path)


def test_a_directory_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
        Checkpoint.open(tmp_path)
    assert committed(tmp_path / "nowhere") == []


def _refuse(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "the disk")


def _fresh_fails(launch: Launch) -> None:
    if launch.rank == 0:
        writer._fresh = _refuse  # type: ignore[assignment]


def _part_fails(launch: Launch) -> None:
    if launch.rank == 1:
        writer.save_slices = _refuse  # type: ignore[assignment]


def _link_fails(launch: Launch) -> None:
    if launch.rank == 1:
        writer.os.link = writer.shutil.copyfile = _refuse  # type: ignore[assignment]


def _manifest_fails(launch: Launch) -> None:
    writer.write_json = _refuse  # type: ignore[assignment]


def _save_with_fault(launch: Launch, root: Path, fault: Callable[[Launch], None]) -> str:
    groups = join_groups(launch, silos=2)

    def save_both(step: int) -> None:
        links = [root / "store" / "de" / "embedding.00000001.safetensors"] if launch.rank == 1 else []
        tensors = whole("token", torch.full((2, 2), float(step)), start=2 * launch.rank)
        save_checkpoint(
            root / "checkpoints" / f"step-{step:08d}",
            launch.rank,
            range(2),
            groups.peers.all_gather_object,
            tensors,
            links,
            {"step": step},
            keep_last=1,
        )

    save_both(1)
    fault(launch)
    for step in (2, 1):
        # The second failure is in the place of a checkpoint that is committed already.
        try:
            save_both(step)
        except CheckpointError as error:
            message = str(error)
            continue
        return "no error"
    return message


@pytest.mark.parametrize("fault", [_fresh_fails, _part_fails, _link_fails, _manifest_fails])
def test_a_failure_on_one_rank_is_an_error_on_all_and_the_earlier_checkpoint_stays(
    tmp_path: Path, fault: Callable[[Launch], None]
) -> None:
    """Even with keep_last 1, and even where the failing one would have had its name."""
    stored = tmp_path / "store" / "de" / "embedding.00000001.safetensors"
    stored.parent.mkdir(parents=True)
    save_slices(stored, whole("source/de/token", torch.zeros(1)))
    messages = run_ranks(2, _save_with_fault, tmp_path, fault)
    assert messages[0] == messages[1]
    culprit = 1 if fault in (_part_fails, _link_fails) else 0
    assert f"rank {culprit}: the disk: No space left on device" in messages[0]
    assert "earlier checkpoints are intact" in messages[0] and "\n" not in messages[0]
    assert names(tmp_path / "checkpoints") == ["step-00000001"]
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.index.read("token") == 1).all() and len(checkpoint.index.read("token")) == 4
