"""The demo's plan and its runner: what is run, what is skipped, what goes on, and what a failure leaves."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo
import pytest
import yaml
from demo_corpora.catalogue import OFFLINE, ONLINE
from demo_job import runner as runner_module
from demo_job.runner import Runner, StepFailed, WholeProgress, fraction_done, is_finished
from demo_job.steps import EXAMPLES, METHODS, PROMPTS, Sources, Step, plan_steps

from megatron_dept.common.errors import UserError
from megatron_dept.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]


def online() -> Sources:
    return Sources(
        trained=[c.name for c in ONLINE if c.role == "trained"],
        held_out=[c.name for c in ONLINE if c.role == "held_out"],
        online=True,
    )


def offline() -> Sources:
    return Sources(
        trained=[c.name for c in OFFLINE if c.role == "trained"],
        held_out=[c.name for c in OFFLINE if c.role == "held_out"],
        online=False,
    )


def training_steps(sources: Sources) -> list[Step]:
    return [step for step in plan_steps(ROOT, sources, True, False) if step.run_dir is not None]


def config_of(step: Step):  # type: ignore[no-untyped-def]
    """The configuration that a training step's command loads."""
    config, *flags = step.command[5:]
    return load_config(ROOT / config, flags)


# --- the plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [False, True])
def test_every_step_stands_after_what_it_needs(every: bool) -> None:
    seen: set[str] = set()
    for step in plan_steps(ROOT, online(), every, False):
        assert set(step.after) <= seen, step.name
        assert step.name not in seen
        seen.add(step.name)
    runs = {step.run_dir for step in plan_steps(ROOT, online(), every, False) if step.run_dir is not None}
    assert len(runs) == (7 + 7 + 5 if every else 4 + 4)


def test_the_default_is_four_methods_with_one_adapt_each() -> None:
    names = {step.name for step in plan_steps(ROOT, online(), False, False)}
    for method in ("std-tau1", "glob", "trim", "spec_opt"):
        assert {f"pretrain-{method}", f"adapt-{method}-random", f"evaluate-{method}-adapt-random"} <= names
    assert not any("std-tau0" in name or name.endswith("-own") for name in names)
    every = {step.name for step in plan_steps(ROOT, online(), True, False)}
    assert {f"adapt-{name}-own" for name in ("std-tau0", "std-tau1", "act", "glob", "trim")} <= every
    assert {f"adapt-{method.name}-random" for method in METHODS} <= every


@pytest.mark.parametrize("sources", [online(), offline()], ids=["online", "offline"])
def test_every_training_command_is_a_loadable_configuration(sources: Sources) -> None:
    for step in training_steps(sources):
        config = config_of(step)
        assert config.run_dir == step.run_dir
        assert [source.name for source in config.sources] == sources.trained
        assert config.phase == ("adapt" if step.name.startswith("adapt") else "pretrain")
        if config.adapt is not None:
            (needed,) = step.after
            assert config.adapt.checkpoint == Path("demo/runs") / needed.removeprefix("pretrain-")


def test_methods_train_the_same_total_tokens_from_the_same_seed() -> None:
    tokens, seeds, adapt_tokens = set(), set(), set()
    for step in training_steps(online()):
        config = config_of(step)
        streams = 1 if config.dept.synchronous else (config.dept.sources_per_round or len(config.sources))
        trained = config.total_steps * streams * config.training.global_batch_size * config.model.seq_length
        (tokens if config.phase == "pretrain" else adapt_tokens).add(trained)
        seeds.add(config.seed)
        assert config.total_steps > config.optimizer.warmup_steps
    assert len(tokens) == len(adapt_tokens) == len(seeds) == 1


def test_every_file_of_the_examples_is_used_or_a_base() -> None:
    used = {str(file) for step in training_steps(online()) for file in step.files}
    shipped = {f"{EXAMPLES}/{path.name}" for path in (ROOT / EXAMPLES).glob("*.yaml")}
    assert used == shipped


def test_examples_that_are_runs_load_by_themselves() -> None:
    for path in (ROOT / EXAMPLES).glob("*.yaml"):
        if "run_dir" in yaml.safe_load(path.read_text()):
            load_config(path)


def test_without_a_network_the_sources_are_told_by_a_flag() -> None:
    common = ROOT / EXAMPLES / "common.yaml"
    assert online().flags(common) == ()
    flag, value = offline().flags(common)
    assert flag == "--sources" and [source["name"] for source in yaml.safe_load(value)] == offline().trained
    wrong = Sources(trained=["a"], held_out=[], online=True)
    with pytest.raises(UserError, match="make them agree"):
        wrong.flags(common)


def test_exports_and_prompts_name_sources_that_are_always_there() -> None:
    for sources in (online(), offline()):
        assert "python-code" in sources.trained
        steps = {step.name: step for step in plan_steps(ROOT, sources, False, False)}
        assert steps["generate-spec_opt"].command[-1] == PROMPTS["spec_opt"]


def test_tools_know_every_option_that_the_plan_gives_them() -> None:
    used: dict[str, set[str]] = {}
    for step in plan_steps(ROOT, online(), True, True):
        if step.command[0] == "python":
            used.setdefault(step.command[1], set()).update(a for a in step.command if a.startswith("--"))
    for tool, options in used.items():
        source = (ROOT / tool).read_text()
        assert all(f'"{option}"' in source for option in options), (tool, options)


# --- the runner ---------------------------------------------------------------------------------------------------


def python(code: str, name: str = "step", **more) -> Step:  # type: ignore[no-untyped-def]
    return Step(name, (sys.executable, "-c", code), 0.2, **more)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(runner_module, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(runner_module, "gpu_count", lambda: 0)
    return Runner(tmp_path, cores=2)


COUNT = "import pathlib; p = pathlib.Path('{0}'); p.write_text((p.read_text() if p.exists() else '') + 'x')"


def runs_of(runner: Runner, name: str) -> int:
    path = runner.root / name
    return len(path.read_text()) if path.exists() else 0


def test_a_finished_step_is_skipped_and_a_changed_one_is_made_anew_with_all_behind_it(
    runner: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    (runner.root / "a.yaml").write_text("1")
    first = python(COUNT.format("first"), "first", files=(Path("a.yaml"),))
    second = python(COUNT.format("second"), "second", after=("first",))
    beside = python(COUNT.format("beside"), "beside")
    steps = [first, second, beside]
    runner.run(steps)
    assert "[1/3] $ " in capfd.readouterr().err
    runner.run(steps)
    assert [runs_of(runner, name) for name in ("first", "second", "beside")] == [1, 1, 1]
    assert "3 of 3 steps are done already" in capfd.readouterr().err
    (runner.root / "a.yaml").write_text("2")
    runner.run(steps)
    assert [runs_of(runner, name) for name in ("first", "second", "beside")] == [2, 2, 1]
    stamp = json.loads((runner.stamps / "second.json").read_text())
    assert stamp["command"] == second.text and stamp["seconds"] >= 0


def test_a_failure_shows_the_end_of_the_log_and_the_command(runner: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    good = python(COUNT.format("good"), "good")
    bad = python("import sys; print('reason 17'); sys.exit(3)", "bad", after=("good",))
    never = python(COUNT.format("never"), "never", after=("bad",))
    with pytest.raises(StepFailed, match="step bad failed with exit code 3: .*run the same command again"):
        runner.run([good, bad, never])
    assert "reason 17" in capfd.readouterr().err
    assert (runner.logs / "02-bad.log").read_text().startswith(f"$ {bad.text}\n")
    assert runs_of(runner, "never") == 0 and not (runner.stamps / "bad.json").exists()
    with pytest.raises(StepFailed):
        runner.run([good, bad, never])
    assert runs_of(runner, "good") == 1


TRAIN = """
import json, os, pathlib, sys
run = pathlib.Path("runs/a"); run.mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text("dept: {rounds: 2}")
done = len(list(run.glob("checkpoints/*/manifest.json")))
folder = run / "checkpoints" / str(done); folder.mkdir(parents=True)
(folder / "manifest.json").write_text(json.dumps({"round": done + 1}))
"""


def test_a_training_run_that_stopped_early_is_no_success_and_goes_on(runner: Runner) -> None:
    step = python(TRAIN, "train", run_dir=Path("runs/a"), cores=2)
    with pytest.raises(StepFailed, match="was stopped before its last round"):
        runner.run([step])
    runner.run([step])
    assert len(list(runner.root.glob("runs/a/checkpoints/*"))) == 2 and is_finished(runner.root, step)
    assert (runner.logs / "01-train.log").read_text().count("$ ") == 2, "the log goes on too"


def test_a_training_run_of_another_configuration_does_not_go_on(runner: Runner) -> None:
    with pytest.raises(StepFailed):
        runner.run([python(TRAIN, "train", run_dir=Path("runs/a"))])
    with pytest.raises(StepFailed):
        runner.run([python(TRAIN + "# another", "train", run_dir=Path("runs/a"))])
    assert len(list(runner.root.glob("runs/a/checkpoints/*"))) == 1


MEET = """
import pathlib, time
pathlib.Path("{0}").touch()
end = time.monotonic() + 5
while not pathlib.Path("{1}").exists():
    assert time.monotonic() < end, "ran alone"
    time.sleep(0.01)
"""


def test_one_core_steps_run_side_by_side_and_launches_alone(runner: Runner) -> None:
    runner.run([python(MEET.format("a", "b"), "a"), python(MEET.format("b", "a"), "b")])
    alone = (
        "import pathlib, time; p = pathlib.Path('busy'); assert not p.exists(); p.touch(); time.sleep(.05); p.unlink()"
    )
    wide = Runner(runner.root, cores=8)
    done = "pathlib.Path('r').mkdir(exist_ok=True); pathlib.Path('r/config.yaml').write_text('dept: {rounds: 0}');"
    done += "pathlib.Path('r/checkpoints/0').mkdir(parents=True, exist_ok=True);"
    done += "pathlib.Path('r/checkpoints/0/manifest.json').write_text('{\\\"round\\\": 0}')"
    wide.run([python(f"{alone}; {done}; {number}", str(number), run_dir=Path("r"), cores=2) for number in range(2)])


CHILD = """
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    pathlib.Path("saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_stopping_waits_for_a_launchers_ranks_to_save_and_leaves_none(runner: Runner) -> None:
    """The leader of the group goes at once, as a launcher does; its child takes its time."""
    step = python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])", "long")
    log = runner.logs / "01-long.log"

    def pids() -> list[int]:
        return [int(line) for line in log.read_text().splitlines()[1:]] if log.exists() else []

    class Stopped(Exception):
        pass

    real = runner._look

    def look(*arguments) -> None:  # type: ignore[no-untyped-def]
        real(*arguments)
        if pids():
            raise Stopped

    runner._look = look  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        runner.run([step])
    assert (runner.root / "saved").exists()
    assert not _alive(*pids()), "a child of the step outlived the demo"


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_commands_run_on_the_cpu_unless_each_rank_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for gpus, expected in ((0, "cpu"), (1, "cpu"), (2, None)):
        monkeypatch.setattr(runner_module, "gpu_count", lambda gpus=gpus: gpus)
        environment = runner_module.step_environment()
        assert environment.get("DS_ACCELERATOR") == expected
        assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_time_left_follows_the_pace_of_this_machine() -> None:
    now = 0.0
    stream = io.StringIO()
    with WholeProgress("demo", 100.0, completed=20.0, stream=stream, clock=lambda: now) as progress:
        now = 30.0
        progress.advance(10.0)
        assert progress.seconds_left() == 70.0 * 30.0 / 10.0
    assert "30 %, 30 s so far, 3 min 30 s left" in stream.getvalue()


def test_progress_of_a_training_run_is_read_from_its_log() -> None:
    assert fraction_done("round 1/6 step 15/180 de loss 7.1 lr 1e-3") == pytest.approx((0 + 15 / 180) / 2)
    assert fraction_done("saved demo/runs/glob") is None


def test_ctrl_c_ends_the_demo_with_its_exit_code(tmp_path: Path) -> None:
    code = (
        # A shell that runs the tests in the background has them, and their children, ignore Ctrl-C.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "from pathlib import Path\nfrom demo_job.runner import Runner\nfrom demo_job.steps import Step\n"
        "from megatron_dept.common.cli import run_tool\n"
        "def main(argv=None):\n"
        "    command = (sys.executable, '-c', 'import time; time.sleep(60)')\n"
        "    Runner(Path(sys.argv[3]), 2).run([Step('s', command, 1.0)])\n"
        "    return 0\n"
        "run_tool(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT / "tools"), str(ROOT), str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "demo/logs/01-s.log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and "stopped by the user" in error


def test_the_end_shows_what_a_shorter_plan_generated(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make demo-all` after `make demo`: the step is done already, and its log has the number it had then."""
    runner.logs.mkdir(parents=True)
    (runner.logs / "37-generate-glob.log").write_text("$ python tools/generate.py\nOnce upon a time\n")
    report = runner.root / "demo" / "report" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"findings": ["DEPT was trained."]}))
    monkeypatch.setattr(demo, "ROOT", runner.root)
    demo._show([Step("first", ("true",), 1.0), Step("generate-glob", ("true",), 1.0)], runner, 1.0)
    said = capsys.readouterr().out
    assert "generate-glob:\n    Once upon a time\n" in said and "- DEPT was trained." in said
