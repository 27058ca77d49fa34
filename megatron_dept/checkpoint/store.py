"""The source store: what belongs to a source and must outlive its turn, on disk while another source trains.

One directory a source; files are named slices, written under a new version and renamed, never changed, so a checkpoint
can hold them by link. The store needs a file system that every silo a source may visit can reach.

Nobody waits for the disk who need not: `save` hands over to a thread that writes while the next source trains, and
`fetch_ahead` lets another read what the next source's turn will ask for. Of pending writes there are those of one
source at most, and of what was fetched ahead one source's, so memory does not grow with the sources. What goes wrong in
a thread is raised by the call that waits for it.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from megatron_dept.checkpoint.slice_cache import SliceCache, identity
from megatron_dept.checkpoint.slices import SliceIndex, save_slices
from megatron_dept.common.files import flush_to_disk

SOURCE_MARK = "@"
"""Between a source's name and its file's in a checkpoint; no source name holds it."""
LASTING = "vocabulary"
"""The part that a source has before its first turn already, and that never changes."""
Read = Callable[[SliceIndex], object]
"""Reads of a source's index what its turn on this rank will read of it."""


class SourceStore:
    """Files `<directory>/<source>/<part>.<version>.safetensors`; the newest version of each part counts.

    `cache_bytes`: host memory for what was written or read last, so that it need not be read again; 0: none.
    `pinned`: what is read ahead is to go to a GPU.
    """

    def __init__(self, directory: Path, cache_bytes: int = 0, pinned: bool = False) -> None:
        self._directory = directory
        self._cache = SliceCache(cache_bytes)
        self._pins = pinned
        # One thread each, so that a read ahead does not wait until the disk has taken a write.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-read")
        self._pending: list[tuple[str, Future[None]]] = []
        self._lasting: list[Future[None]] = []
        self._ahead: _Ahead | None = None
        self._waited = {"read": 0.0, "write": 0.0}

    def save(self, source: str, part: str, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a new version of one part and drop the older ones, in the background. Parts are of one rank each.

        `tensors` are copied before it returns. Waits for what is still to be written of other sources; `flush` waits
        for this. Raises `CheckpointError` where an earlier write was refused.
        """
        self._wait(lambda other: other != source)
        if self._ahead is not None and self._ahead.source == source:
            self._ahead = None
        copies = {key: value.clone() for key, value in tensors.items()}
        self._pending.append((source, self._writer.submit(self._write, source, part, version, copies)))

    def keep(self, source: str, make: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write what never changes of a source, if it is not there yet, in the background, where `make` makes it."""

        def write() -> None:
            if not any((self._directory / source).glob(f"{LASTING}.*.safetensors")):
                self._write(source, LASTING, 0, dict(make()))

        self._lasting.append(self._writer.submit(write))

    def flush(self) -> None:
        """Wait until all that was saved would survive a power cut; `CheckpointError` where any of it was refused."""
        self._pending += [("", future) for future in self._lasting]
        self._lasting = []
        self._wait(lambda _: True)

    def close(self) -> None:
        """`flush`, and end the threads."""
        try:
            self.flush()
        finally:
            self._writer.shutdown()
            self._reader.shutdown()

    def take_waits(self) -> dict[str, float]:
        """Seconds that this rank has stood waiting for a "read" or a "write" since the last call."""
        waited = dict(self._waited)
        self._waited.update(read=0.0, write=0.0)
        return waited

    def fetch_ahead(self, source: str, reads: Iterable[Read]) -> None:
        """Begin to read in the background what the next turn will ask of `source`; of one source at a time.

        What has been written by any rank since, when the turn comes, is read anew.
        """
        if self._ahead is not None and self._ahead.source == source and not self._ahead.taken:
            return
        self._ahead = None  # freed before the next is read
        self._ahead = _Ahead(source)
        self._ahead.job = self._reader.submit(self._read_ahead, self._ahead, tuple(reads))

    def index(self, source: str) -> SliceIndex | None:
        """What is stored of a source, or None before its first turn. What was fetched ahead comes from memory."""
        self._wait(lambda own: own == source)
        ahead = self._ahead
        with _Clock(self._waited, "read"):
            if ahead is None or ahead.source != source:
                return self._open(source)
            ahead.taken = True
            return self._taken(ahead)

    def has(self, source: str) -> bool:
        """Whether a source has had a turn."""
        self._wait(lambda own: own == source)
        return bool(self._turns(source))

    def files(self, source: str) -> list[Path]:
        """The current files of a source, those that it has before its first turn included.

        Of a part written by several ranks (`inner-0`, `inner-1`, ...) only the newest version counts, so pieces from a
        layout of more ranks do not outlive it.
        """
        self._wait(lambda own: own == source)
        return self._listed(source)

    def restore(self, directory: Path, files: Iterable[str]) -> None:
        """Put the store back to what a checkpoint's linked `files` hold; of other times' files nothing stays."""
        self.clear()
        for name in files:
            source, mark, own_name = name.partition(SOURCE_MARK)
            if mark:
                target = self._directory / source / own_name
                target.parent.mkdir(parents=True, exist_ok=True)
                # Never copied over: a file that is there may be one that checkpoints hold by link.
                target.unlink(missing_ok=True)
                try:
                    os.link(directory / name, target)
                except OSError:
                    shutil.copyfile(directory / name, target)
                    flush_to_disk(target)

    def clear(self) -> None:
        """Forget everything: a run that starts anew."""
        self.flush()
        self._ahead = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def _listed(self, source: str) -> list[Path]:
        files = sorted((self._directory / source).glob("*.safetensors"))
        newest: dict[str, str] = {}
        for file in files:
            part, version, _ = file.name.split(".")
            newest[_family(part)] = max(newest.get(_family(part), ""), version)
        return [file for file in files if file.name.split(".")[1] == newest[_family(file.name.split(".")[0])]]

    def _open(self, source: str) -> "_StoredSlices | None":
        files = self._turns(source)
        return _StoredSlices(files, self._cache, self._waited) if files else None

    def _turns(self, source: str) -> list[Path]:
        """The current files that turns of the source have left."""
        return [file for file in self._listed(source) if not file.name.startswith(f"{LASTING}.")]

    def _wait(self, which: Callable[[str], bool]) -> None:
        """Wait for the pending writes of the sources that are `which`; raises what the first refused one met with."""
        with _Clock(self._waited, "write"):
            waiting = [each for each in self._pending if which(each[0])]
            self._pending = [each for each in self._pending if not which(each[0])]
            failed = [error for _, future in waiting if (error := future.exception()) is not None]
        if failed:
            raise failed[0]

    def _write(self, source: str, part: str, version: int, tensors: dict[str, Tensor]) -> None:
        folder = self._directory / source
        folder.mkdir(parents=True, exist_ok=True)
        for remains in folder.glob(f"{part}.*.tmp"):
            remains.unlink()  # of a run that was killed while it wrote
        target = folder / f"{part}.{version:08d}.safetensors"
        temporary = target.with_suffix(".tmp")
        save_slices(temporary, tensors)
        os.replace(temporary, target)
        flush_to_disk(folder)
        for old in folder.glob(f"{part}.*.safetensors"):
            if old != target:
                old.unlink()
        written = identity(target)
        for key, tensor in tensors.items():
            self._cache.put(written, key, tensor)

    def _read_ahead(self, ahead: "_Ahead", reads: tuple[Read, ...]) -> None:
        if self._ahead is ahead:  # else nobody will ask for it any more
            ahead.index = self._open(ahead.source)
            if ahead.index is not None:
                ahead.index.fetch(reads, self._pins)

    def _taken(self, ahead: "_Ahead") -> SliceIndex | None:
        """What was fetched ahead, if the files are still those that it was read from; else these, read anew."""
        error = ahead.job.exception() if ahead.job is not None else None
        now = {file: identity(file) for file in self._turns(ahead.source)}
        if ahead.index is None or ahead.index.files != now:
            return self._open(ahead.source)
        if error is not None:
            self._ahead = None
            raise error
        return ahead.index


class _Ahead:
    """What is being read ahead of one source."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.job: Future[None] | None = None
        self.index: _StoredSlices | None = None
        self.taken = False
        """Its turn has come; what it has not asked for yet, it may still."""


class _StoredSlices(SliceIndex):
    """A source's slices, from memory where they were fetched ahead or are cached; counts what its readers wait."""

    def __init__(self, files: Iterable[Path], cache: SliceCache, waited: dict[str, float]) -> None:
        self._cache = cache
        self._waited = waited
        self._fetched: dict[tuple[str, int, int | None], Tensor] = {}
        self._fetching = False
        self.files = {file: identity(file) for file in files}
        """As they were when they were opened."""
        super().__init__(self.files)

    def fetch(self, reads: Iterable[Read], pins: bool) -> None:
        """Run `reads`, and keep what they read for whoever reads the same next; in pinned memory where `pins`."""
        self._fetching = True
        for read in reads:
            read(self)
        self._fetching = False
        if pins:
            self._fetched = {key: value.pin_memory() for key, value in self._fetched.items()}

    def read(self, path: str, start: int = 0, stop: int | None = None) -> Tensor:
        key = (path, start, stop)
        if self._fetching:
            self._fetched[key] = super().read(path, start, stop)
            return self._fetched[key]
        with _Clock(self._waited, "read"):
            # Given away, not kept: what is trained is no copy.
            return self._fetched.pop(key) if key in self._fetched else super().read(path, start, stop)

    def _rows(self, file: Path, key: str, first: int, last: int | None) -> Tensor:
        if not self._cache.capacity:
            return super()._rows(file, key, first, last)
        entry = self._cache.get(self.files[file], key)
        if entry is None:
            entry = super()._rows(file, key, 0, None)
            self._cache.put(self.files[file], key, entry)
        return entry[first:last].clone()


class _Clock:
    """Adds the time spent inside to one of a dictionary's counts."""

    def __init__(self, counts: dict[str, float], kind: str) -> None:
        self._counts, self._kind = counts, kind

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._counts[self._kind] = self._counts.get(self._kind, 0.0) + time.perf_counter() - self._began


def _family(part: str) -> str:
    return part.partition("-")[0]
