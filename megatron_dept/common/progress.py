"""Progress with rate and time left: a bar on a terminal, a plain line now and then in a log.

It is used so:

    with Progress("encode de", total=size, unit="bytes") as progress:
        for batch in batches:
            progress.advance(batch.size, tokens=batch.tokens)    # also shows tokens/s
            progress.note(f"loss {loss:.3f}")                    # shown at the end of the line
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

LINE_SECONDS = 5.0  # in a log, a line at most this often
BAR_SECONDS = 0.1  # on a terminal, the text changes at most this often
WINDOW_SECONDS = 30.0  # rates are those of this last stretch, so that a slow start is soon forgotten


class Progress:
    """Progress of one task, shown on `stream` (default: stderr).

    `total` is in `unit` (None: not known, no time left shown); `unit` "bytes" is shown as MB, others as called.
    `completed` is what was done before, as when a run is resumed: it counts in the percentage and not in the rate.
    With `enabled` False (ranks other than the first) nothing is shown. A context manager; use it from one thread.
    """

    def __init__(
        self,
        title: str,
        total: float | None = None,
        unit: str = "steps",
        *,
        completed: float = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = completed
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._clock = clock
        self._note = ""
        self._counts: dict[str, float] = {}
        self._begun_with = completed
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        self._begun = self._shown = self._clock()
        # (time, done, counts) at most once a BAR_SECONDS, for the rates of the last WINDOW_SECONDS.
        self._past: deque[tuple[float, float, dict[str, float]]] = deque([(self._begun, self.done, {})])
        if self._enabled and is_terminal(self._stream):
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}", markup=False),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(self.title, total=self.total, status="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw(self._summary() if kind is None else self._status())
            self._bar.stop()
        elif self._enabled and kind is None:
            self._line(self._summary())

    def advance(self, amount: float = 1, **counts: float) -> None:
        """Add `amount` units done, and to any number of named counts whose rates are shown too (`tokens=512`)."""
        self.done += amount
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        now = self._clock()
        if now - self._past[-1][0] >= BAR_SECONDS:
            self._past.append((now, self.done, dict(self._counts)))
            while len(self._past) > 2 and now - self._past[1][0] > WINDOW_SECONDS:
                self._past.popleft()
        if not self._enabled:
            return
        if self._bar is not None:
            if now - self._shown >= BAR_SECONDS:
                self._shown = now
                self._draw(self._status())
        elif now - self._shown >= LINE_SECONDS:
            self._shown = now
            self._line(self._status())

    def note(self, text: str) -> None:
        """Show `text` at the end of the next lines."""
        self._note = text

    def log(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(Text(text), soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def rate(self, count: str | None = None) -> float:
        """Units (or the named count) per second over the last stretch; 0 before anything is known."""
        when, done, counts = self._past[0]
        seconds = self._clock() - when
        gained = self.done - done if count is None else self._counts.get(count, 0) - counts.get(count, 0)
        return gained / seconds if seconds > 0 else 0.0

    def seconds_left(self) -> float | None:
        """Seconds to the end at the present rate; None where the total or the rate is not known."""
        rate = self.rate()
        return None if self.total is None or rate <= 0 else max(0.0, self.total - self.done) / rate

    def _status(self) -> str:
        amount = _amount(self.done, self.unit, self.total)
        if self.total:
            amount += f" ({100 * self.done / self.total:.0f} %)"
        rates = [_rate(self.rate(), self.unit)] + [_rate(self.rate(name), name) for name in self._counts]
        left = self.seconds_left()
        parts = [amount, *rates] + ([] if left is None else [f"{format_seconds(left)} left"])
        return ", ".join(parts + [self._note] * bool(self._note))

    def _summary(self) -> str:
        seconds = self._clock() - self._begun
        per = 1 / seconds if seconds > 0 else 0.0
        rates = [_rate((self.done - self._begun_with) * per, self.unit)]
        rates += [_rate(count * per, name) for name, count in self._counts.items()]
        parts = [f"{_amount(self.done, self.unit, None)} in {format_seconds(seconds)}", *rates]
        return ", ".join(parts + [self._note] * bool(self._note))

    def _line(self, status: str) -> None:
        print(f"{self.title}: {status}", file=self._stream, flush=True)

    def _draw(self, status: str) -> None:
        assert self._bar is not None
        self._bar.update(self._task, completed=self.done, status=status)


def is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn on `stream`: a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def format_seconds(seconds: float) -> str:
    """`7.3 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _amount(done: float, unit: str, total: float | None) -> str:
    scale, name = (1e6, "MB") if unit == "bytes" else (1, unit)
    digits = 1 if unit == "bytes" else 0
    of = "" if total is None else f"/{total / scale:,.{digits}f}"
    return f"{done / scale:,.{digits}f}{of} {name}"


def _rate(per_second: float, unit: str) -> str:
    if unit == "bytes":
        return f"{per_second / 1e6:.2f} MB/s"
    return f"{per_second:,.{0 if per_second >= 100 else 2}f} {unit}/s"
