"""A silo turns from one source to the next: what the next needs is read while this one trains, and the time is taken.

Which source comes next is known beforehand, in the next round too, for samples are pure in seed and round. What this
round's other turns will still write is not read before it has ended.
"""

import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from megatron_dept.checkpoint.store import SourceStore
from megatron_dept.common.errors import UserError
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
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="source-open")

    def fetch_ahead(self, name: str, cursor: int, written: Collection[str] = ()) -> None:
        """Begin to open source `name`, whose turn comes next at sample `cursor`, and to read what the store has of it.

        Not yet if it is among those still in training, or `written`, in this round.
        """
        if name in written:
            return
        self._opener.submit(self._open, name, cursor)
        reads = (self._broker.ahead(name, self._sources.cards[name].vocabulary_size), self.inner.ahead(name))
        if any(reads):
            self._store.fetch_ahead(name, [read for read in reads if read is not None])

    def _open(self, name: str, cursor: int) -> None:
        # What is wrong with it, its turn finds and says.
        with suppress(UserError, OSError):
            self._sources[name].prepare(cursor)

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
