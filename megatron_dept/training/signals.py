"""Being asked to stop: SIGTERM (or Ctrl-C) on any rank is a stop of the whole run at the end of the current step."""

import signal
from types import FrameType

import torch.distributed as dist

from megatron_dept.common.errors import LostPeerError, first_line

_STOP_KEY = "stop-requested"


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
        """Whether to stop; passes the request on. Raises `LostPeerError` where the launch's store is gone."""
        if self._store is None:
            return self._asked
        try:
            if self._asked:
                self._store.set(_STOP_KEY, "1")
            elif self._polls and self._store.check([_STOP_KEY]):
                self._asked = True
        except RuntimeError as error:
            raise LostPeerError(f"the launch's rank 0, which keeps its store, is gone ({first_line(error)})") from error
        return self._asked
