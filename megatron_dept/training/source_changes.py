"""Sources that have joined or left a run since its checkpoint was saved, by the user's editing `sources`.

A source that leaves is *retired*: what it has (its embedding and optimizer state in the store, its vocabulary, cursor
and steps) is carried along in every later checkpoint, so it can be evaluated, exported, or come back where it was. One
that has never trained leaves nothing. The round under way keeps the sample it began with (`RunProgress.sampled`): who
joins waits for the next one, and who leaves in the middle of its turn is left out of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dept.training.progress_state import RunProgress
from megatron_dept.training.sources import SourceSet


@dataclass(frozen=True)
class SourceChanges:
    """Names, each in one of the three; none of them where the run goes on with the sources it had."""

    joined: tuple[str, ...]
    left: tuple[str, ...]
    returned: tuple[str, ...]
    """Those that have trained in the run before, and left."""

    @classmethod
    def since(cls, manifest: Mapping[str, Any], names: Sequence[str]) -> "SourceChanges":
        """From the sources of a checkpoint's manifest to `names`."""
        before, steps = manifest["all_sources"], manifest["progress"]["steps"]
        new = [name for name in names if name not in before]
        return cls(
            joined=tuple(name for name in new if not steps.get(name)),
            left=tuple(name for name in before if name not in names),
            returned=tuple(name for name in new if steps.get(name)),
        )

    def __bool__(self) -> bool:
        return bool(self.joined or self.left or self.returned)

    def left_out(self, progress: RunProgress) -> tuple[str, ...]:
        """Sources that leave before their turn in the round under way has ended."""
        return tuple(name for name in self.left if name in progress.sampled and name not in progress.done)

    def apply(self, progress: RunProgress) -> None:
        """The round under way goes on without those that leave in it, as without one of too many bad steps."""
        for name in self.left_out(progress):
            progress.flights.pop(name, None)
            progress.done.append(name)
            if name not in progress.dropped:  # for its bad steps, before it left
                progress.dropped.append(name)

    def describe(self, progress: RunProgress) -> str:
        """One line for people; `progress` as the checkpoint has it, before `apply`."""
        returned = tuple(f"{name} (at step {progress.steps[name]:,})" for name in self.returned)
        parts = [
            f"{', '.join(names)} {what}"
            for names, what in (
                (self.joined, "joined"),
                (returned, "came back"),
                (self.left, "left"),
                (self.left_out(progress), f"not counted in round {progress.round + 1}, which is under way"),
            )
            if names
        ]
        return "sources: " + "; ".join(parts)


def retired_sources(manifest: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Manifest entries of the sources that a run of `names` carries along for later, by name."""
    return {
        name: {**entry, "retired": True}
        for name, entry in manifest["sources"].items()
        if name not in names and entry["trained"]
    }


def source_differences(manifest: Mapping[str, Any], sources: SourceSet) -> Iterator[tuple[str, Any, Any]]:
    """(what, then, now) of sources that are no longer what they were; retired ones are known too."""
    known, before = manifest["sources"], manifest["all_sources"]
    trained_before = {*before, *(name for name, steps in manifest["progress"]["steps"].items() if steps)}
    for name in sources.names:
        # Its embedding, or its text, is another silo's.
        if name in known and name not in sources.directories:
            yield f"source {name} at home", "here", "it at home in another silo"
        elif name not in known and name in trained_before and name in sources.directories:
            yield f"source {name} at home", "in another silo", "it here"
    reference = next(iter(known.values()))["tokenizer_fingerprint"]
    for name in sources.directories:
        card = sources.cards[name]
        entry = known.get(name)
        which = f"source {name}" if name in before else f"source {name}, which joins,"
        if entry is not None and name not in before:
            which = f"source {name}, which comes back,"
        if entry is not None or sources.kind != "own":
            # A global vocabulary is one tokenizer's, whoever joins.
            then, now = entry["tokenizer_fingerprint"] if entry else reference, card.tokenizer_fingerprint
            if then != now:
                yield f"{which} under tokenizer", then[:12], now[:12]
        if entry is not None and entry["text_fingerprint"] != card.text_fingerprint:
            yield f"{which} of text", entry["text_fingerprint"], card.text_fingerprint
