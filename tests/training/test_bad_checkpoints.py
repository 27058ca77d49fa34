"""Checkpoints that do not fit, are damaged or cannot be written: one line each, and the good ones stay as they were."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dept.checkpoint.reader import Checkpoint, committed
from megatron_dept.config.schema import RunConfig
from megatron_dept.data.directory import DatasetDirectory
from tests.support.commands import run_command, told, tree
from tests.support.corpus import Corpus
from tests.support.faults import full_disk, little_space
from tests.support.runs import final_state, largest_difference, losses, small_config, train

NAMES = ["latin", "greek"]


def two_silos(corpus: Corpus, run_dir: Path, **sections: Any) -> RunConfig:
    """Two silos of one rank, a source each; two rounds of two steps."""
    dept = {"variant": "trim", "rounds": 2, "n_local": 2, **sections.pop("dept", {})}
    return small_config(corpus, run_dir, source_names=NAMES, dept=dept, parallel={"silos": 2}, **sections)


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `two_silos`, with a checkpoint a round. Tests work on copies of it (`again`)."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train(two_silos(corpus, run_dir), ranks=2)
    assert len(committed(run_dir / "checkpoints")) == 2
    return run_dir


@pytest.fixture
def again(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "hidden_size": ({"model": {"hidden_size": 64}}, "model.hidden_size 32, this run has 64"),
    "layers": ({"model": {"num_layers": 3}}, "model.num_layers 2, this run has 3"),
    "family": ({"model": {"family": "llama"}}, "model.family gpt, this run has llama"),
    "variant": ({"dept": {"variant": "glob"}}, "dept.variant trim, this run has glob"),
    "n_local": ({"dept": {"n_local": 3}}, "dept.n_local 2, this run has 3"),
    "outer": ({"dept": {"outer": {"learning_rate": 0.7}}}, "dept.outer.learning_rate 1.0, this run has 0.7"),
    "seed": ({"seed": 7}, "seed 1234, this run has 7"),
    "rate": ({"optimizer": {"learning_rate": 1e-3}}, "optimizer.learning_rate 0.003, this run has 0.001"),
    "batch": ({"training": {"global_batch_size": 8}}, "training.global_batch_size 4, this run has 8"),
    "precision": ({"training": {"precision": "bf16"}}, "training.precision fp32, this run has bf16"),
}


def refused_resumption(config: RunConfig) -> str:
    """How the checkpoint differs from `config`, as the refusal has it; nothing in the run's directory has changed."""
    before = tree(config.run_dir)
    line = told(run_command(config, 2))
    assert tree(config.run_dir) == before
    head = f"{config.run_dir}/checkpoints/step-00000008 was trained with "
    tail = "; set it back, or choose another run_dir for a new run"
    assert line.startswith(head) and line.endswith(tail), line
    return line[len(head) : -len(tail)]


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_another_run(corpus, again, change):
    values, says = CHANGES[change]
    assert refused_resumption(two_silos(corpus, again, **values)) == says


@pytest.mark.parametrize("names", [["latin"], ["latin", "greek", "code"], ["latin", "code"]])
def test_more_than_the_sources_makes_another_run(corpus, again, names):
    """Sources may join and leave (`test_source_changes`); what else differs is refused as ever."""
    config = small_config(corpus, again, source_names=names, dept={"variant": "trim"}, parallel={"silos": 2})
    assert refused_resumption(config) == "dept.n_local 2, this run has 3"


def test_resuming_under_another_tokenizer(corpus, again):
    other = replace(corpus, data=dict.fromkeys(corpus.data, corpus.own_data["latin"]))
    then, now = (
        DatasetDirectory.open(path).card["tokenizer"]["fingerprint"][:12]
        for path in (corpus.data["latin"], corpus.own_data["latin"])
    )
    says = refused_resumption(two_silos(other, again, tokenizer=None))
    assert says == f"source latin under tokenizer {then}, this run has {now}"


def test_resuming_on_other_data_under_the_same_tokenizer(corpus, again):
    """A source's rows stand for the ids it had, and its cursor for samples of its text: other data has neither."""
    exchanged = replace(corpus, data={**corpus.data, "latin": corpus.data["code"]})
    says = refused_resumption(two_silos(exchanged, again))
    text = r"60 documents, \d+ tokens, counts [0-9a-f]+"
    assert re.fullmatch(rf"source latin of text {text}, this run has {text}", says), says


def test_a_run_that_changes_what_it_may_goes_on(corpus, again):
    """The other side of the refusals: layout, logs and intervals are no part of what the numbers depend on."""
    shutil.rmtree(committed(again / "checkpoints")[-1])
    config = small_config(
        corpus,
        again,
        source_names=NAMES,
        dept={"variant": "trim", "n_local": 2, "max_bad_steps": 9},
        checkpoint={"keep_last": 5},
        logging={"interval_steps": 2},
    )
    (outcome,) = run_command(config, 1)
    assert outcome.code == 0 and "resuming from" in outcome.stdout
    assert len(committed(again / "checkpoints")) == 2


Damage = Callable[[Path], Any]


def shorten(name: str) -> Damage:
    """Cut a file of a checkpoint to half."""
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[: (path / name).stat().st_size // 2])


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (shorten("part-00001.safetensors"), "/part-00001.safetensors has * bytes, not *; "),
    "missing": (lambda path: (path / "part-00000.safetensors").unlink(), "/part-00000.safetensors is missing; "),
    "garbage": (
        lambda path: (path / "part-00001.safetensors").write_bytes(
            b"\xff" * (path / "part-00001.safetensors").stat().st_size
        ),
        "/part-00001.safetensors is not a readable checkpoint file (*); ",
    ),
    "manifest": (shorten("manifest.json"), "/manifest.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_an_earlier_one_serves(corpus, trained, again, damage):
    change, says = DAMAGES[damage]
    newest = committed(again / "checkpoints")[-1]
    change(newest)
    before = tree(again)
    config = two_silos(corpus, again)
    line = told(run_command(config, 2))
    first, *rest = says.split("*")
    assert line.startswith(f"{newest}{first}") and all(part in line for part in rest), line
    assert tree(again) == before
    if damage == "truncated":
        shutil.rmtree(newest)
        train(config, ranks=2)
        assert largest_difference(final_state(again), final_state(trained)) == 0


def adapting(corpus: Corpus, run_dir: Path, checkpoint: Path, embedding: str = "random", **sections: Any) -> RunConfig:
    """Continued pre-training from `checkpoint`."""
    adapt = {"checkpoint": str(checkpoint), "embedding": embedding}
    return small_config(
        corpus,
        run_dir,
        source_names=NAMES,
        phase="adapt",
        adapt=adapt,
        dept={"variant": "std", "rounds": 1},
        **sections,
    )


@pytest.mark.parametrize(
    "model, says",
    [
        ({"hidden_size": 64}, "has model.hidden_size 32, this run has 64; set model.hidden_size: 32"),
        ({"num_layers": 3}, "has model.num_layers 2, this run has 3; set model.num_layers: 2"),
        ({"family": "llama"}, "has model.family gpt, this run has llama; set model.family: gpt"),
    ],
)
def test_adapting_another_model(corpus, trained, tmp_path, model, says):
    line = told(run_command(adapting(corpus, tmp_path / "run", trained, model=model), 2))
    assert line == f"adapt.checkpoint {trained}/checkpoints/step-00000008 {says}"
    assert not (tmp_path / "run").exists()


def test_adapting_from_nothing(corpus, tmp_path):
    line = told(run_command(adapting(corpus, tmp_path / "run", tmp_path / "none"), 2))
    assert line == f"{tmp_path / 'none'} holds no committed checkpoint; give a run or checkpoint directory"
    assert not (tmp_path / "run").exists()


def test_keeping_the_embedding_of_a_run_that_has_none(corpus, tmp_path):
    spec = two_silos(corpus, tmp_path / "spec", dept={"variant": "spec", "rounds": 1})
    train(spec, ranks=2)
    line = told(run_command(adapting(corpus, tmp_path / "run", spec.run_dir, "own"), 2))
    assert line == (
        f"adapt.embedding own: {spec.run_dir}/checkpoints/step-00000004 is of variant spec, which has no global "
        "embedding to keep; set adapt.embedding: random"
    )
    assert not (tmp_path / "run").exists()


def test_keeping_the_embedding_of_another_tokenizer(corpus, trained, tmp_path):
    other = replace(corpus, data={name: corpus.own_data["latin"] for name in corpus.data})
    line = told(run_command(adapting(other, tmp_path / "run", trained, "own", tokenizer=None), 2))
    assert line == (
        f"adapt.embedding own: {trained}/checkpoints/step-00000008 was trained under another tokenizer than this "
        "run's sources; use the same data, or set adapt.embedding: random"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fills_during_a_checkpoint(corpus, trained, tmp_path, rank):
    """Both ranks end, the half-written checkpoint is gone, the first is as it was, and the run goes on from it."""
    config = two_silos(corpus, tmp_path / "run")
    line = told(run_command(config, 2, fault=full_disk(rank, save=2)))
    second = config.run_dir / "checkpoints" / "step-00000008"
    assert line.startswith(f"checkpoint {second} was not saved: rank {rank}: cannot write {second}/part-0000{rank}")
    assert line.endswith("; free space or choose another run_dir; then start again, earlier checkpoints are intact")
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-00000004"]
    first = Checkpoint.open(config.run_dir)
    good = Checkpoint.open(trained / "checkpoints" / "step-00000004")
    for name, tensor in first.body().items():
        assert tensor.equal(good.body()[name])
    train(config, ranks=2)
    assert largest_difference(final_state(config.run_dir), final_state(trained)) == 0
    assert losses(config.run_dir) == losses(trained)


def test_a_disk_that_fills_under_the_source_store(corpus, tmp_path):
    """One silo cannot put its source's embedding away: it says so, the other loses it, and neither waits."""
    config = two_silos(corpus, tmp_path / "run", dept={"variant": "spec"})
    lines = [outcome.error for outcome in run_command(config, 2, fault=little_space(1, 1 << 14))]
    assert lines[0].startswith("error: rank 0: silo 1, rank 1 failed in phase source store (cannot write ")
    store = config.run_dir / "store" / "greek"
    assert lines[1].startswith(f"error: rank 1: cannot write {store}/embedding-0.00000001.tmp (")
    assert "File too large" in lines[1] and lines[1].endswith("; free space or choose another run_dir")
    assert [file.name for file in store.iterdir()] == ["vocabulary.00000000.safetensors"]


def test_a_disk_that_fills_under_the_logs(corpus, tmp_path):
    """Silo 1's rank writes nothing but its metrics before the first checkpoint."""
    config = two_silos(corpus, tmp_path / "run", dept={"n_local": 9})
    lines = [outcome.error for outcome in run_command(config, 2, fault=little_space(1, 600))]
    assert lines[1].startswith(f"error: rank 1: cannot write in {config.run_dir}: File too large; raise the limit ")
