"""What a user gets wrong in configuration and data: one line that names it and the remedy, an exit code that is not
zero on every rank, and nothing half-written. (Text that is no UTF-8 or no JSON never gets this far: tests/data.)"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dept.config.schema import RunConfig
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.topology.launch import Launch
from tests.support.commands import Outcome, run_command, told
from tests.support.corpus import Corpus, write_dataset
from tests.support.distributed import run_ranks
from tests.support.faults import without_package
from tests.support.runs import metrics, small_config

AGAIN = "make the dataset again with tools/preprocess_data.py"
Change = Callable[[Path], Any]


def refused(config: RunConfig, ranks: int = 2, **options: Any) -> str:
    """The line that a start of `config` is refused with, before it has written anything."""
    line = told(run_command(config, ranks, **options))
    assert not config.run_dir.exists(), "something was written"
    return line


def changed(corpus: Corpus, place: Path, name: str, change: Change) -> Corpus:
    """The corpus with a changed copy of one dataset."""
    copy = shutil.copytree(corpus.data[name], place / name)
    change(copy)
    return replace(corpus, data={**corpus.data, name: copy})


def cut(file: str, by: int) -> Change:
    """Shorten a file by some bytes."""
    return lambda directory: (directory / file).write_bytes((directory / file).read_bytes()[:-by])


def with_ids(file: str, id: int) -> Change:
    """Every tenth token becomes `id`: some are in any batch."""

    def change(directory: Path) -> None:
        tokens = np.fromfile(directory / file, np.uint16)
        tokens[::10] = id
        tokens.tofile(directory / file)

    return change


CONFIGURATIONS = {
    "field": (["--dept.n_locl=3"], "unknown field dept.n_locl (value 3); did you mean n_local?"),
    "layout": (
        ["--parallel.silos=3"],
        "2 ranks cannot be cut into parallel.silos 3 x pipe 1 x tensor 1; launch a multiple of 3 ranks or set "
        "parallel.silos to a divisor of 2",
    ),
    "batch": (
        ["--training.micro_batch_size=4"],
        "training.global_batch_size 4 is not a multiple of micro_batch_size 4 x 2 data-parallel ranks; "
        "set it to a multiple of 8",
    ),
    "fp16": (["--training.precision=fp16"], "choose bf16 or fp32"),
    "bf16 and ZeRO 0": (
        ["--training.precision=bf16", "--parallel.zero_stage=0"],
        "precision bf16 with parallel.zero_stage 0 is refused; set parallel.zero_stage: 1",
    ),
    "monitor": (
        ["--logging.wandb=true"],
        "logging.wandb needs the package wandb, which is not installed; pip install wandb, or set logging.wandb: false",
    ),
    "name": (["--run_dir"], "flag --run_dir has no value; write --run_dir VALUE"),
    "option": (["--ranks", "many"], "argument --ranks: 'many' is not an integer; pretrain_dept.py --help lists"),
    "plan without a plan": (["--ranks", "4"], "--ranks is for --dry-run alone"),
    "plan of an impossible layout": (
        ["--dry-run", "--ranks", "3", "--parallel.silos=2"],
        "3 ranks cannot be cut into parallel.silos 2",
    ),
}


@pytest.mark.parametrize("mistake", CONFIGURATIONS)
def test_configuration(corpus, tmp_path, mistake):
    flags, says = CONFIGURATIONS[mistake]
    config = small_config(corpus, tmp_path / "run")
    outcomes = run_command(config, 2, flags=flags, fault=without_package("wandb"))
    assert says in told(outcomes)
    assert not config.run_dir.exists()
    if mistake != "plan of an impossible layout":
        assert [bool(outcome.stderr) for outcome in outcomes] == [True, False], "one line a node is enough"


DAMAGES: dict[str, tuple[Change, str]] = {
    "no directory": (shutil.rmtree, f"{{}} is not a dataset directory: it has no card.json; {AGAIN}"),
    "a truncated .bin": (cut("train.bin", 2), f"{{}}/train.bin is * bytes, but train.idx describes * bytes; {AGAIN}"),
    "a truncated .idx": (cut("train.idx", 1), f"{{}}/train.idx is * bytes, but its header * implies *; {AGAIN}"),
    "no .bin": (lambda path: (path / "train.bin").unlink(), f"{{}}/train.bin cannot be read (No such file *); {AGAIN}"),
    "an empty .idx": (
        lambda path: (path / "train.idx").write_bytes(b""),
        f"{{}}/train.idx is truncated: 0 bytes, less than its header of 34; {AGAIN}",
    ),
    "a foreign .idx": (
        lambda path: (path / "train.idx").write_bytes(b"TNTIDX\0\0\0" + (path / "train.idx").read_bytes()[9:]),
        f"{{}}/train.idx is not a Megatron index: it starts with b'TNTIDX*', not *; {AGAIN}",
    ),
    "another dataset's .bin": (
        lambda path: shutil.copy(path / "heldout.bin", path / "train.bin"),
        f"{{}}/train.bin is * bytes, but train.idx describes * bytes; {AGAIN}",
    ),
    "another split's files": (
        lambda path: [shutil.copy(path / f"heldout.{end}", path / f"train.{end}") for end in ("bin", "idx")],
        f"{{}}/train.idx has 6 documents, but {{}}/card.json says 60; {AGAIN}",
    ),
    "another tokenizer": (
        lambda path: (path / "tokenizer.model").write_bytes(b"other"),
        f"{{}}/tokenizer.model has fingerprint *, but card.json names *; {AGAIN}",
    ),
    "no tokenizer": (
        lambda path: (path / "tokenizer.model").unlink(),
        f"{{}}/tokenizer.model, the tokenizer that card.json names, does not exist; {AGAIN}",
    ),
    "a truncated card": (cut("card.json", 1), "{}/card.json is not valid JSON (*); make it again"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_dataset_that_is_damaged(corpus, tmp_path, damage):
    change, pattern = DAMAGES[damage]
    line = refused(small_config(changed(corpus, tmp_path, "greek", change), tmp_path / "run"))
    parts = pattern.replace("{}", str(tmp_path / "greek")).split("*")
    assert line.startswith(parts[0]) and line.endswith(parts[-1]), line
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("documents, has", [([], "0 tokens"), (["a"], "2 tokens")], ids=["empty", "short"])
def test_a_source_with_too_few_tokens(corpus, tmp_path, documents, has):
    model = (corpus.data["latin"] / "tokenizer.model").read_bytes()
    small = write_dataset(tmp_path / "small", "small", model, documents, ["held out text"])
    line = refused(small_config(replace(corpus, data={**corpus.data, "latin": small}), tmp_path / "run"))
    assert line == (
        f"source latin: {small / 'train'} has {has}, too few for one sample of seq_length 32 + 1; "
        "add text or lower model.seq_length"
    )


def test_a_source_without_heldout_text(corpus, tmp_path):
    model = (corpus.data["latin"] / "tokenizer.model").read_bytes()
    unscored = write_dataset(tmp_path / "unscored", "unscored", model, ["some text to train on " * 20], [])
    config = small_config(
        replace(corpus, data={**corpus.data, "latin": unscored}), tmp_path / "run", evaluation={"interval_rounds": 1}
    )
    line = told(run_command(config, 2))
    assert "held-out split of 0 tokens has nothing to score; preprocess the source with a larger held-out share" in line


@pytest.mark.parametrize("variant", ["glob", "trim", "std"])
def test_an_id_outside_the_vocabulary(corpus, tmp_path, variant):
    """60,000 is in no vocabulary here; it is found when the batch that holds it is, on whichever silo that is."""
    damaged = changed(corpus, tmp_path, "greek", with_ids("train.bin", 60_000))
    silos = 1 if variant == "std" else 2
    config = small_config(
        damaged, tmp_path / "run", dept={"variant": variant}, source_names=["latin", "greek"], parallel={"silos": silos}
    )
    lines = ending(run_command(config, 2))
    assert "source greek: id 60000 is outside the vocabulary of 421; the data and the tokenizer do not match" in lines
    assert not list(tmp_path.glob("run/checkpoints/*/manifest.json"))


def test_an_id_outside_the_vocabulary_in_heldout_text(corpus, tmp_path):
    damaged = changed(corpus, tmp_path, "greek", with_ids("heldout.bin", 60_000))
    config = small_config(
        damaged,
        tmp_path / "run",
        source_names=["latin", "greek"],
        parallel={"silos": 2},
        evaluation={"interval_rounds": 1},
    )
    assert (
        "greek: held-out split: id 60000 is outside the vocabulary of 421; the data and the tokenizer do not match"
        in ending(run_command(config, 2))
    )
    assert not metrics(config.run_dir, "step"), "it is found before a step is trained"


def test_an_id_outside_the_sources_own_vocabulary(corpus, tmp_path):
    """An id of the tokenizer that the training split's counts say it has not."""
    dataset = DatasetDirectory.open(corpus.data["greek"])
    stranger = int(np.setdiff1d(np.arange(421), dataset.vocabulary())[0])
    damaged = changed(corpus, tmp_path, "greek", with_ids("train.bin", stranger))
    config = small_config(
        damaged, tmp_path / "run", dept={"variant": "trim"}, source_names=["latin", "greek"], parallel={"silos": 2}
    )
    known = len(dataset.vocabulary())
    assert (
        f"source greek: id {stranger} is not among the {known} ids of the source's vocabulary; "
        "the data and the vocabulary are of different sources or tokenizers"
    ) in ending(run_command(config, 2))


def ending(outcomes: list[Outcome]) -> list[str]:
    """The lines of a run that one silo's mistake ends: its own, and the other's, which lost it."""
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    return [outcome.error.partition(": ")[2].partition(": ")[2] for outcome in outcomes]


def test_data_of_another_tokenizer_than_the_global_one(corpus, tmp_path):
    other = corpus.own_data["latin"] / "tokenizer.model"
    line = refused(small_config(corpus, tmp_path / "run", tokenizer=str(other)))
    assert line.startswith(
        f"{corpus.data['latin']} was made with the tokenizer {corpus.data['latin']}/tokenizer.model ("
    )
    assert f"), not {other} (" in line and line.endswith(f"); give that tokenizer, or {AGAIN}")


def test_two_sources_of_different_tokenizers(corpus, tmp_path):
    mixed = replace(corpus, data={**corpus.data, "greek": corpus.own_data["greek"]})
    line = refused(small_config(mixed, tmp_path / "run", tokenizer=None))
    assert line.startswith(f"{corpus.own_data['greek']} was made with the tokenizer ")
    assert f", not {corpus.data['latin']}/tokenizer.model (" in line


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("none", None, "does not exist"),
        ("text.model", "no model", "{}"),
        ("text.json", "{}", "{}"),
        ("text.txt", "", "neither a .model nor a .json file"),
    ],
)
def test_a_tokenizer_that_is_none(corpus, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    line = refused(small_config(corpus, tmp_path / "run", tokenizer=str(tmp_path / name)))
    assert str(tmp_path / name) in line and says.format(tmp_path / name) in line


def test_the_name_of_the_mixture_is_taken(corpus, tmp_path):
    renamed = replace(corpus, data={"mixture": corpus.data["latin"]}, own_data={"mixture": corpus.own_data["latin"]})
    line = refused(small_config(renamed, tmp_path / "run"))
    assert line == "sources: the name 'mixture' is the blend's; choose another"


def test_a_run_dir_that_is_a_file(corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = told(run_command(small_config(corpus, tmp_path / "file" / "run"), 1, file=tmp_path / "run.yaml"))
    assert line.startswith(f"{tmp_path / 'file' / 'run'}: Not a directory; ")
    assert (tmp_path / "file").read_text() == "mine"


def alone(launch: Launch, config: RunConfig) -> str:
    """Rank 0 of two, the other of which never comes."""
    from megatron_dept.common.errors import FederationError
    from megatron_dept.training.setup import run

    try:
        run(config, replace(launch, world_size=2, local_world_size=2))
    except FederationError as error:
        return str(error)
    return "met somebody"


def test_a_rank_that_is_never_started(corpus, tmp_path):
    config = small_config(corpus, tmp_path / "run", parallel={"silos": 2}, training={"timeout_seconds": 2})
    (line,) = run_ranks(1, alone, config, limit=30)
    assert line.startswith("rank 0 of 2 could not meet the others at 127.0.0.1:")
    remedy = "; check that every rank was started and that the port is free, or choose another (--master_port)"
    assert line.endswith(remedy)
    assert not config.run_dir.exists()
