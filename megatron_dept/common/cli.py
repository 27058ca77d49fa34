"""What every command-line tool shares: its parser, its exit codes, and its one-line errors.

A tool is a file with `main(argv=None) -> int`, which raises `UserError` for what its user can mend, and ends in

    if __name__ == "__main__":
        run_tool(main)
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from megatron_dept.common.errors import EXIT_USER_ERROR, ConfigError, UserError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell expects of an interrupted program
EXIT_TERMINATED = 143  # 128 + SIGTERM

# The operating system's refusals that a user can mend; any other OSError is a bug and keeps its traceback.
_MENDABLE = {
    errno.ENOSPC: "free space or choose another place",
    errno.EDQUOT: "free space or choose another place",
    errno.EACCES: "check its permissions or choose another place",
    errno.EPERM: "check its permissions or choose another place",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "check the path",
}


class ToolParser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`s, so that they too are one line and exit code 2.

    Options cannot be abbreviated (a new option must not change what an old command means), and `--help` shows defaults.
    """

    def __init__(self, description: str, epilog: str | None = None, prog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help lists the options")


def positive_int(text: str) -> int:
    """An argparse type: an integer above 0, written as digits (underscores allowed)."""
    value = _integer(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def non_negative_int(text: str) -> int:
    """An argparse type: an integer of 0 or more."""
    value = _integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0")
    return value


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 to below 1")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from error


def run_tool(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main(argv)` and exit with its code; a `UserError` is one line `error: ...` on stderr and exit code 2.

    So are the operating system's mendable refusals (no such file, no space, no permission). Ctrl-C says so in one line
    and exits 130; SIGTERM exits 143, and like it lets `finally` clean up. Anything else is a bug: its traceback is
    printed by Python and the exit code is 1.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main(argv)
        sys.stdout.flush()
    except UserError as error:
        code = _report(str(error))
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has left: not an error, but Python must not flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        refusal = explain_refusal(error)
        if refusal is None:
            raise
        code = _report(refusal)
    sys.exit(code)


def explain_refusal(error: OSError) -> str | None:
    """What the operating system refused, and the remedy, on one line; None where no user can mend it."""
    if error.errno not in _MENDABLE:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; {_MENDABLE[error.errno]}"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(EXIT_TERMINATED)


def _report(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_USER_ERROR
