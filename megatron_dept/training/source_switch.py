"""A silo turns from one source to the next: what the next needs is read while this one trains, and the time is taken.

Which source comes next is known beforehand, in the next round too, for samples are pure in seed and round. What this
round's other turns will still write is not read before it has ended.
"""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from megatron_dept.checkpoint.store import SourceStore
from megatron_dept.training.embeddings import EmbeddingBroker
from megatron_dept.training.inner_state import InnerState
from megatron_dept.training.sources import SourceSet


class SourceSwitch:
    """Of one rank. `inner` is the body's inner optimizer state, which turns with the source."""

    def __init__(self, sources: SourceSet, store: SourceStore, broker: EmbeddingBroker, inner: InnerState) -> None:
        self.inner = inner
        self._sources = sources
        self._store = store
        self._broker = broker
        self._seconds = 0.0

    def fetch_ahead(self, name: str | None, written: Collection[str] = ()) -> None:
        """Begin to read what source `name`, whose turn comes next, has in the store; not if it is still `written`."""
        if name is None or name in written or name not in self._sources.cards:
            return
        reads = (self._broker.ahead(name, self._sources.cards[name].vocabulary_size), self.inner.ahead(name))
        if any(reads):
            self._store.fetch_ahead(name, [read for read in reads if read is not None])

    def flush(self) -> None:
        """Wait until what turns have left is on disk, for other ranks to read; `CheckpointError` where it is not."""
        self._store.flush()

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Counts the time inside as spent on a switch."""
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def take_seconds(self) -> dict[str, float]:
        """Since the last call: "total" seconds of this rank's switches, of them waited for a "read" and a "write".

        The wait at a round's end until all is written counts too.
        """
        seconds, self._seconds = self._seconds, 0.0
        return {"total": seconds, **self._store.take_waits()}
