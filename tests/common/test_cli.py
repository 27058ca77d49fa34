"""A tool's user sees one line and an exit code; a bug keeps its traceback."""

import argparse
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_dept.common.cli import ToolParser, fraction, non_negative_int, positive_int, run_tool
from megatron_dept.common.errors import ConfigError, DataError


def exit_code(main, argv=None):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            run_tool(main, argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    return caught.value.code


def raiser(error):
    def main(argv):
        raise error

    return main


def test_the_tools_own_code_and_arguments_pass_through():
    assert exit_code(lambda argv: len(argv), ["a", "b", "c"]) == 3


def test_a_user_error_is_one_line(capsys):
    assert exit_code(raiser(DataError("a.txt line 3\n is wrong;  mend it"))) == 2
    assert capsys.readouterr() == ("", "error: a.txt line 3 is wrong; mend it\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOENT])
def test_what_the_system_refuses_names_the_file(number, capsys):
    assert exit_code(raiser(OSError(number, os.strerror(number), "out/x.bin"))) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: out/x.bin: {os.strerror(number)}; ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EBADF, "bug")])
def test_a_bug_is_not_hidden(error):
    with pytest.raises(type(error), match="bug"):
        exit_code(raiser(error))


def test_interrupted(capsys):
    assert exit_code(raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "stopped by the user\n"


def run_python(code: str, **options) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_sigterm_cleans_up(tmp_path):
    left = tmp_path / "left"
    process = run_python(
        f"""
        import pathlib, time
        from megatron_dept.common.cli import run_tool
        def main(argv):
            left = pathlib.Path({str(left)!r})
            try:
                left.touch()
                time.sleep(60)
            finally:
                left.unlink()
        run_tool(main)
        """
    )
    for _ in range(500):
        if left.exists():
            break
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=10) == 143
    assert not left.exists()


def test_a_reader_that_leaves_is_no_error():
    process = run_python(
        """
        from megatron_dept.common.cli import run_tool
        def main(argv):
            for _ in range(100_000):
                print("line")
            return 0
        run_tool(main)
        """
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=10) == 0


def test_options_in_error_are_one_line_too():
    parser = ToolParser("does a thing", prog="thing.py")
    parser.add_argument("--count", type=positive_int, default=3)
    assert parser.parse_args([]).count == 3
    for wrong in (["--count", "0"], ["--cou", "1"], ["--colour", "red"], ["stray"]):
        with pytest.raises(ConfigError, match=r"thing\.py --help"):
            parser.parse_args(wrong)


def test_help_shows_defaults(capsys):
    parser = ToolParser("does a thing", prog="thing.py")
    parser.add_argument("--count", default=3, help="how many")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "does a thing" in out
    assert "how many (default: 3)" in out


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (positive_int, {"1": 1, "1_000": 1000}, ["0", "-1", "1.5", "x", ""]),
        (non_negative_int, {"0": 0, "7": 7}, ["-1", "x"]),
        (fraction, {"0": 0.0, "0.5": 0.5, "1e-3": 0.001}, ["1", "-0.1", "nan", "x"]),
    ],
)
def test_numbers(read, good, bad):
    assert {text: read(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)
