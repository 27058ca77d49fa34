"""Runs planned steps as subprocesses: what is done is skipped, what was stopped goes on, progress is shown as one.

A finished step leaves `stamps/NAME.json` with the fingerprint of its command and of all that it builds on; a step whose
fingerprint has changed is made anew. Several one-core steps run side by side where there are cores; of launches, which
share a port, one at a time.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from demo_job.steps import Step
from megatron_dept.common.errors import UserError
from megatron_dept.common.files import read_json, write_json
from megatron_dept.common.progress import Progress, format_seconds

TICK_SECONDS = 0.2
TAIL_LINES = 30
GRACE_SECONDS = 30.0  # a training run saves a checkpoint within a step of SIGTERM
ALMOST = 0.97  # of a step's expected work is credited at most while it still runs
NOTE_LENGTH = 60


class StepFailed(UserError):
    """A step's command failed; the message names the command and its log."""


class WholeProgress(Progress):
    """Progress in seconds of expected work: time so far, and time left at the pace of this machine up to now."""

    def seconds_left(self) -> float | None:
        """The work left, at the mean pace since the start; None before anything was done."""
        work = self.done - self._begun_with
        if self.total is None or work <= 0:
            return None
        return (self.total - self.done) * (self._clock() - self._begun) / work

    def _status(self) -> str:
        left = self.seconds_left()
        parts = [
            f"{100 * self.done / (self.total or 1):.0f} %",
            f"{format_seconds(self._clock() - self._begun)} so far",
        ]
        parts += [] if left is None else [f"{format_seconds(left)} left"]
        return ", ".join(parts + [self._note] * bool(self._note))

    def _summary(self) -> str:
        return f"done in {format_seconds(self._clock() - self._begun)}"


@dataclass
class Running:
    """A step under way."""

    step: Step
    process: subprocess.Popen
    log: Path
    handle: IO[bytes]
    begun: float
    credited: float = 0.0


class Runner:
    """Runs steps in the project's folder `root`; stamps and logs are in `root/demo`."""

    def __init__(self, root: Path, cores: int | None = None, environment: dict[str, str] | None = None) -> None:
        self.root = root
        self.stamps, self.logs = root / "demo" / "stamps", root / "demo" / "logs"
        self.cores = cores or max(2, len(os.sched_getaffinity(0)))
        self._environment = step_environment() | (environment or {})
        self._running: dict[str, Running] = {}

    def run(self, steps: Sequence[Step], title: str = "demo") -> None:
        """Run every step that is not done.

        Raises:
            StepFailed: a command failed; its log's end has been printed, and what ran beside it was stopped.
            KeyboardInterrupt: passed on when all under way has been stopped.
        """
        prints = self.fingerprints(steps)
        done = {step.name for step in steps if self._is_done(step, prints[step.name])}
        pending = [step for step in steps if step.name not in done]
        expected = {step.name: self.expected_seconds(step) for step in steps}
        self.logs.mkdir(parents=True, exist_ok=True)
        finished_work = sum(expected[name] for name in done)
        with WholeProgress(title, sum(expected.values()), completed=finished_work) as progress:
            if done:
                progress.log(f"{len(done)} of {len(steps)} steps are done already")
            try:
                while pending or self._running:
                    self._start_what_can(pending, done, steps, prints, progress)
                    time.sleep(TICK_SECONDS)
                    self._look(done, prints, expected, progress)
            except BaseException:
                self._stop_all()
                raise

    def fingerprints(self, steps: Sequence[Step]) -> dict[str, str]:
        """{step: fingerprint}; steps must come after those they need."""
        prints: dict[str, str] = {}
        for step in steps:
            prints[step.name] = step.fingerprint(self.root, [prints[name] for name in step.after])
        return prints

    def expected_seconds(self, step: Step) -> float:
        """What the step took last time, else what the plan says."""
        path = self.stamps / f"{step.name}.json"
        return max(0.1, float(read_json(path)["seconds"])) if path.exists() else step.seconds

    def _is_done(self, step: Step, fingerprint: str) -> bool:
        path = self.stamps / f"{step.name}.json"
        return path.exists() and read_json(path)["fingerprint"] == fingerprint

    def _start_what_can(
        self, pending: list[Step], done: set[str], steps: Sequence[Step], prints: dict[str, str], progress: Progress
    ) -> None:
        """Start steps in their order; the first that has to wait for cores holds back those behind it."""
        order = {step.name: number for number, step in enumerate(steps, 1)}
        for step in list(pending):
            if not set(step.after) <= done:
                continue
            busy = sum(self._need(running.step) for running in self._running.values())
            launching = any(running.step.run_dir is not None for running in self._running.values())
            if busy + self._need(step) > self.cores or (step.run_dir is not None and launching):
                return
            pending.remove(step)
            progress.log(f"[{order[step.name]}/{len(steps)}] $ {step.text}")
            self._start(step, order[step.name], prints[step.name])

    def _need(self, step: Step) -> int:
        return min(step.cores, self.cores)

    def _start(self, step: Step, number: int, fingerprint: str) -> None:
        begun = self.stamps / f"{step.name}.begun.json"
        resumes = begun.exists() and read_json(begun)["fingerprint"] == fingerprint
        (self.stamps / f"{step.name}.json").unlink(missing_ok=True)
        if not resumes and step.run_dir is not None:
            # Of another configuration: going on from its checkpoints would mix the two.
            shutil.rmtree(self.root / step.run_dir, ignore_errors=True)
        write_json(begun, {"fingerprint": fingerprint, "command": step.text})
        log = self.logs / f"{number:02d}-{step.name}.log"
        handle = open(log, "ab" if resumes else "wb")  # noqa: SIM115  (closed in _look or _stop_all)
        handle.write(f"$ {step.text}\n".encode())
        handle.flush()
        environment = self._environment | ({"OMP_NUM_THREADS": "1"} if step.cores == 1 else {})
        process = subprocess.Popen(
            step.command, cwd=self.root, env=environment, stdin=subprocess.DEVNULL, stdout=handle,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._running[step.name] = Running(step, process, log, handle, time.monotonic())

    def _look(self, done: set[str], prints: dict[str, str], expected: dict[str, float], progress: Progress) -> None:
        """Stamp what has ended, fail on what failed, and credit what runs with its time."""
        for name, running in list(self._running.items()):
            seconds = time.monotonic() - running.begun
            code = running.process.poll()
            if code is None:
                line = last_line(running.log)
                part = min(fraction_done(line) or seconds / expected[name], ALMOST)
                credit = max(running.credited, part * expected[name])
                progress.advance(credit - running.credited)
                running.credited = credit
                progress.note(f"{name}: {shorten(line)}")
                continue
            running.handle.close()
            del self._running[name]
            if code != 0 or not is_finished(self.root, running.step):
                raise self._failure(running, code)
            progress.advance(expected[name] - running.credited)
            progress.log(f"    {name} done in {format_seconds(seconds)}")
            write_json(
                self.stamps / f"{name}.json",
                {"fingerprint": prints[name], "seconds": round(seconds, 2), "command": running.step.text},
            )
            done.add(name)

    def _failure(self, running: Running, code: int) -> StepFailed:
        tail = "\n".join(running.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        print(f"\n--- the end of {running.log}:\n{tail}\n---", file=sys.stderr, flush=True)
        how = f"failed with exit code {code}" if code else "was stopped before its last round"
        return StepFailed(
            f"step {running.step.name} {how}: {running.step.text} (log: {running.log}); mend what the log names and "
            "run the same command again, it goes on from here"
        )

    def _stop_all(self) -> None:
        """SIGTERM to every process group, SIGKILL to what has not gone in time."""
        for running in self._running.values():
            _signal(running.process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for running in self._running.values():
            # Of the whole group: a launcher goes at once, its ranks when they have saved.
            while _lives(running.process) and time.monotonic() < deadline:
                time.sleep(TICK_SECONDS)
            _signal(running.process, signal.SIGKILL)
            running.process.wait()
            running.handle.close()
        self._running.clear()


def _lives(process: subprocess.Popen) -> bool:
    """Whether any process of the group is left."""
    process.poll()  # the leader, once ended, would be counted until it is waited for
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _signal(process: subprocess.Popen, number: int) -> None:
    """To the whole group, whose leader may have gone before its children."""
    with suppress(ProcessLookupError):  # gone already, which is what was wanted
        os.killpg(process.pid, number)


def is_finished(root: Path, step: Step) -> bool:
    """Whether a step that ended well is at its end: a training run that is asked to stop saves itself and ends well."""
    if step.run_dir is None:
        return True
    run_dir = root / step.run_dir
    rounds = yaml.safe_load((run_dir / "config.yaml").read_text())["dept"]["rounds"]
    manifests = run_dir.glob("checkpoints/*/manifest.json")
    return any(read_json(path)["round"] >= rounds for path in manifests)


def step_environment() -> dict[str, str]:
    """The environment of every command: this Python first on the path, output unbuffered, CPU unless there are GPUs."""
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment["PYTHONUNBUFFERED"] = "1"
    if gpu_count() < 2:
        # Every launch of the demo has two ranks, and a GPU is not shared.
        environment["DS_ACCELERATOR"] = "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def gpu_count() -> int:
    """NVIDIA GPUs of this machine, without importing torch."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def last_line(log: Path) -> str:
    """The last line of a log: what the step is at."""
    with open(log, "rb") as handle:
        handle.seek(max(0, log.stat().st_size - 2000))
        lines = handle.read().decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def fraction_done(line: str) -> float | None:
    """How far a training run is, by a line such as `round 2/6 step 35/180 ...`; rounds count half, as slots vary."""
    found = re.match(r"round (\d+)/(\d+) step (\d+)/(\d+) ", line)
    if found is None:
        return None
    round, rounds, step, steps = (int(part) for part in found.groups())
    return ((round - 1) / rounds + step / steps) / 2


def shorten(text: str) -> str:
    """At most NOTE_LENGTH characters."""
    return text if len(text) <= NOTE_LENGTH else text[: NOTE_LENGTH - 1] + "…"
