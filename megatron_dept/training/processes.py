"""Whether another process of this machine has ended: known at once, where signs of life over a network take seconds."""

import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_TIME = 19
"""Of the fields in /proc/PID/stat that follow the program's name; the first is the state."""
_ENDED = "ZXx"


def own_process() -> str | None:
    """What other processes need for asking after this one; None on systems without /proc."""
    namespace, stat = _namespace(), _stat(os.getpid())
    return f"{namespace} {os.getpid()} {stat[_START_TIME]}" if namespace and stat else None


def has_ended(process: str) -> bool | None:
    """Whether the process that calls itself so has ended; None where it is of another machine or container."""
    namespace, pid, start = process.rsplit(" ", 2)
    if namespace != _namespace():
        return None
    stat = _stat(int(pid))
    # A process that took its number over began later.
    return stat is None or stat[_START_TIME] != start or stat[0] in _ENDED


def _namespace() -> str | None:
    """Where a process's number has a meaning: this boot of this machine, and the container."""
    try:
        return f"{_BOOT_ID.read_text().strip()} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return None


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
