"""The source store: the newest version of each part counts, and a checkpoint puts it back to what it was."""

from pathlib import Path

import torch

from megatron_dept.checkpoint.slices import SliceIndex, whole
from megatron_dept.checkpoint.store import SOURCE_MARK, SourceStore


def save(store: SourceStore, source: str, part: str, version: int, value: float = 0.0) -> None:
    store.save(source, part, version, whole(f"{part}/value", torch.full((1,), value)))


def files(store: SourceStore, source: str) -> list[str]:
    return [file.name for file in store.files(source)]


def test_a_source_has_nothing_before_its_first_turn(tmp_path: Path) -> None:
    store = SourceStore(tmp_path / "store")
    assert store.index("de") is None and store.files("de") == []


def test_a_new_version_replaces_the_older_ones(tmp_path: Path) -> None:
    store = SourceStore(tmp_path)
    for version in (1, 2, 10):
        save(store, "de", "embedding", version, float(version))
    assert sorted(path.name for path in (tmp_path / "de").iterdir()) == ["embedding.00000010.safetensors"]
    index = store.index("de")
    assert index is not None and index.read("embedding/value").item() == 10


def test_sources_and_parts_do_not_touch_each_other(tmp_path: Path) -> None:
    store = SourceStore(tmp_path)
    save(store, "de", "embedding", 1)
    save(store, "de", "inner-0", 3)
    save(store, "de.wiki", "embedding", 2)
    assert files(store, "de") == ["embedding.00000001.safetensors", "inner-0.00000003.safetensors"]
    assert files(store, "de.wiki") == ["embedding.00000002.safetensors"]


def test_pieces_of_a_wider_layout_do_not_outlive_it(tmp_path: Path) -> None:
    """Two data ranks wrote inner-0 and inner-1; then one alone wrote inner-0 anew: inner-1 is of another time."""
    store = SourceStore(tmp_path)
    save(store, "de", "inner-0", 1)
    save(store, "de", "inner-1", 1)
    save(store, "de", "embedding", 1)
    save(store, "de", "inner-0", 2)
    assert files(store, "de") == ["embedding.00000001.safetensors", "inner-0.00000002.safetensors"]


def test_restoring_leaves_exactly_what_the_checkpoint_links(tmp_path: Path) -> None:
    store = SourceStore(tmp_path / "store")
    save(store, "de", "embedding", 1, 1.0)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in store.files("de"):
        (checkpoint / f"de{SOURCE_MARK}{file.name}").hardlink_to(file)
    (checkpoint / "part-00000.safetensors").write_bytes(b"of no source")
    save(store, "de", "embedding", 2, 2.0)
    save(store, "fr", "embedding", 2, 2.0)
    store.restore(checkpoint, [file.name for file in checkpoint.iterdir()])
    assert store.files("fr") == [] and files(store, "de") == ["embedding.00000001.safetensors"]
    index = store.index("de")
    assert index is not None and index.read("embedding/value").item() == 1.0


def test_what_is_trained_after_a_restore_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    """The same version is written again, under the same name, over a file that the checkpoint holds by link."""
    store = SourceStore(tmp_path / "store")
    save(store, "de", "embedding", 1, 1.0)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    held = checkpoint / f"de{SOURCE_MARK}embedding.00000001.safetensors"
    held.hardlink_to(store.files("de")[0])
    store.restore(checkpoint, [held.name])
    save(store, "de", "embedding", 1, 5.0)
    assert SliceIndex([held]).read("embedding/value").item() == 1.0
    index = store.index("de")
    assert index is not None and index.read("embedding/value").item() == 5.0
