"""Being asked to stop: SIGTERM on any rank becomes a stop of the whole run at the end of the current step."""

import signal
from types import FrameType

import torch.distributed as dist

_STOP_KEY = "stop-requested"


class StopRequest:
    """Remembers that this process, or any other of the run, was asked to stop.

    A signal may reach one node only, or the launcher may pass it from rank to rank; the launch's store tells everyone.
    """

    def __init__(self, store: dist.Store | None, polls: bool) -> None:
        """`polls`: whether this rank looks at the store each step (one rank a silo suffices)."""
        self._store = store
        self._polls = polls
        self._asked = False
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether to stop; passes the request on the first time."""
        if self._store is None:
            return self._asked
        if self._asked:
            self._store.set(_STOP_KEY, "1")
        elif self._polls and self._store.check([_STOP_KEY]):
            self._asked = True
        return self._asked
