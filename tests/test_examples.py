"""The examples do what they say: every command that their READMEs show is run, as far as one machine allows.

Each runs in a folder that stands for the project's, with the small corpus where `your_own_text` would put the user's;
a launcher that is not here (a second node, Slurm) is played by this host.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_dept.common.seeding import generator_for
from megatron_dept.config.load import load_config
from tests.support.corpus import Corpus
from tests.support.distributed import free_port
from tests.support.runs import losses
from tests.test_launchers import FAKE_SRUN, mpirun, start_environment

PROJECT = Path(__file__).resolve().parents[1]
EXAMPLES = PROJECT / "examples"
NAMES = ("your_own_text", "changing_sources", "two_nodes", "slurm", "mpirun", "two_sites")
COMMAND = re.compile(
    r"^ {4}((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*(?:python|sbatch|examples/\S+)(?: .*?)?)(?:\s{2,}#.*)?$", re.MULTILINE
)
# What both sites share is no run: each says which silo it is.
RUNS = [file for name in NAMES for file in EXAMPLES.glob(f"{name}/*.yaml") if file.parent.name != "two_sites"]
RUNS += [EXAMPLES / "two_sites" / f"site_{site}.yaml" for site in "ab"]
LIMIT_SECONDS = 200
# As few steps as show two rounds, and a shorter model: these tests are of how a run starts.
SHORT = ["--dept.n_local", "1", "--model.num_layers", "1", "--evaluation.interval_rounds", "0"]


@pytest.fixture
def place(tmp_path: Path, corpus: Corpus) -> Path:
    """A folder like the project's, where the sources of the examples are prepared and `python` is this one."""
    for name in ("examples", "tools", "pretrain_dept.py", "megatron_dept"):
        (tmp_path / name).symlink_to(PROJECT / name)
    (tmp_path / "own" / "data").mkdir(parents=True)
    for name, source in (("first", "latin"), ("second", "greek")):
        (tmp_path / "own" / "data" / name).symlink_to(corpus.own_data[source])
    (tmp_path / "bin").mkdir()
    for name, line in (("python", '"$@"'), ("deepspeed", '-m deepspeed.launcher.runner -q "$@"')):
        file = tmp_path / "bin" / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {line}\n')
        file.chmod(0o755)
    return tmp_path


def environment(place: Path, **more: str) -> dict[str, str]:
    """A shell's environment in `place`, in which no launcher has set anything."""
    path = os.pathsep.join([str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return start_environment() | {"PATH": path} | more


def run(place: Path, *commands: Sequence[str], each: Sequence[dict[str, str]] = ({},)) -> list[str]:
    """Start the commands side by side, each with its own additions to the environment; what each printed."""
    processes = [
        subprocess.Popen(
            command,
            cwd=place,
            env=environment(place, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command, more in zip(commands, each, strict=True)
    ]
    printed = [""] * len(processes)

    def read(index: int) -> None:
        printed[index] = processes[index].communicate()[0]

    readers = [threading.Thread(target=read, args=(index,)) for index in range(len(processes))]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(LIMIT_SECONDS)
    late = [process for process in processes if process.poll() is None]
    for process in late:
        os.killpg(process.pid, 9)
    for reader in readers:
        reader.join()
    codes = [process.returncode for process in processes]
    assert not late and codes == [0] * len(processes), f"{codes}\n" + "\n----\n".join(printed)
    return printed


def shown(name: str) -> list[str]:
    """The commands of an example's README."""
    return COMMAND.findall((EXAMPLES / name / "README.md").read_text(encoding="utf-8"))


def two_silos(run_dir: Path) -> dict[tuple[str, int], float]:
    """The losses of a run of the two sources, each in a silo of its own."""
    assert len(list(run_dir.glob("metrics.silo*.jsonl"))) == 2
    found = losses(run_dir)
    assert {source for source, _ in found} == {"first", "second"} and len(found) == 4
    return found


def test_every_example_is_here_and_in_the_list():
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir()) == sorted([*NAMES, "clusters", "demo"])
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}/README.md)" in index for name in NAMES)


@pytest.mark.parametrize("script", [*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")], ids=lambda path: path.name)
def test_scripts_are_shell(script):
    subprocess.run(["sh" if script.suffix == ".sh" else "bash", "-n", str(script)], check=True)
    assert script.suffix == ".sbatch" or os.access(script, os.X_OK)


def test_readmes_show_commands_that_are_here():
    for name in NAMES:
        commands = shown(name)
        assert commands, name
        for command in commands:
            for word in shlex.split(command):
                if word.startswith(("examples/", "tools/")):
                    assert (PROJECT / word).exists(), f"{name}: {command}"


@pytest.mark.parametrize("file", RUNS)
def test_configurations_load(file):
    config = load_config(file)
    assert config.dept.variant == "spec_opt"
    assert config.run_dir != load_config(EXAMPLES / "run.yaml").run_dir


def seeded_text(name: str, part: int) -> str:
    """Sentences over 600 words of the source's own: enough for a tokenizer of 512 ids."""
    words = generator_for("example words", name).integers(ord("a"), ord("z") + 1, (600, 7))
    spelled = ["".join(map(chr, word)) for word in words]
    generator = generator_for("example text", name, part)
    sentences = (" ".join(generator.choice(spelled, 12)) for _ in range(40))
    return ".\n".join(sentences) + ".\n"


@pytest.mark.timeout(900)  # nine programs, each of which loads torch
def test_your_own_text(place):
    """Every command of the walk-through, in its order, on text that looks like a user's."""
    (place / "own").rename(place / "unused")
    for name in ("first", "second"):
        (place / "text" / name).mkdir(parents=True)
        for part in range(20):
            (place / "text" / name / f"{part}.txt").write_text(seeded_text(name, part), encoding="utf-8")
    commands = shown("your_own_text")
    assert len(commands) == 9
    printed = {}
    for command in commands:
        words = shlex.split(command)
        training = words[1] == "pretrain_dept.py"
        printed[command] = run(place, [*words, *SHORT] if training else words)[0]
    assert "first" in printed[commands[6]] and "second" in printed[commands[6]], "a score for each"
    assert {path.name for path in (place / "own" / "hf").iterdir()} == {"first", "second"}
    assert len(printed[commands[8]]) > len("Once")


def test_changing_sources(place):
    """Every command in its order; the first is stopped in the middle of its first round."""
    first, *others = [shlex.split(command) for command in shown("changing_sources")]
    # A round long enough to be stopped in.
    steps = ["--dept.n_local", "20", *SHORT[2:]]
    run_dir = place / "own" / "runs" / "changing-sources"
    with subprocess.Popen([*first, *steps], cwd=place, env=environment(place), stdout=subprocess.PIPE) as process:
        try:
            for line in process.stdout:
                if b"round 1/2 step 2/" in line:
                    process.terminate()
            assert process.wait(LIMIT_SECONDS) == 0
        finally:
            process.kill()
    for command in others:
        assert "sources: second joined" in run(place, [*command, *steps])[0]
    trained = [source for source, _ in losses(run_dir)]
    assert sorted(set(trained)) == ["first", "second"]
    assert (trained.count("first"), trained.count("second")) == (40, 20), "second in the second round alone"


@pytest.mark.long
def test_two_nodes(place):
    """Two launchers on this host, started as on two nodes without ssh."""
    node = ["examples/two_nodes/node.sh"]
    told = {
        "HOSTFILE": "examples/two_nodes/hostfile-one-host",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    assert f"HOSTFILE={told['HOSTFILE']} MASTER_ADDR=127.0.0.1 {node[0]} 1" in shown("two_nodes")
    run(place, [*node, "0", *SHORT], [*node, "1", *SHORT], each=[told, told])
    two_silos(place / "own" / "runs" / "two-nodes")


def test_the_hostfile_has_the_shape_of_the_one_that_was_tried():
    files = [(EXAMPLES / "two_nodes" / name).read_text() for name in ("hostfile", "hostfile-one-host")]
    hosts = [[line for line in text.splitlines() if not line.startswith("#")] for text in files]
    assert all(re.fullmatch(r"\S+ slots=1", line) for lines in hosts for line in lines)
    assert [len(lines) for lines in hosts] == [2, 2]


@pytest.mark.long
@pytest.mark.timeout(450)
def test_mpirun_and_slurm_train_the_same(place):
    command = mpirun()
    allowed = " ".join(word for word in command if word.startswith("--"))
    run(place, ["examples/mpirun/run.sh", *SHORT], each=[{"MPIRUN_ARGS": allowed}])
    by_mpirun = two_silos(place / "own" / "runs" / "mpirun")
    srun = place / "bin" / "srun"
    srun.write_text(FAKE_SRUN)
    srun.chmod(0o755)
    # As sbatch starts it: in a job, from a copy elsewhere.
    job = place / "job-4711"
    job.write_text((EXAMPLES / "slurm" / "job.sbatch").read_text())
    run(place, ["bash", str(job), *SHORT], each=[{"SLURM_SUBMIT_DIR": str(place), "SLURM_JOB_ID": "4711"}])
    assert two_silos(place / "own" / "runs" / "slurm") == by_mpirun


def test_two_sites(place):
    """Two launches that know only one address of each other."""
    (place / "own" / "federation.token").write_text("between the two of us\n")
    meet = ["--federation.address", f"127.0.0.1:{free_port()}", *SHORT]
    site = "examples/two_sites/site.sh"
    ports = [{"MASTER_PORT": str(free_port())} for _ in range(2)]
    run(place, [site, "a", *meet], [site, "b", *meet], each=ports)
    for name, source in (("site-a", "first"), ("site-b", "second")):
        assert set(losses(place / "own" / "runs" / name)) == {(source, 0), (source, 1)}


def test_commands_are_found():
    """The pattern that finds a README's commands, on lines of each kind."""
    lines = ["    python x.py --a b", '    A=b C="d e" examples/x.sh 0      # here', "    text/first/*.txt", "python x"]
    assert COMMAND.findall("\n".join(lines)) == ["python x.py --a b", 'A=b C="d e" examples/x.sh 0']
    assert socket.gethostbyname("localhost") == "127.0.0.1", "which the example on one host counts on"
