"""`pretrain_dept.py` on forked ranks some of which are killed: how and when each ended, and what it had to say."""

import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from megatron_dept.config.load import dump_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from tests.support.commands import Fault, launch_environment
from tests.support.distributed import _server, free_port


@dataclass(frozen=True)
class End:
    """One rank's."""

    code: int
    """Of its exit, or minus the signal that killed it."""
    seconds: float
    """After the first rank of all ended (or was stopped by SIGSTOP)."""
    stderr: str

    @property
    def error(self) -> str:
        """Its one `error: ...` line; torch's C++ side may have added others of its own."""
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        return line


def run_to_end(configs: list[RunConfig], ranks: list[int], fault: Fault, limit: float = 60) -> list[End]:
    """Each configuration as a launch of its own of so many ranks; `fault` is called with ranks counted over all.

    Returns how each rank ended, in that order. Ranks that a fault froze are killed once all others have ended.
    Raises AssertionError naming the ranks that were still there `limit` seconds after the start.
    """
    context = _server()
    processes, logs = [], []
    for config, size in zip(configs, ranks, strict=True):
        file, port = config.run_dir.with_suffix(".yaml"), free_port()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dump_config(config))
        for rank in range(size):
            log = config.run_dir.with_suffix(f".{rank}.err")
            launch = Launch(rank, size, rank, size, "127.0.0.1", port)
            arguments = (launch, len(processes), sum(ranks), str(file), fault, log)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            processes.append(process)
            logs.append(log)
    try:
        ended = _ends(processes, time.monotonic() + limit)
    finally:
        for process in processes:
            process.kill()
            process.join()
    first = min(ended)
    return [
        End(process.exitcode, when - first, log.read_text(errors="replace"))
        for process, when, log in zip(processes, ended, logs, strict=True)
    ]


def _ends(processes: list[Any], deadline: float) -> list[float]:
    """When each ended."""
    ended: dict[int, float] = {}
    while len(ended) < len(processes):
        running = {process.sentinel: place for place, process in enumerate(processes) if place not in ended}
        ready = wait(list(running), timeout=0.2)
        now = time.monotonic()
        ended |= {running[sentinel]: now for sentinel in ready}  # type: ignore[index]
        left = [place for place in range(len(processes)) if place not in ended]
        # Only a rank that nobody will wake: where one is suspended for a while, the others are too.
        if not ready and ended and left and all(_is_frozen(processes[place].pid) for place in left):
            for place in left:
                processes[place].kill()
        assert now < deadline, f"ranks {left} of {len(processes)} are still there"
    return [ended[place] for place in range(len(processes))]


def _is_frozen(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _rank(launch: Launch, place: int, everyone: int, file: str, fault: Fault, log: Path) -> None:
    import pretrain_dept

    os.environ.update(launch_environment(launch), TORCH_CPP_LOG_LEVEL="ERROR")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    fault(Launch(place, everyone, place, everyone, "", 0))
    os._exit(pretrain_dept.guarded([file]))
