"""How a partition of the body travels between silos: in buckets, so that packing, wire and unpacking overlap.

Every silo owns a share of the partition; bucket b covers the b-th stretch of every share. Deltas of a bucket go to
their owners (all-to-all), what the owners make of them goes back to everyone (all-gather). While one bucket's deltas
are on their way, the next is packed and the one before unpacked.
Shapes: `n` elements of the partition, `S` silos, `m` elements of one share in one bucket.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dept.federation.communicator import Communicator
from megatron_dept.federation.shares import SLOTS, Shares, length
from megatron_dept.ops.wires import Wire, wire_bytes


class Ring:
    """Buffers for a few buckets, used again and again: memory is bounded by buckets, not by the partition."""

    def __init__(self, shares: Shares, wire: Wire, device: torch.device) -> None:
        self.slots = min(SLOTS, shares.buckets)
        row = shares.silos * wire_bytes(shares.longest, wire)
        self._flat = torch.empty(self.slots, 2, row, dtype=torch.uint8, device=device)

    def lanes(self, bucket: int) -> tuple[Tensor, Tensor]:
        """A bucket's two buffers, uint8 [S * wire_bytes]: of what goes out (and of the answers), and of what comes."""
        lanes = self._flat[bucket % self.slots]
        return lanes[0], lanes[1]


Pack = Callable[[slice, Tensor], None]
"""(elements of the partition, uint8 [wire_bytes(m)] to fill with their deltas)."""
Settle = Callable[[slice, Tensor, Tensor], None]
"""(own elements, what came: uint8 [S or 1, wire_bytes(m)], uint8 [wire_bytes(m)] to fill with the answer to all).

One row where it was summed on the way."""
Apply = Callable[[slice, Tensor], None]
"""(elements of the partition, their owner's answer: uint8 [wire_bytes(m)])."""


def travel(
    peers: Communicator,
    shares: Shares,
    wire: Wire,
    ring: Ring,
    pack: Pack,
    settle: Settle,
    apply: Apply,
    landing: Tensor,
) -> None:
    """Exchange a whole partition, bucket by bucket. Collective; every rank calls it with the same shares and wire.

    `landing`: fp32 [n]. What others answer in fp32 is received there, where `apply` would put it.
    """
    passages = [_Passage(peers, shares, wire, ring, bucket, landing) for bucket in range(shares.buckets)]
    for step in range(shares.buckets + 2):
        if step < shares.buckets:
            passages[step].send(pack)
        if 0 <= step - 1 < shares.buckets:
            passages[step - 1].answer(settle)
        if step >= 2:
            passages[step - 2].arrive(apply)


class _Passage:
    """One bucket on its way."""

    def __init__(
        self, peers: Communicator, shares: Shares, wire: Wire, ring: Ring, bucket: int, landing: Tensor
    ) -> None:
        self._peers = peers
        self._places = [shares.place(silo, bucket) for silo in range(shares.silos)]
        self._own = self._places[peers.rank]
        sizes = [wire_bytes(length(place), wire) for place in self._places]
        out, coming = ring.lanes(bucket)
        self._flat = out[: sum(sizes)]
        self._rows = self._flat.split(sizes)
        self._received = coming[: shares.silos * sizes[peers.rank]].view(shares.silos, sizes[peers.rank])
        self._landed = wire == "fp32"
        self._answers = self._rows
        if self._landed:
            self._answers = tuple(landing[place].view(torch.uint8) for place in self._places)
        # A reduce-scatter wants equal slices: all but the last bucket's are.
        self._summed = wire == "fp32" and peers.sums_on_the_way(landing.device) and len(set(sizes)) == 1

    def send(self, pack: Pack) -> None:
        """Pack every owner's deltas and send them off; this rank's own go where the others' will come."""
        for silo, (place, row) in enumerate(zip(self._places, self._rows, strict=True)):
            own = silo == self._peers.rank and not self._summed
            pack(place, self._received[silo] if own else row)
        if self._summed:
            mine = self._received[0].view(torch.float32)
            self._pending = self._peers.start_reduce_scatter_sum(self._flat.view(torch.float32), mine, "body")
        else:
            self._pending = self._peers.start_all_to_all(self._rows, self._received.unbind(), "body")

    def answer(self, settle: Settle) -> None:
        """Wait for this rank's share of the deltas and send everyone what comes of it."""
        self._pending.wait()
        # What was sent has left: its buffer takes the answers.
        back = self._rows[self._peers.rank]
        settle(self._own, self._received[:1] if self._summed else self._received, back)
        self._pending = self._peers.start_all_gather(back, self._answers, "body")

    def arrive(self, apply: Apply) -> None:
        """Wait for all owners' answers and apply those that are not in their places."""
        self._pending.wait()
        for silo, (place, row) in enumerate(zip(self._places, self._rows, strict=True)):
            if silo == self._peers.rank or not self._landed:
                apply(place, row)
