"""`pretrain_dept.py` as a launcher starts it, on forked ranks: each one's exit code and everything it printed.

Printing is caught at the file descriptors, so that what C++ libraries say is seen too; Python's warnings are as a
fresh interpreter has them.
"""

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_dept.config.load import dump_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from tests.support.distributed import run_ranks

Fault = Callable[[Launch], None]
"""Called on every rank before the program starts: what is to go wrong in it (see `tests.support.faults`)."""


@dataclass(frozen=True)
class Outcome:
    """One rank's end."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """What a user is told: stderr, which must be one `error: ...` line, of an exit code of 2."""
        lines = self.stderr.splitlines()
        assert self.code == 2, f"exit code {self.code}\n{self.stderr}"
        assert len(lines) == 1, f"{len(lines)} lines on stderr:\n{self.stderr}"
        assert lines[0].startswith("error: "), lines[0]
        return lines[0]


def run_command(
    config: RunConfig,
    ranks: int = 1,
    *,
    flags: Sequence[str] = (),
    fault: Fault | None = None,
    file: Path | None = None,
    limit: float = 60,
) -> list[Outcome]:
    """Start the program on `config`, written to `file` (default: beside its run_dir), on so many ranks.

    Returns how each ended, in rank order.
    """
    file = file or config.run_dir.with_suffix(".yaml")
    file.write_text(dump_config(config))
    return run_ranks(ranks, _rank, [str(file), *flags], fault, limit=limit)


def told(outcomes: list[Outcome]) -> str:
    """What a refused run tells its user: every rank ends in exit code 2, and those that speak say the same one line.

    Returned without the rank that stands before it in a launch of several.
    """
    assert [outcome.code for outcome in outcomes] == [2] * len(outcomes), outcomes
    spoken = {re.sub(r"^error: (rank \d+: )?", "", outcome.error) for outcome in outcomes if outcome.stderr}
    assert len(spoken) == 1, spoken
    return spoken.pop()


def launch_environment(launch: Launch) -> dict[str, str]:
    """The variables that DeepSpeed's launcher sets for a rank."""
    return {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_SIZE": str(launch.local_world_size),
        "MASTER_ADDR": launch.address,
        "MASTER_PORT": str(launch.port),
    }


def _rank(launch: Launch, argv: list[str], fault: Fault | None) -> Outcome:
    import pretrain_dept

    os.environ.update(launch_environment(launch))
    # Ranks here end at once after the program: no rank has to wait for another to tell a shared mistake.
    pretrain_dept.GRACE_SECONDS = 0.0
    warnings.resetwarnings()
    for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", hidden)
    if fault is not None:
        fault(launch)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _redirected(1, out), _redirected(2, err):
            code = pretrain_dept.guarded(argv)
        return Outcome(code, _text(out), _text(err))


@contextmanager
def _redirected(descriptor: int, file: IO[bytes]) -> Iterator[None]:
    stream: Any = {1: sys.stdout, 2: sys.stderr}[descriptor]
    stream.flush()
    saved = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        stream.flush()
        os.dup2(saved, descriptor)
        os.close(saved)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` and what it holds; for asserting that nothing changed."""
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()
    }
