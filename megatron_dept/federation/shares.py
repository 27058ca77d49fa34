"""How a partition of the body is cut for its exchange: a share for each silo, each share in buckets; what that sends.

Arithmetic alone, so that bytes and memory can be foretold without torch. `buckets` moves them.
Shapes: `n` elements of the partition, `S` silos, `m` elements of one share in one bucket.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dept.common.errors import FederationError
from megatron_dept.common.sizes import FP32_BYTES
from megatron_dept.ops.wires import BLOCK, Wire, wire_bytes

ELEMENT_BYTES: Mapping[Wire, int] = {"fp32": 4, "bf16": 2, "int8": 1}
"""Of an element on the wire; int8 has scales besides."""
ALONE_MB = 1.0
SLOTS = 3
"""Buckets under way at once: one is packed, one's deltas travel, one's answer does."""


@dataclass(frozen=True)
class Packing:
    """What travels (`outer.wire`), and megabytes of fp32 deltas, all silos' shares together, of one bucket."""

    wire: Wire = "fp32"
    bucket_mb: float = 32.0


def refuse_packed(packing: Packing) -> None:
    """`FederationError` where anything but fp32 is asked of silos that are cut differently."""
    if packing.wire != "fp32":
        raise FederationError(
            f"dept.outer.wire {packing.wire}, but these silos have different shapes: elements that go by their names "
            "travel as fp32; set dept.outer.wire: fp32, or give all silos one shape"
        )


def share_size(partition: int, silos: int) -> int:
    """Elements of the share that each silo owns of a partition of `partition` elements; the last ones own less."""
    return -(-partition // silos)


@dataclass(frozen=True)
class Shares:
    """A partition of `partition` elements cut over `silos`, each share in buckets of `bucket` elements at most.

    Buckets begin at multiples of int8's blocks, so that no number depends on their size.
    """

    partition: int
    silos: int
    bucket: int

    @classmethod
    def cut(cls, partition: int, silos: int, bucket_mb: float) -> "Shares":
        """`bucket_mb`: see `Packing`; alone, where nothing travels, never more than `ALONE_MB`."""
        elements = int((bucket_mb if silos > 1 else min(bucket_mb, ALONE_MB)) * 1e6) // FP32_BYTES // silos
        return cls(partition, silos, max(BLOCK, elements // BLOCK * BLOCK))

    @property
    def share(self) -> int:
        return share_size(self.partition, self.silos)

    @property
    def buckets(self) -> int:
        return -(-self.share // self.bucket)

    @property
    def longest(self) -> int:
        """Elements of a share in its largest bucket."""
        return min(self.bucket, self.share)

    def of(self, silo: int) -> slice:
        """Where a silo's share lies in the partition; the last ones may be cut short or empty."""
        start = min(silo * self.share, self.partition)
        return slice(start, min(start + self.share, self.partition))

    def place(self, silo: int, bucket: int) -> slice:
        """Where a silo's part of a bucket lies in the partition."""
        own = self.of(silo)
        start = min(own.start + bucket * self.bucket, own.stop)
        return slice(start, min(start + self.bucket, own.stop))


def exchange_bytes(partition: int, silos: int, rank: int, wire: Wire = "fp32") -> int:
    """Bytes that the rank in silo `rank` sends in a round: to each owner its deltas, to everyone what it owns."""
    shares = Shares(partition, silos, BLOCK)
    of_silo = [wire_bytes(length(shares.of(silo)), wire) for silo in range(silos)]
    return sum(of_silo) - of_silo[rank] + (silos - 1) * of_silo[rank]


def ring_bytes(shares: Shares, wire: Wire) -> int:
    """Bytes of the buffers that buckets travel in."""
    return min(SLOTS, shares.buckets) * 2 * shares.silos * wire_bytes(shares.longest, wire)


def length(place: slice) -> int:
    """Elements of a stretch of the partition."""
    return place.stop - place.start
