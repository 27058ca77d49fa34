"""Collectives under way, between `Communicator.start_...` and the `wait` for them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from megatron_dept.federation.ledger import Kind


class Pending(Protocol):
    """A collective under way: its tensors may be touched again once `wait` has returned, or raised what went wrong.

    On a GPU what is queued after `wait` comes after the collective; the host does not stop.
    """

    def wait(self) -> object: ...


class Done:
    """Nothing is under way."""

    def wait(self) -> None:
        return None


class Counted:
    """A collective under way that is charged, and whose failure is told, as those that are waited for at once."""

    def __init__(
        self,
        pending: Pending,
        translated: Callable[[Kind], AbstractContextManager[None]],
        kind: Kind,
        charge: Callable[[], None],
    ) -> None:
        self._pending = pending
        self._translated = translated
        self._kind: Kind = kind
        self._charge = charge

    def wait(self) -> None:
        with self._translated(self._kind):
            self._pending.wait()
        self._charge()


class Messages:
    """Messages between pairs of ranks under way; `staged`: what was received in host memory, and where it goes."""

    def __init__(self, works: Sequence[Pending], staged: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._works = works
        self._staged = staged

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        for target, reached in self._staged:
            target.copy_(reached)
