"""The byte ledger: every byte that leaves a rank, counted where it is sent.

A collective is charged what a rank must send for it: an all-to-all its off-rank slices, an all-gather its own slice to
every other rank, an all-reduce 2 (n - 1) / n of its buffer (the ring's and the lower bound alike), a reduce-scatter
(n - 1) / n.
"""

import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, get_args

Scope = Literal["federation", "silo"]
Kind = Literal["body", "embedding", "position", "control", "evaluation", "gradient", "parameter", "activation"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Traced:
    """One collective that this rank took part in; `members`: the launch's ranks it joined (empty: not told)."""

    scope: Scope
    kind: Kind
    operation: str
    members: tuple[int, ...]


class Ledger:
    """Bytes sent by this rank, by (scope, kind), since the last `take`.

    An exchange in the background (`background`) is charged to it too, on a thread of its own.
    `trace`: None, or a list to which every collective is appended, also those that made this rank send nothing.
    """

    def __init__(self) -> None:
        self._bytes: dict[tuple[Scope, Kind], int] = defaultdict(int)
        self._lock = threading.Lock()
        self.trace: list[Traced] | None = None

    def add(
        self,
        scope: Scope,
        kind: Kind,
        sent: int,
        operation: str = "",
        members: tuple[int, ...] = (),
        sent_near: int = 0,
    ) -> None:
        """Charge `sent` bytes; `scope` says which link they crossed: between silos or inside one.

        `sent_near`: bytes of the same collective that went to ranks of this rank's own silo.
        """
        with self._lock:
            self._bytes[scope, kind] += sent
            if sent_near:
                self._bytes["silo", kind] += sent_near
        self.note(scope, kind, operation, members)

    def note(self, scope: Scope, kind: Kind, operation: str, members: tuple[int, ...]) -> None:
        """Trace a collective without charging it."""
        with self._lock:
            if self.trace is not None:
                self.trace.append(Traced(scope, kind, operation, members))

    def take(self) -> dict[str, int]:
        """The counts as {"scope/kind": bytes}, and a fresh start from zero."""
        with self._lock:
            taken = {f"{scope}/{kind}": count for (scope, kind), count in sorted(self._bytes.items())}
            self._bytes.clear()
        return taken


def all_reduce_bytes(payload: int, ranks: int) -> int:
    """Bytes a rank sends in an all-reduce of `payload` bytes over `ranks` ranks."""
    return 2 * payload * (ranks - 1) // ranks


def reduce_scatter_bytes(payload: int, ranks: int) -> int:
    """Bytes a rank sends in a reduce-scatter whose input is `payload` bytes; all-to-all of equal slices alike."""
    return payload * (ranks - 1) // ranks


def all_gather_bytes(own: int, ranks: int) -> int:
    """Bytes a rank sends in an all-gather to which it brings `own` bytes."""
    return own * (ranks - 1)
