"""Every command that README and the documents show is one that `make`, the demo or another test runs."""

import re
import shlex
from pathlib import Path

import plan_run
import pytest
from demo_corpora.catalogue import ONLINE
from demo_job.steps import Sources, plan_steps

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^ {4}(?:\$ )?((?:make|python|deepspeed|torchrun|pip) .*?)(?:\s{2,}#.*)?$", re.MULTILINE)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def demo_commands() -> list[list[str]]:
    """Every command of `make demo-all`, as words."""
    trained, held_out = ([corpus.name for corpus in ONLINE if corpus.role == role] for role in ("trained", "held_out"))
    return [list(step.command) for step in plan_steps(ROOT, Sources(trained, held_out, online=True), True, False)]


def commands(document: Path) -> list[str]:
    """The commands that a document shows: indented lines, continued ones joined, comments taken off."""
    return COMMAND.findall(document.read_text(encoding="utf-8").replace("\\\n", ""))


def is_run(command: str) -> bool:
    """Whether a make target, or a step of the demo, is this command; a plan on paper is made here and now."""
    words = shlex.split(command)
    if words[1:2] == ["tools/plan_run.py"]:
        return plan_run.main(words[2:]) == 0
    if words[0] == "make":
        return {word for word in words[1:] if "=" not in word} <= TARGETS
    return words in demo_commands()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_run(document: Path) -> None:
    assert [command for command in commands(document) if not is_run(command)] == []


def test_the_readme_shows_commands_of_both_kinds() -> None:
    shown = commands(ROOT / "README.md")
    assert any(command.startswith("make ") for command in shown)
    assert any(command.startswith("deepspeed ") for command in shown)
