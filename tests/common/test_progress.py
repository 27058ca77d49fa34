"""Progress: in a log a line now and then, on a terminal a bar; rate and time left by the last stretch."""

import io

import pytest

from megatron_dept.common.progress import Progress, format_seconds, is_terminal


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def test_a_log_gets_a_line_every_five_seconds_and_one_at_the_end(clock):
    stream = io.StringIO()
    with Progress("encode de", total=100e6, unit="bytes", stream=stream, clock=clock) as progress:
        for _ in range(20):
            clock.now += 1
            progress.advance(5e6, tokens=1e6)
    assert stream.getvalue().splitlines() == [
        "encode de: 25.0/100.0 MB (25 %), 5.00 MB/s, 1,000,000 tokens/s, 15 s left",
        "encode de: 50.0/100.0 MB (50 %), 5.00 MB/s, 1,000,000 tokens/s, 10 s left",
        "encode de: 75.0/100.0 MB (75 %), 5.00 MB/s, 1,000,000 tokens/s, 5.0 s left",
        "encode de: 100.0/100.0 MB (100 %), 5.00 MB/s, 1,000,000 tokens/s, 0.0 s left",
        "encode de: 100.0 MB in 20 s, 5.00 MB/s, 1,000,000 tokens/s",
    ]


def test_a_resumed_task_counts_what_was_done_but_not_in_its_rate(clock):
    stream = io.StringIO()
    with Progress("train", total=100, completed=90, stream=stream, clock=clock) as progress:
        progress.note("loss 3.21")
        clock.now += 5
        progress.advance(5)
        assert progress.rate() == 1.0
        assert progress.seconds_left() == 5.0
    first, last = stream.getvalue().splitlines()
    assert first == "train: 95/100 steps (95 %), 1.00 steps/s, 5.0 s left, loss 3.21"
    assert last == "train: 95 steps in 5.0 s, 1.00 steps/s, loss 3.21"


def test_the_rate_is_that_of_the_last_stretch(clock):
    with Progress("train", total=1000, stream=io.StringIO(), clock=clock) as progress:
        clock.now += 100  # a slow start
        progress.advance(1)
        for _ in range(60):
            clock.now += 1
            progress.advance(2, tokens=6)
        assert progress.rate() == 2.0
        assert progress.rate("tokens") == 6.0
        assert progress.seconds_left() == (1000 - 121) / 2


def test_nothing_is_known_at_first(clock):
    with Progress("read", stream=io.StringIO(), clock=clock) as progress:
        assert progress.rate() == 0
        assert progress.seconds_left() is None


def test_an_error_ends_it_without_a_summary(clock):
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress("read", stream=stream, clock=clock):
        raise RuntimeError
    assert stream.getvalue() == ""


def test_disabled_shows_nothing_and_still_counts(clock):
    for stream in (io.StringIO(), Terminal()):
        with Progress("read", enabled=False, stream=stream, clock=clock) as progress:
            clock.now += 10
            progress.advance(3)
            progress.log("text")
        assert stream.getvalue() == ""
        assert progress.done == 3


def test_a_terminal_gets_a_bar(monkeypatch, clock):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    assert is_terminal(stream)
    with Progress("encode [de]", total=10, stream=stream, clock=clock) as progress:
        clock.now += 1
        progress.advance(5, tokens=20)
        progress.log("a line [of] its own")
    shown = stream.getvalue()
    assert "\x1b[" in shown  # the cursor moves
    assert "encode [de]" in shown  # not taken for markup
    assert "5 steps in 1.0 s, 5.00 steps/s, 20.00 tokens/s" in shown
    assert "a line [of] its own" in shown


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())
    assert not is_terminal(io.StringIO())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text
