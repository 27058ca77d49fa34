"""An outer exchange that runs while the first steps of the next round train: delayed application.

Round t's deltas are exchanged in the background of round t + 1. All local phases of that round begin with `start`,
theta_t, and each adds the update theta_(t+1) - theta_t to its body after the same number of steps, whether the exchange
took long or not; what a phase leaves is held against theta_(t+1), as ever. So no number depends on the network, or on
how many silos there are. Streaming DiLoCo (arXiv 2501.18512) overlaps so, and mixes what comes into replicas that are
trained on; here phases are sources' turns and begin with a global body.
Shapes: `n` elements of this rank's fp32 partition of the body.
"""

import time
from functools import partial

import torch
from torch import Tensor

from megatron_dept.common.segments import Segment
from megatron_dept.dept.outer import SCRATCH_ELEMENTS
from megatron_dept.federation.background import Job
from megatron_dept.federation.exchange import Exchange, Prepared, Residual
from megatron_dept.federation.ledger import Ledger


class OverlappedExchange:
    """An `Exchange` whose `finish` returns at once. Whoever asks for what it makes waits for it, and gets its errors.

    `start`: fp32 [n], the body that local phases begin with, of which `value` is one exchange ahead.
    """

    def __init__(self, exchange: Exchange, ledger: Ledger) -> None:
        """`exchange` is over a group that nobody else uses, charged to a `ledger` that nobody else is charged to."""
        self._exchange = exchange
        self._ledger = ledger
        self._job: Job | None = None
        self.start = exchange.value.clone()
        self.waited = 0.0
        """Seconds that the last exchange was waited for."""
        self.whole = 0.0
        """Seconds that the last exchange took, waited for or not."""
        self._device = self.start.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def wait(self) -> None:
        """Return once the exchange under way is done; its error is raised here."""
        job, self._job = self._job, None
        if job is not None:
            began = time.perf_counter()
            self.whole = job.outcome()
            self.waited = time.perf_counter() - began

    def sent(self) -> dict[str, int]:
        """Bytes that this rank has sent since the last time, as `Ledger.take`: of whole exchanges only."""
        self.wait()
        return self._ledger.take()

    @torch.no_grad()
    def updated(self, local: Tensor) -> Tensor:
        """`local` (fp32 [n], a body that was trained from `start`; consumed) + (value - start)."""
        value = self.value
        for first in range(0, local.numel(), SCRATCH_ELEMENTS):
            part = slice(first, first + SCRATCH_ELEMENTS)
            local[part] += value[part] - self.start[part]
        return local

    def finish(self, sources: int) -> None:
        """Begin the exchange of a round to which `sources` contributed; what it began with becomes `start`."""
        self.wait()
        self.start.copy_(self._exchange.value)
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        self._job = Job(partial(self._run, sources, ready), self._device)
        self._job.start()

    def _run(self, sources: int, ready: "torch.cuda.Event | None") -> float:
        """On the job's thread: the whole exchange; its seconds."""
        began = time.perf_counter()
        if self._stream is None:
            self._exchange.finish(sources)
        else:
            # A stream of its own, or the GPU would do the exchange's work and the next round's in turn.
            with torch.cuda.stream(self._stream):
                assert ready is not None
                self._stream.wait_event(ready)
                self._exchange.finish(sources)
                self._stream.synchronize()
        return time.perf_counter() - began

    def _lend(self, tensor: Tensor) -> None:
        """What the background's stream will read: its memory is not given to others before that is done."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    @property
    def value(self) -> Tensor:
        """fp32 [n], the newest global body: of phases in which it was applied, what their deltas are taken from."""
        self.wait()
        return self._exchange.value

    @property
    def delta(self) -> Tensor:
        """See `Exchange`."""
        self.wait()
        return self._exchange.delta

    @property
    def momentum(self) -> Tensor | None:
        """See `Exchange`."""
        self.wait()
        return self._exchange.momentum

    @property
    def round_bytes(self) -> int:
        """See `Exchange`."""
        return self._exchange.round_bytes

    @property
    def owned_value(self) -> Tensor:
        """See `Exchange`."""
        self.wait()
        return self._exchange.owned_value

    @property
    def owned_momentum(self) -> Tensor | None:
        """See `Exchange`."""
        self.wait()
        return self._exchange.owned_momentum

    def owned(self, segments: list[Segment]) -> list[Segment]:
        """See `Exchange`."""
        return self._exchange.owned(segments)

    def momentum_segments(self, segments: list[Segment]) -> list[Segment]:
        """See `Exchange`."""
        return self._exchange.momentum_segments(segments)

    def adopt(self) -> None:
        """See `Exchange`."""
        self.wait()
        self._exchange.adopt()

    def add(self, local: Tensor) -> None:
        """See `Exchange`: `local` has had its update."""
        self.wait()
        self._lend(local)
        self._exchange.add(local)

    def load_delta(self, total: Tensor) -> None:
        """See `Exchange`."""
        self.wait()
        self._lend(total)
        self._exchange.load_delta(total)

    def residuals(self, segments: list[Segment]) -> list[Residual]:
        """See `Exchange`."""
        self.wait()
        return self._exchange.residuals(segments)

    def prepare(self, sources: int) -> Prepared | None:
        """See `Exchange`; not in the background."""
        self.wait()
        return self._exchange.prepare(sources)

    def commit(self, prepared: Prepared | None) -> None:
        """See `Exchange`; not in the background."""
        self._exchange.commit(prepared)
