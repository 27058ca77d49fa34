"""Being asked to stop, and learning that another rank has failed.

SIGTERM (or Ctrl-C) on any rank becomes a stop of the whole run at the end of the current step. A failure of any rank
ends all of them, also where they share no collective for hours.
"""

import os
import signal
import sys
import threading
from types import FrameType

import torch.distributed as dist

from megatron_dept.common.errors import EXIT_USER_ERROR, FederationError

_STOP_KEY = "stop-requested"
_FAILED_KEY = "rank-failed"
POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""After another rank's failure the main thread has this long to find out itself and leave in good order."""


class StopRequest:
    """Remembers that this process, or any other of the run, was asked to stop.

    A signal may reach one node only, or the launcher may pass it from rank to rank; the launch's store tells everyone.
    A second Ctrl-C ends the process at once.
    """

    def __init__(self, store: dist.Store | None, polls: bool) -> None:
        """`polls`: whether this rank looks at the store each step (one rank a silo suffices)."""
        self._store = store
        self._polls = polls
        self._asked = False
        self._interrupted = False
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether to stop; passes the request on. Raises `FederationError` where the launch's store is gone."""
        if self._store is None:
            return self._asked
        try:
            if self._asked:
                self._store.set(_STOP_KEY, "1")
            elif self._polls and self._store.check([_STOP_KEY]):
                self._asked = True
        except RuntimeError as error:
            raise FederationError(
                f"the launch's rank 0, which keeps its store, is gone ({str(error).strip().splitlines()[0]}); look at "
                "that rank's log, then start again: the run resumes from its last checkpoint"
            ) from error
        return self._asked


class FailureWatch:
    """Ends this process when any rank of the launch has failed, whatever the main thread is waiting for.

    A rank deep in its local steps meets the other silos hours later, and one inside a GPU collective whose peer has
    died may never return to Python: a thread of its own looks at the launch's store. Rank 0 gone, and its store with
    it, is a failure too.
    """

    def __init__(self, store: dist.Store | None, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._done = threading.Event()
        if store is not None:
            threading.Thread(target=self._watch, name="failure watch", daemon=True).start()

    def close(self) -> None:
        """The run has ended well: what ranks do from here on is no failure."""
        self._done.set()

    def tell(self, message: str) -> None:
        """Tell all ranks that this one has failed; a store that is gone has told them already."""
        self._done.set()
        if self._store is not None:
            try:
                self._store.set(_FAILED_KEY, f"rank {self._rank}: {message}")
            except RuntimeError:
                return

    def _watch(self) -> None:
        assert self._store is not None
        while not self._done.wait(POLL_SECONDS):
            try:
                if not self._store.check([_FAILED_KEY]):
                    continue
                message = self._store.get(_FAILED_KEY).decode()
            except RuntimeError:
                message = "rank 0, which keeps the launch's store, is gone"
            if self._done.wait(GRACE_SECONDS):
                return
            sys.stderr.write(f"error: rank {self._rank}: ended because another rank failed ({message})\n")
            sys.stderr.flush()
            os._exit(EXIT_USER_ERROR)
