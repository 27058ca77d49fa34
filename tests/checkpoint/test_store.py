"""The source store: the newest version of each part counts, whole or not at all, and a checkpoint puts it back to what
it was; writing and reading go on in the background, and what fails there is said by whoever waits for it."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dept.checkpoint import store as module
from megatron_dept.checkpoint.slice_cache import SliceCache, identity
from megatron_dept.checkpoint.slices import SliceIndex, save_slices, whole
from megatron_dept.checkpoint.store import SOURCE_MARK, SourceStore
from megatron_dept.common.errors import CheckpointError
from megatron_dept.topology.launch import Launch
from tests.support.distributed import run_ranks


def save(store: SourceStore, source: str, part: str, version: int, value: float = 0.0) -> None:
    store.save(source, part, version, whole(f"{part}/value", torch.full((1,), value)))
    store.flush()


def value(store: SourceStore, source: str = "de", part: str = "embedding") -> float:
    index = store.index(source)
    assert index is not None
    return index.read(f"{part}/value").item()


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


class Held:
    """Holds back what the store's threads do until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], name: str) -> None:
        self.let_go, self.begun = threading.Event(), threading.Event()

        def held(*arguments: Any, **options: Any) -> Any:
            self.begun.set()
            assert self.let_go.wait(10)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, held)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch, save_slices, "save_slices")
    yield held
    held.let_go.set()


def test_saving_does_not_wait_for_the_disk_and_takes_a_copy(tmp_path: Path, writes: Held) -> None:
    store = SourceStore(tmp_path)
    tensor = torch.ones(3)
    store.save("de", "embedding", 1, whole("embedding/value", tensor))
    assert writes.begun.wait(10) and not list(tmp_path.glob("de/*"))
    tensor.zero_()  # the next source trains in this memory
    writes.let_go.set()
    index = store.index("de")
    assert index is not None and index.read("embedding/value").tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "wait",
    [
        lambda store: store.flush(),
        lambda store: store.index("de"),
        lambda store: store.has("de"),
        lambda store: store.files("de"),
        lambda store: store.save("fr", "embedding", 1, {}),
        lambda store: store.close(),
    ],
    ids=["flush", "its turn", "has", "a checkpoint's list", "another source's save", "close"],
)
def test_who_must_wait_for_a_write_does(tmp_path: Path, writes: Held, wait: Callable[[SourceStore], object]) -> None:
    store = SourceStore(tmp_path)
    store.save("de", "embedding", 1, whole("embedding/value", torch.ones(1)))
    waiting = threading.Thread(target=wait, args=(store,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive(), "it did not wait"
    writes.let_go.set()
    waiting.join(10)
    assert not waiting.is_alive() and files(store, "de") == ["embedding.00000001.safetensors"]
    assert store.take_waits()["write"] > 0.04 and store.take_waits()["write"] < 0.01


def test_another_sources_turn_does_not_wait_for_a_write(tmp_path: Path, writes: Held) -> None:
    store = SourceStore(tmp_path)
    store.save("de", "embedding", 1, whole("embedding/value", torch.ones(1)))
    assert store.index("fr") is None and not store.has("fr")
    assert not writes.let_go.is_set()


STEPS = {
    "the file's bytes": "save_slices",
    "the renaming": "replace",
    "the directory's names": "flush_to_disk",
    "the older version's removal": "unlink",
}


def broken_at(step: str, how: Callable[[], object]) -> Callable[[Any], None]:
    """Make the store's next write end at a step: before it, but for the bytes, of which half are written."""

    def end(*_: Any, **__: Any) -> None:
        how()

    def half(path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"half")
        how()

    def patch(monkeypatch: Any) -> None:
        if step == "save_slices":
            monkeypatch.setattr(module, step, half)
        elif step == "flush_to_disk":
            monkeypatch.setattr(module, step, end)
        else:
            monkeypatch.setattr(*((os, step, end) if step == "replace" else (Path, step, end)))

    return patch


def refuse() -> None:
    raise CheckpointError("no space")


def check_after(store: SourceStore, step: str) -> None:
    """What is there is one version, whole; and the store goes on."""
    assert value(store) == (1.0 if step in ("save_slices", "replace") else 2.0)
    save(store, "de", "embedding", 3, 3.0)
    assert value(store) == 3.0 and files(store, "de") == ["embedding.00000003.safetensors"]
    assert not list((store.files("de")[0].parent).glob("*.tmp")), "what a broken write left is swept"


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_write_that_is_refused_is_told_and_leaves_one_whole_version(tmp_path, monkeypatch, step):
    store = SourceStore(tmp_path)
    save(store, "de", "embedding", 1, 1.0)
    with monkeypatch.context() as patched:
        broken_at(step, refuse)(patched)
        store.save("de", "embedding", 2, whole("embedding/value", torch.full((1,), 2.0)))
        with pytest.raises(CheckpointError, match="no space"):
            store.flush()
    store.flush()  # told once
    check_after(store, step)


def die_while_writing(launch: Launch, directory: Path, step: str) -> None:
    store = SourceStore(directory)
    save(store, "de", "embedding", 1, 1.0)
    broken_at(step, lambda: os._exit(1))(pytest.MonkeyPatch())
    store.save("de", "embedding", 2, whole("embedding/value", torch.full((1,), 2.0)))
    store.flush()


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_rank_killed_while_it_writes_leaves_one_whole_version(tmp_path, step):
    assert run_ranks(1, die_while_writing, tmp_path, step, may_die=[0]) == [None]
    check_after(SourceStore(tmp_path), step)


@pytest.mark.parametrize("offset", [-1, -4, 60], ids=["last byte", "first byte", "header"])
@pytest.mark.parametrize("ahead", [False, True], ids=["read", "fetched ahead"])
def test_a_flipped_byte_is_found(tmp_path: Path, offset: int, ahead: bool) -> None:
    store = SourceStore(tmp_path)
    save(store, "de", "embedding", 1, 1.0)
    (file,) = store.files("de")
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)
    if ahead:
        store.fetch_ahead("de", [lambda index: index.read("embedding/value")])
    with pytest.raises(CheckpointError) as refused:
        value(store)
    assert str(refused.value).startswith(str(file)) and "earlier" in str(refused.value)
    if offset < 0:
        assert "embedding/value@0 has checksum " in str(refused.value) and ", not " in str(refused.value)


def reads_counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which threads read entries from files."""
    readers: list[str] = []
    original = SliceIndex._rows

    def counted(*arguments: Any) -> Any:
        readers.append(threading.current_thread().name)
        return original(*arguments)

    monkeypatch.setattr(SliceIndex, "_rows", counted)
    return readers


def fetch(store: SourceStore) -> None:
    store.fetch_ahead("de", [lambda index: index.read("embedding/value")])


def test_what_was_fetched_ahead_is_not_read_again(tmp_path, monkeypatch):
    store = SourceStore(tmp_path)
    save(store, "de", "embedding", 1, 1.0)
    readers = reads_counted(monkeypatch)
    fetch(store)
    fetch(store)
    assert store.index("fr") is None, "another source's look-up takes nothing away"
    assert value(store) == 1.0
    assert len(readers) == 1 and readers[0].startswith("store-read")
    assert value(store) == 1.0 and readers[1] == "MainThread", "it is given away once: what is trained is no copy"


@pytest.mark.parametrize("by", ["this rank", "another rank", "another rank, under the same name"])
def test_what_was_written_since_it_was_fetched_is_read_anew(tmp_path, by):
    store, other = SourceStore(tmp_path), SourceStore(tmp_path)
    save(store, "de", "embedding", 1, 1.0)
    fetch(store)
    assert store._ahead is not None and store._ahead.job is not None
    store._ahead.job.result()
    writer = store if by == "this rank" else other
    save(writer, "de", "embedding", 1 if by.endswith("same name") else 2, 2.0)
    assert value(store) == 2.0


def test_a_source_that_has_its_first_turn_elsewhere_after_it_was_fetched(tmp_path):
    store = SourceStore(tmp_path)
    fetch(store)
    save(SourceStore(tmp_path), "de", "embedding", 1, 1.0)
    assert value(store) == 1.0


def test_a_failed_read_ahead_is_told_by_the_turn(tmp_path):
    store = SourceStore(tmp_path)
    save(store, "de", "embedding", 1, 1.0)
    store.fetch_ahead("de", [lambda index: index.read("embedding/other")])
    with pytest.raises(CheckpointError, match="has no tensor embedding/other"):
        store.index("de")
    assert value(store) == 1.0


@pytest.mark.parametrize("bytes, read_again", [(0, 2), (4, 0), (3, 2)], ids=["none", "enough", "too small"])
def test_the_cache_spares_reading_what_was_just_written(tmp_path, monkeypatch, bytes, read_again):
    store = SourceStore(tmp_path, bytes)
    save(store, "de", "embedding", 1, 1.0)
    readers = reads_counted(monkeypatch)
    index = store.index("de")
    assert index is not None
    index.read("embedding/value").zero_()  # what is given is a copy: the cache's own is not trained
    assert value(store) == 1.0 and len(readers) == read_again


def test_the_cache_lets_go_of_what_was_used_longest_ago(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    file, cache = identity(tmp_path / "file"), SliceCache(8)
    for key in ("a", "b"):
        cache.put(file, key, torch.zeros(1))
    assert cache.get(file, "a") is not None
    cache.put(file, "c", torch.zeros(1))
    cache.put(file, "c", torch.zeros(1))
    assert cache.get(file, "b") is None and cache.get(file, "a") is not None and cache.bytes == 8


def test_the_cache_knows_a_file_that_was_written_again(tmp_path: Path) -> None:
    store = SourceStore(tmp_path, 1 << 10)
    save(store, "de", "embedding", 1, 1.0)
    save(SourceStore(tmp_path), "de", "embedding", 1, 2.0)
    assert value(store) == 2.0


def test_what_lasts_is_written_once_and_is_no_turn(tmp_path: Path) -> None:
    store = SourceStore(tmp_path)
    for attempt in (1.0, 2.0):
        store.keep("de", lambda attempt=attempt: whole("vocabulary/de", torch.full((1,), attempt)))
        store.flush()
    assert store.index("de") is None and not store.has("de")
    assert files(store, "de") == ["vocabulary.00000000.safetensors"]
    assert SliceIndex(store.files("de")).read("vocabulary/de").item() == 1.0


def test_no_thread_or_open_file_stays_behind(tmp_path: Path) -> None:
    threads, opened = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        store = SourceStore(tmp_path, 1 << 10)
        for version in range(20):
            fetch(store)
            store.index("de")
            store.save("de", "embedding", version, whole("embedding/value", torch.ones(1)))
        store.close()
    assert set(threading.enumerate()) <= threads and len(os.listdir("/proc/self/fd")) <= opened
