"""The environment of the make targets: which Python, and which pins where packages are present already."""

import subprocess
import sys
from pathlib import Path

import pytest
import setup_environment as environment


def test_pins_name_torch_first_and_every_line_is_exact() -> None:
    pins = environment.read_pins(environment.CONSTRAINTS.read_text())
    assert next(iter(pins)) == "torch" and pins["torch"] == "2.13.0"
    assert pins["deepspeed"] == "0.19.8"
    lines = [line for line in environment.CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(pins), "a package is pinned twice, or a line is not name==version"


def test_what_a_given_environment_has_is_kept() -> None:
    text = "torch==2.13.0\nmarkdown-it-py==4.3.0\nnumpy==2.4.6\n"
    kept = environment.constraints_for(text, {"torch": "2.11.0+cu130", "Markdown_It.Py": "3.0"})
    assert kept == "torch==2.11.0+cu130\nnumpy==2.4.6\n"
    assert environment.constraints_for(text, {}) == text


@pytest.mark.parametrize(
    ("version", "enough"), [("2.10.1", False), ("2.11.0a0+git", True), ("2.13.0+cpu", True), ("3.0", True)]
)
def test_a_given_python_is_used_only_with_a_new_enough_torch(
    version: str, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setattr(environment, "installed", lambda python: {"torch": version})
    python, given = environment.choose_environment()
    assert given is enough
    assert python == (Path(sys.executable) if enough else environment.OWN / "bin" / "python")


def test_without_a_given_python_it_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert environment.choose_environment() == (environment.OWN / "bin" / "python", False)


def test_a_python_that_is_none_is_a_one_line_error() -> None:
    script = environment.ROOT / "tools" / "setup_environment.py"
    done = subprocess.run(
        [sys.executable, str(script), "--print-python"], env={"PYTHON": "no-such"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: PYTHON=no-such is not a program; name a Python 3.11 or newer\n"
    assert done.stdout == ""


def test_ensurepip_missing_is_filled_by_the_outer_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1 if command[2] == "venv" and "--without-pip" not in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    environment.create(tmp_path / "v")
    assert [command[2] for command in commands] == ["venv", "venv", "pip"]
    assert commands[2][3:5] == ["--python", str(tmp_path / "v" / "bin" / "python")]


def test_stamp_changes_with_pins_and_native_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "setup_environment.py"))
    (tmp_path / "csrc").mkdir()
    seen = [environment.fingerprint(Path("p"))]
    for name in ("constraints.txt", "setup.py", "csrc/a.cpp"):
        (tmp_path / name).write_text("x")
        seen.append(environment.fingerprint(Path("p")))
    assert len(set(seen)) == len(seen)
    assert environment.fingerprint(Path("p")) == seen[-1]
    assert environment.fingerprint(Path("q")) != seen[-1]
