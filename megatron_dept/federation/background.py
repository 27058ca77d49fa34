"""Work on a thread of its own, which may block on a peer that is gone while the main thread watches for that."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from megatron_dept.common.errors import FederationError


class Job(threading.Thread):
    """One piece of work; `result` is what it returned, or None where `fault` says why it failed."""

    def __init__(self, work: Callable[[], Any], device: torch.device) -> None:
        super().__init__(name="exchange", daemon=True)
        self._work = work
        self._device = device
        self._error: Exception | None = None
        self.result: Any = None

    def run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self.result = self._work()
        except Exception as error:
            self._error = error

    def outcome(self) -> Any:
        """Wait for the work and return what it returned; an error in it is raised here, as if the caller had made it.

        Signals are handled meanwhile.
        """
        self.join()
        if self._error is not None:
            raise self._error
        return self.result

    @property
    def fault(self) -> str | None:
        """What the network made of ended work; any other error is raised."""
        if self._error is not None and not isinstance(self._error, FederationError | RuntimeError):
            raise self._error
        return None if self._error is None else str(self._error)
