"""The byte ledger: every byte that leaves a rank, counted where it is sent.

A collective is charged what a rank must send for it: an all-to-all its off-rank slices, an all-gather its own slice to
every other rank, an all-reduce 2 (n - 1) / n of its buffer (the ring's and the lower bound alike), a reduce-scatter
(n - 1) / n.
"""

from collections import defaultdict
from typing import Literal, get_args

Scope = Literal["federation", "silo"]
Kind = Literal["body", "embedding", "position", "control", "evaluation", "gradient", "parameter"]
KINDS: tuple[str, ...] = get_args(Kind)


class Ledger:
    """Bytes sent by this rank, by (scope, kind), since the last `take`."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[Scope, Kind], int] = defaultdict(int)

    def add(self, scope: Scope, kind: Kind, sent: int) -> None:
        """Charge `sent` bytes; `scope` says which link they crossed: between silos or inside one."""
        self._bytes[scope, kind] += sent

    def take(self) -> dict[str, int]:
        """The counts as {"scope/kind": bytes}, and a fresh start from zero."""
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
