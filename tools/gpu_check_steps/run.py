"""Runs steps one after another as programs of their own: each within its limit, none taking another's results along.

What every step came to is kept in the work folder at once. A step that went well with this very tree is not run again;
so a check that ran out of time goes on where it was.
"""

import hashlib
import json
import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check_steps.plan import LEAST_SECONDS, ROOT, Step, command_of, gpu_tests

TAIL_LINES = 25
SOURCES = ("csrc", "megatron_dept", "tools", "benchmarks", "tests")
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Bench:
    """Where steps run: the interpreter, the device ("cuda" or "cpu"), their environment, the work folder."""

    python: Path
    device: str
    environment: dict[str, str]
    work: Path


def fingerprint(root: Path = ROOT) -> str:
    """Of the tree that the steps run: names and contents of its sources, what is built left out."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp") and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_steps(
    bench: Bench, steps: Sequence[Step], minutes: float, again: bool, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Run `steps` in order until `minutes` are over; their entries, each handed to `done` as soon as it is known."""
    deadline = time.monotonic() + 60 * minutes
    tree, entries = fingerprint(), []
    for number, step in enumerate(steps, 1):
        earlier = read_entry(bench, step.name)
        if not again and earlier and earlier["status"] == "ok" and earlier["tree"] == tree:
            print(f"[{number}/{len(steps)}] {step.name}: done already ({earlier['at']})", flush=True)
            entries.append(earlier)
            done(earlier)
            continue
        limit = min(step.seconds, deadline - time.monotonic())
        print(f"[{number}/{len(steps)}] {step.name}: {step.what} ...", flush=True)
        if limit < LEAST_SECONDS:
            entry = {
                "step": step.name,
                "status": "out of time",
                "seconds": 0.0,
                "command": "",
                "data": None,
                "tail": [],
            }
            entry |= {"message": "the time was over before it began; the same command goes on from here"}
        else:
            entry = run_step(bench, step.name, limit)
        entry |= {"tree": tree, "device": bench.device, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
        _entry_file(bench, step.name).write_text(json.dumps(entry, indent=1))
        print(f"      {entry['status']}, {entry['seconds']:.0f} s{_because(entry)}", flush=True)
        entries.append(entry)
        done(entry)
    return entries


def run_step(bench: Bench, name: str, limit: float) -> dict[str, Any]:
    """One step's entry: status ("ok", "failed", "not present"), seconds, data; its output's end where it failed."""
    figures, log = bench.work / f"{name}.data", bench.work / f"{name}.log"
    figures.unlink(missing_ok=True)
    command = command_of(name, str(bench.python), bench.device, figures, limit)
    entry: dict[str, Any] = {"step": name, "command": " ".join(command), "data": None, "tail": []}
    if name == "parity" and not gpu_tests(ROOT):
        return entry | {"status": "not present", "seconds": 0.0, "message": "no test is marked gpu"}
    began = time.monotonic()
    code = run_limited(command, bench.environment, log, limit)
    entry["seconds"] = round(time.monotonic() - began, 1)
    entry["status"] = "ok" if code == 0 else "failed"
    if code is None:
        entry["message"] = f"ended after its limit of {limit:.0f} s"
    elif code:
        entry["message"] = f"exit code {code}"
    try:
        entry["data"] = read_junit(figures) if name == "parity" else json.loads(figures.read_text())
    except (OSError, ValueError, ElementTree.ParseError) as error:
        if code == 0:
            entry |= {"status": "failed", "message": f"it wrote no figures ({error})"}
    if name == "sanitizer" and entry["status"] == "ok" and not (entry["data"] or {}).get("sanitizer"):
        entry |= {"status": "not present", "message": "compute-sanitizer is not on this machine"}
    if entry["status"] == "failed":
        entry["tail"] = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return entry


def run_limited(command: Sequence[str], environment: dict[str, str], log: Path, limit: float) -> int | None:
    """The command's exit code, its output in `log`; None where it, and all its processes, were ended after `limit`."""
    with open(log, "wb") as handle:
        handle.write(f"$ {' '.join(command)}\n".encode())
        handle.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_take_interrupts,
        )  # fmt: skip
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            # As by Ctrl-C: pytest still writes what it has.
            _end(process, (signal.SIGINT, signal.SIGTERM))
            return None
        finally:
            _end(process, (signal.SIGKILL,))


def _take_interrupts() -> None:
    """A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen, signals: Sequence[signal.Signals]) -> None:
    """End the process's whole group: what a step leaves behind would hold the card's memory."""
    for number in signals:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)


def read_junit(path: Path) -> dict[str, Any]:
    """Counts and cases of pytest's JUnit file: [{"name", "seconds", "status", "message"}]."""
    cases = []
    for case in ElementTree.parse(path).iter("testcase"):
        if not case.get("name"):
            continue  # what was under way when pytest was ended
        failure = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        status = "passed" if failure is None else {"skipped": "skipped"}.get(failure.tag, "failed")
        entry = {
            "name": f"{case.get('classname', '')}::{case.get('name', '')}",
            "seconds": round(float(case.get("time", 0.0)), 2),
            "status": status,
        }
        if failure is not None:
            entry["message"] = (failure.get("message") or "").strip()[:400]
        cases.append(entry)
    counts = {status: sum(case["status"] == status for case in cases) for status in ("passed", "failed", "skipped")}
    return {**counts, "cases": cases}


def read_entry(bench: Bench, name: str) -> dict[str, Any] | None:
    """What the step came to the last time on this device; None where it never ran."""
    try:
        entry: dict[str, Any] = json.loads(_entry_file(bench, name).read_text())
    except (OSError, ValueError):
        return None
    return entry


def _entry_file(bench: Bench, name: str) -> Path:
    return bench.work / f"{name}.{bench.device}.json"


def _because(entry: dict[str, Any]) -> str:
    return f": {entry['message']}" if entry.get("message") else ""
