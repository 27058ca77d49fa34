"""The commands as users type them, through the real launchers: one story of a run that is killed, broken off, asked to
stop, and finishes, each time by the same command; and what an ordinary run may print.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import pretrain_dept
from megatron_dept.checkpoint.reader import Checkpoint, committed
from megatron_dept.common.errors import EXIT_USER_ERROR
from megatron_dept.config.load import describe_fields, dump_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from megatron_dept.training.metrics import Metrics
from tests.support.commands import run_command
from tests.support.corpus import Corpus
from tests.support.distributed import free_port
from tests.support.runs import final_state, largest_difference, losses, metrics, small_config, train

PROJECT = Path(__file__).resolve().parents[1]
PROGRAM = "pretrain_dept.py"
DYING_PROGRAM = "tests/support/dying_rank.py"
ROUNDS, N_LOCAL = 3, 40

OWN_LINES = (
    r"round \d+/\d+ step \d+/\d+ \S+ loss \d+\.\d{4} lr \d\.\d\de-\d\d grad \d+\.\d\d [\d,]+ tok/s MFU \d+% left .+",
    r"round \d+ validation \S+: \d+\.\d{4} bits per byte",
    r"resuming from \S+/checkpoints/step-\d{8} at round \d+/\d+",
    r"saved \S+/checkpoints/step-\d{8}",
)
LAUNCHER_LINES = (
    r"\[[-\d :,]+\] \[INFO\] \[(runner|launch)\.py:\d+:main\] .*",
    # Printed by the launcher before this program starts; -q, or a hostfile, is the user's to choose.
    r"\[[-\d :,]+\] \[WARNING\] \[runner\.py:\d+:fetch_hostfile\] Unable to find hostfile, will proceed with training "
    r"with local resources only\.",
)


def unexpected(text: str, shapes: Iterable[str]) -> list[str]:
    """Lines that have none of the allowed shapes."""
    return [line for line in text.splitlines() if not any(re.fullmatch(shape, line) for shape in shapes)]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    """From being asked to stop, or else from the last step that any rank reported, to the last process's end."""
    checkpoints: tuple[str, ...]


def environment(**more: str) -> dict[str, str]:
    """A shell's environment on a machine without an accelerator."""
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    return {**kept, "PYTHONPATH": str(PROJECT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}


def deepspeed(program: str, file: Path) -> list[str]:
    """`deepspeed PROGRAM RUN.yaml` on two ranks."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*launcher, "--num_accelerators", "2", "--master_port", str(free_port()), program, str(file)]


def torchrun(program: str, file: Path) -> list[str]:
    """`torchrun PROGRAM RUN.yaml` on two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [*launcher, "--nproc-per-node", "2", "--master-port", str(free_port()), program, str(file)]


def command(line: list[str], run_dir: Path, until: str | None = None, limit: float = 120, **more: str) -> Ended:
    """Run a command to its end, and see that no process started for the run outlives it.

    Where a line of stdout matches `until`, its whole process group is sent SIGTERM, as `timeout` and batch systems do.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            line,
            cwd=PROJECT,
            env=environment(**more),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        watchdog = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        printed, mark = [], time.monotonic()
        # To the end of file: until every process that shares the pipe has gone.
        for text in process.stdout:
            printed.append(text)
            if until is not None and re.search(until, text):
                os.killpg(process.pid, signal.SIGTERM)
                until, mark = "asked once", time.monotonic()
            elif until is None and re.fullmatch(OWN_LINES[0], text.rstrip()):
                mark = time.monotonic()
        code = process.wait()
        seconds = time.monotonic() - mark
        assert watchdog.is_alive(), f"it hung:\n{''.join(printed)}"
        watchdog.cancel()
        left = [
            each for each in psutil.process_iter(["cmdline"]) if str(run_dir) in " ".join(each.info["cmdline"] or [])
        ]
        assert not left, f"left behind: {left}"
        errors.seek(0)
        saved = tuple(path.name for path in committed(run_dir / "checkpoints"))
        return Ended(code, "".join(printed), errors.read(), seconds, saved)


@pytest.fixture(scope="module")
def config(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two silos of one rank; a collective would wait ten minutes for a rank that is gone."""
    config = small_config(
        corpus,
        tmp_path_factory.mktemp("story") / "run",
        source_names=["latin", "greek"],
        parallel={"silos": 2},
        dept={"variant": "trim", "rounds": ROUNDS, "n_local": N_LOCAL},
        training={"timeout_seconds": 600},
        evaluation={"interval_rounds": 2, "max_tokens": 200},
        checkpoint={"keep_last": 9},
    )
    config.run_dir.with_suffix(".yaml").write_text(dump_config(config))
    return config


@pytest.fixture(scope="module")
def killed(config: RunConfig) -> Ended:
    """Rank 1 is killed in the second round, in the middle of a step."""
    file = config.run_dir.with_suffix(".yaml")
    return command(deepspeed(DYING_PROGRAM, file), config.run_dir, DYING=f"step 1 {N_LOCAL + 5}")


@pytest.fixture(scope="module")
def broken_off(config: RunConfig, killed: Ended) -> Ended:
    """Started again, by torchrun: rank 1 is killed at the round's end, where rank 0 waits for its share of the body."""
    file = config.run_dir.with_suffix(".yaml")
    return command(torchrun(DYING_PROGRAM, file), config.run_dir, DYING="exchange 1 0")


@pytest.fixture(scope="module")
def stopped(config: RunConfig, broken_off: Ended) -> Ended:
    """Started again: asked to stop in the middle of the second round."""
    file = config.run_dir.with_suffix(".yaml")
    return command(deepspeed(PROGRAM, file), config.run_dir, until=rf"round 2/{ROUNDS} step {N_LOCAL + 7}/")


@pytest.fixture(scope="module")
def finished(config: RunConfig, stopped: Ended) -> Ended:
    """Started again, and left alone."""
    return command(deepspeed(PROGRAM, config.run_dir.with_suffix(".yaml")), config.run_dir)


def test_a_killed_rank_takes_the_run_down_in_seconds(killed):
    # The launcher looks once a second and passes on the code of the rank it sees first: the killed one's, which is -9
    # modulo 256, or that of the other, which by then has lost it.
    assert killed.code in (256 - signal.SIGKILL, EXIT_USER_ERROR)
    assert killed.seconds < 15
    assert killed.checkpoints == ("step-00000080",)


def test_a_rank_killed_while_another_waits_for_it_does_too(broken_off):
    assert broken_off.code != 0
    assert "resuming from" in broken_off.stdout and f"at round 2/{ROUNDS}" in broken_off.stdout
    assert "lost a peer in another silo while exchanging body" in broken_off.stderr
    assert broken_off.seconds < 15
    assert broken_off.checkpoints == ("step-00000080",), "the round that was not exchanged is not saved"


def test_sigterm_saves_within_a_step_and_ends(config, stopped):
    (line,) = [line for line in stopped.stdout.splitlines() if line.startswith("stopped as asked; the same command ")]
    assert line.endswith(f"goes on from {config.run_dir}/checkpoints")
    assert stopped.seconds < 15
    assert stopped.checkpoints[0] == "step-00000080" and len(stopped.checkpoints) == 2
    assert N_LOCAL * 2 < int(stopped.checkpoints[1].removeprefix("step-")) < N_LOCAL * 4, "in the middle of a round"
    assert not unexpected(stopped.stderr, ())


def test_the_next_start_goes_on_to_the_end(finished, stopped):
    assert finished.code == 0
    assert f"{stopped.checkpoints[-1]} at round 2/{ROUNDS}" in finished.stdout
    assert finished.checkpoints[-1] == f"step-{2 * ROUNDS * N_LOCAL:08d}"


def test_after_all_of_it_the_run_is_the_one_that_was_never_disturbed(config, finished, corpus, tmp_path):
    undisturbed = config.model_copy(update={"run_dir": tmp_path / "undisturbed"})
    train(undisturbed, ranks=2)
    assert largest_difference(final_state(config.run_dir), final_state(undisturbed.run_dir)) == 0
    assert losses(config.run_dir) == losses(undisturbed.run_dir)


def test_an_ordinary_run_prints_its_progress_and_nothing_else(finished):
    assert not unexpected(finished.stdout, OWN_LINES + LAUNCHER_LINES)
    assert not unexpected(finished.stderr, ())
    for shape in OWN_LINES:
        assert any(re.fullmatch(shape, line) for line in finished.stdout.splitlines()), shape


def test_one_process_alone(corpus, tmp_path):
    """No launcher: all sources in turn; the same silence."""
    config = small_config(corpus, tmp_path / "run", dept={"rounds": 1, "n_local": 2}, evaluation={"interval_rounds": 1})
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    ended = command([sys.executable, PROGRAM, str(file), "--dept.n_local", "1"], config.run_dir)
    assert ended.code == 0, ended.stderr
    assert not unexpected(ended.stdout, OWN_LINES) and ended.stderr == ""
    assert [line["source"] for line in metrics(config.run_dir, "step")] == list(corpus.data)
    assert Checkpoint.open(config.run_dir).manifest["trained_with"]["dept"]["n_local"] == 1


@pytest.mark.parametrize(
    "ranks, sections",
    [
        (2, {"parallel": {"zero_stage": 0}}),
        (2, {"parallel": {"zero_stage": 2}, "training": {"precision": "bf16"}}),
        (2, {"parallel": {"zero_stage": 3}, "training": {"precision": "bf16", "activation_checkpointing": True}}),
        (1, {"model": {"family": "llama"}, "logging": {"csv": True, "tensorboard": True}}),
        (1, {"dept": {"variant": "act"}, "model": {"position_embedding": "alibi"}}),
    ],
    ids=["zero0", "zero2-bf16", "zero3-bf16", "llama-monitors", "act-alibi"],
)
def test_other_ordinary_runs_are_as_quiet(corpus, tmp_path, ranks, sections):
    config = small_config(corpus, tmp_path / "run", evaluation={"interval_rounds": 1, "max_tokens": 200}, **sections)
    for outcome in run_command(config, ranks):
        assert (outcome.code, outcome.stderr) == (0, "")
        assert not unexpected(outcome.stdout, OWN_LINES)


class Writes(list[str]):
    """A stream that keeps every write apart."""

    def write(self, text: str) -> None:
        self.append(text)

    def flush(self) -> None:
        pass


def test_lines_of_ranks_that_share_a_terminal_do_not_mix(tmp_path, monkeypatch):
    """Each line is one write, end of line and all: two would let another rank's in between."""
    out, err = Writes(), Writes()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    log = Metrics(tmp_path, silo=1, leads=True)
    log.say("a step")
    log.warn("beware")
    pretrain_dept._tell(Launch(1, 2, 1, 2, "", 0), "what\nis wrong")
    monkeypatch.undo()
    assert out == ["a step\n"] and err == ["warning: silo 1: beware\n", "error: rank 1: what is wrong\n"]


def test_a_rank_that_leaves_the_telling_to_another_gives_it_time(tmp_path, monkeypatch):
    """A launcher ends all ranks when the first fails, and the one that speaks may be the slower."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert pretrain_dept.guarded([str(tmp_path / "none.yaml")]) == EXIT_USER_ERROR
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pretrain_dept.guarded([str(tmp_path / "none.yaml")]) == EXIT_USER_ERROR
    assert slept == [pretrain_dept.GRACE_SECONDS]


def test_help_names_usage_and_every_field():
    done = subprocess.run(
        [sys.executable, PROGRAM, "--help"], cwd=PROJECT, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: pretrain_dept.py [-h] [--dry-run] [--ranks RANKS] RUN.yaml")
    assert all(line in done.stdout for line in describe_fields())
    assert done.stderr == ""


def test_a_mistake_is_told_at_once_by_the_program_itself(tmp_path):
    """As a process of its own, exit code and all; told before torch has loaded, which takes seconds."""
    (tmp_path / "run.yaml").write_text("run_dir: x\nsuorces: []\n")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, PROGRAM, str(tmp_path / "run.yaml")],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}/run.yaml: ") and done.stderr.count("\n") == 1
    assert "unknown field suorces (value []); did you mean sources?" in done.stderr
    assert time.monotonic() - began < 5, "0.3 s alone; torch and DeepSpeed take longer"


def test_dry_run_prints_the_plan_and_touches_nothing(corpus, tmp_path):
    config = small_config(corpus, tmp_path / "run", parallel={"silos": 2}, dept={"variant": "trim"})
    outcome, other = run_command(config, 2, flags=["--dry-run", "--ranks", "4"])
    assert (outcome.code, outcome.stderr) == (0, "")
    assert (other.code, other.stdout, other.stderr) == (0, "", ""), "one rank speaks"
    assert not config.run_dir.exists()
    assert "2 silos x pipe 1 x data 2 x tensor 1, ZeRO 1, fp32, 1 micro-batches a step" in outcome.stdout
    assert "4 ranks;" in outcome.stdout
    for part in ("Rank map", "Memory", "glob", "trim", "spec", "spec_opt", "std", "act"):
        assert part in outcome.stdout, part
    assert "idle" not in outcome.stdout
    many = small_config(corpus, tmp_path / "many", parallel={"silos": 4}, dept={"variant": "trim"})
    (outcome,) = run_command(many, 1, flags=["--dry-run", "--ranks", "4"])
    assert outcome.stdout.splitlines().count("1 of 4 silos idle in every round; set parallel.silos: 3") == 1
