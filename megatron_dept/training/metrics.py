"""What people watch: one line a step on the console, JSON lines and the byte ledger on disk, DeepSpeed's monitors."""

import json
import math
import sys
import time
from pathlib import Path
from typing import IO, Any, TextIO

from megatron_dept.common.files import read_json, write_json
from megatron_dept.common.progress import format_seconds
from megatron_dept.federation.ledger import KINDS


class Metrics:
    """Writes this silo's metrics; on ranks that do not lead a silo every call does nothing."""

    def __init__(self, run_dir: Path, silo: int, leads: bool) -> None:
        """`leads`: this rank writes the silo's file and prints to the console."""
        self._file: IO[str] | None = None
        self._silo = silo
        if leads:
            run_dir.mkdir(parents=True, exist_ok=True)
            # Line-buffered: a run that is killed has lost no line.
            self._file = open(run_dir / f"metrics.silo{silo}.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, kind: str, **values: Any) -> None:
        """One JSON line."""
        if self._file is not None:
            plain = {key: _finite(value) for key, value in values.items()}
            self._file.write(json.dumps({"kind": kind, "silo": self._silo, **plain}) + "\n")

    def say(self, text: str) -> None:
        """One line on the console."""
        if self._file is not None:
            _print_whole(text, sys.stdout)

    def warn(self, text: str) -> None:
        """One line on stderr, from whichever rank has something to warn of."""
        _print_whole(f"warning: silo {self._silo}: {text}", sys.stderr)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_whole(line: str, stream: TextIO) -> None:
    """One write, its end of line included: under launchers' `python -u` print makes two, and ranks' lines would mix."""
    stream.write(f"{line}\n")
    stream.flush()


class Pace:
    """Rate and time left over the inner steps this silo still has to do."""

    def __init__(self, steps: int) -> None:
        self._left = steps
        self._spent = 0.0
        self._done = 0
        self._mark = time.perf_counter()

    def start(self) -> None:
        """The next step begins now; what came since the last one is not the step's."""
        self._mark = time.perf_counter()

    def step(self) -> float:
        """A step has ended: its seconds."""
        seconds = time.perf_counter() - self._mark
        self._spent += seconds
        self._done += 1
        self._left -= 1
        self._mark = time.perf_counter()
        return seconds

    @property
    def time_left(self) -> str:
        """At the mean rate so far."""
        return format_seconds(self._spent / max(self._done, 1) * max(self._left, 0))


class LedgerFile:
    """`ledger.json`: bytes sent by all ranks, by round and kind, beside what was predicted."""

    def __init__(self, path: Path, round: int) -> None:
        """Goes on from what the file has of rounds before `round`, where a run resumes."""
        self._path = path
        known = read_json(path)["per_round"] if round and path.is_file() else []
        self._rounds: list[dict[str, Any]] = [entry for entry in known if entry["round"] < round]

    def add(self, round: int, sent: dict[str, int], predicted: dict[str, int], steps: int) -> None:
        """Enter what all ranks have sent in one round ("scope/kind": bytes), and rewrite the file."""
        kinds = {kind: sum(v for k, v in sent.items() if k.endswith(f"/{kind}")) for kind in KINDS}
        self._rounds.append(
            {"round": round, "kinds": kinds, "groups": dict(sorted(sent.items())), "predicted": predicted}
        )
        totals = {kind: sum(entry["kinds"][kind] for entry in self._rounds) for kind in KINDS}
        write_json(self._path, {"per_round": self._rounds, "totals": totals, "steps": steps})
