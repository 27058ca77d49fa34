"""A bounded cache of files' entries in host memory: the least recently used go first."""

import threading
from collections import OrderedDict
from pathlib import Path

from torch import Tensor

Identity = tuple[str, int, int, int]
"""A file as it was written once: its path, inode, time and size. Names alone come again when a round is repeated."""


def identity(file: Path) -> Identity:
    """Of the file as it is now."""
    found = file.stat()
    return str(file), found.st_ino, found.st_mtime_ns, found.st_size


class SliceCache:
    """Entries by file and key, at most `capacity` bytes in all. Threads may share it; nobody changes its tensors."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._entries: OrderedDict[tuple[Identity, str], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: Identity, key: str) -> Tensor | None:
        """The entry, not to be changed; None where the cache does not have it."""
        with self._lock:
            found = self._entries.get((file, key))
            if found is not None:
                self._entries.move_to_end((file, key))
            return found

    def put(self, file: Identity, key: str, entry: Tensor) -> None:
        """Keep an entry, and let go of those used longest ago; one that is larger than the cache is not kept."""
        if entry.nbytes > self.capacity:
            return
        with self._lock:
            before = self._entries.pop((file, key), None)
            self.bytes += entry.nbytes - (before.nbytes if before is not None else 0)
            self._entries[(file, key)] = entry
            while self.bytes > self.capacity:
                _, oldest = self._entries.popitem(last=False)
                self.bytes -= oldest.nbytes
