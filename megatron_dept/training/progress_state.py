"""How far a run has come: what its manifest says beside the tensors. No layout appears in it."""

import copy
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Flight:
    """A local phase under way: `step` inner steps of it are done, `bad` of them were skipped."""

    step: int
    bad: int


@dataclass
class RunProgress:
    """Counters of the whole federation, equal on every rank at every synchronisation."""

    round: int = 0
    sampled: list[str] = field(default_factory=list)
    """Sources of the current round, as drawn when it began: none that joins the run later takes part in it."""
    done: list[str] = field(default_factory=list)
    """Sources of the current round whose local phase has ended and whose delta, unless dropped, is in the sums."""
    dropped: list[str] = field(default_factory=list)
    """Those of them whose delta was left out for too many bad steps."""
    flights: dict[str, Flight] = field(default_factory=dict)
    """Local phases under way; present in mid-round checkpoints."""
    cursors: dict[str, int] = field(default_factory=dict)
    """Samples consumed, by source."""
    steps: dict[str, int] = field(default_factory=dict)
    """Inner steps trained, by source."""
    skipped: int = 0
    """Steps skipped for a gradient that was not finite."""
    traffic: dict[str, int] = field(default_factory=dict)
    """Bytes that all ranks have sent in the current round, by "scope/kind"."""

    @property
    def total_steps(self) -> int:
        """Inner steps trained by all sources: grows with every step whatever the layout, so checkpoints go by it."""
        return sum(self.steps.values())

    @property
    def mid_round(self) -> bool:
        """Whether the current round has begun."""
        return bool(self.done or self.flights)

    def end_round(self) -> None:
        """The current round has ended."""
        self.round += 1
        self.sampled, self.done, self.dropped, self.flights = [], [], [], {}

    def dump(self) -> dict[str, Any]:
        """As plain values for the manifest."""
        return asdict(self)

    @classmethod
    def load(cls, values: dict[str, Any]) -> "RunProgress":
        """The inverse of `dump`; what the run goes on to count is not written into `values`."""
        values = copy.deepcopy(values)
        flights = {name: Flight(**flight) for name, flight in values["flights"].items()}
        return cls(**{**values, "flights": flights})
