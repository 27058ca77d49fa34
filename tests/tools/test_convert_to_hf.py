"""tools/convert_to_hf.py on hand-made checkpoints of every kind: what it writes, what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_to_hf import main
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dept.checkpoint.slices import whole
from megatron_dept.checkpoint.writer import save_checkpoint
from megatron_dept.common.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_dept.config.schema import ModelConfig
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.models.build import build_body
from megatron_dept.tokenizers.train import train_sentencepiece
from tests.support.corpus import write_dataset

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_to_hf.py"
SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 12, "init_std": 0.3}
TEXTS = {
    "en": ["the river runs to the sea and the sea is wide", "a wide river and a long road to the sea"],
    "it": ["il fiume va al mare e il mare è grande", "un grande fiume e una lunga strada al mare"],
}
# Of every source, so that each has held-out ids outside its V_k.
HELDOUT = TEXTS["it"] + TEXTS["en"]
VOCABULARY = {"glob": "global", "trim": "trimmed", "spec": "trimmed", "spec_opt": "own"}


def write_run(root: Path, data: Path, variant: str, trained: tuple[str, ...] = ("en", "it"), **model: object) -> Path:
    """A run directory with one checkpoint of random tables, each source's own where the variant has them."""
    config = ModelConfig.model_validate({**SIZES, **model})
    opened = {name: DatasetDirectory.open(data / name) for name in TEXTS}
    sizes = {name: dataset.card["tokenizer"]["vocab_size"] for name, dataset in opened.items()}
    kind = VOCABULARY[variant]
    ids = {n: opened[n].vocabulary() if kind == "trimmed" else np.arange(sizes[n]) for n in opened}
    generator = torch.Generator().manual_seed(5)

    def tables(prefix: str, rows: int) -> dict[str, torch.Tensor]:
        made = whole(f"{prefix}token", 0.5 * torch.randn(rows, config.hidden_size, generator=generator))
        if config.has_position_table:
            made |= whole(f"{prefix}position", 0.5 * torch.randn(12, config.hidden_size, generator=generator))
        return made

    tensors = {} if variant.startswith("spec") else tables("", sizes["en"])
    for name, local in ids.items():
        tensors |= whole(f"vocabulary/{name}", torch.from_numpy(local.astype(np.int64)))
        if variant.startswith("spec") and name in trained:
            tensors |= tables(f"source/{name}/", len(local))
    body = dict(build_body(config, seed=3).named_parameters())
    for name, parameter in body.items():
        tensors |= whole(f"body/{name}", parameter.detach().flatten())
    sources = {
        name: {
            "vocabulary": kind,
            "data": str(data / name),
            "tokenizer_fingerprint": dataset.card["tokenizer"]["fingerprint"],
            "vocab_size": sizes[name],
            "trained": name in trained,
        }
        for name, dataset in opened.items()
    }
    manifest = {
        "step": 10,
        "round": 2,
        "tokens": 12345,
        "seed": 7,
        "variant": variant,
        "phase": "pretrain",
        "vocabulary": kind,
        "model": config.model_dump(),
        "body_shapes": {name: list(parameter.shape) for name, parameter in body.items()},
        "sources": sources,
    }
    save_checkpoint(
        root / "checkpoints" / "step-00000010", 0, range(1), lambda value: [value], tensors, [], manifest, 2
    )
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Datasets under one global tokenizer."""
    root = tmp_path_factory.mktemp("global")
    shared = train_sentencepiece([text for texts in TEXTS.values() for text in texts], 310, "bpe")
    for name in TEXTS:
        write_dataset(root / name, name, shared, TEXTS[name], HELDOUT)
    return root


@pytest.fixture(scope="module")
def own_data(tmp_path_factory) -> Path:
    """Datasets under a tokenizer of each source's own."""
    root = tmp_path_factory.mktemp("own")
    for name, size in (("en", 280), ("it", 276)):
        own = train_sentencepiece(TEXTS[name], size, "unigram")
        write_dataset(root / name, name, own, TEXTS[name], HELDOUT)
    return root


def convert(run: Path, output: Path, *options: object) -> int:
    return main(["--checkpoint", str(run), "--output", str(output), *map(str, options)])


def generated(directory: Path, text: str) -> list[int]:
    """Ids that the exported model goes on with, half of them drawn from nearly equal chances."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer(text, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = model.generate(**prompt, max_new_tokens=5, do_sample=True, temperature=50.0, top_k=0)[0, length:]
    return [*model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, length:].tolist(), *drawn.tolist()]


def suppressed(directory: Path) -> list[int]:
    return json.loads((directory / "generation_config.json").read_text()).get("suppress_tokens") or []


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_global_vocabulary_is_exported_whole(data, tmp_path, family, capsys):
    run = write_run(tmp_path / "run", data, "glob", family=family)
    assert convert(run, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "310 ids have embeddings, 0 are suppressed" in said.out and "96 positions" in said.out
    assert said.err == ""
    assert suppressed(tmp_path / "out") == []
    assert generated(tmp_path / "out", "the sea")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "DEPT glob pretrain" in card and "| tokens trained | 12,345 |" in card


def test_trim_suppresses_the_ids_no_source_holds(data, tmp_path):
    run = write_run(tmp_path / "run", data, "trim")
    convert(run, tmp_path / "out")
    held = np.union1d(*(DatasetDirectory.open(data / name).vocabulary() for name in TEXTS))
    assert suppressed(tmp_path / "out") == np.setdiff1d(np.arange(310), held).tolist() != []
    assert set(generated(tmp_path / "out", "a")) <= set(held.tolist())


def test_spec_exports_each_trained_source(data, tmp_path, capsys):
    run = write_run(tmp_path / "run", data, "spec", trained=("en",))
    convert(run, tmp_path / "out", "--all-sources")
    assert "it is left out: it was never sampled" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["en"]
    vocabulary = DatasetDirectory.open(data / "en").vocabulary()
    assert suppressed(tmp_path / "out" / "en") == np.setdiff1d(np.arange(310), vocabulary).tolist() != []
    assert set(generated(tmp_path / "out" / "en", "the sea")) <= set(vocabulary.tolist())


def test_spec_opt_takes_each_sources_own_tokenizer(own_data, tmp_path):
    run = write_run(tmp_path / "run", own_data, "spec_opt")
    convert(run, tmp_path / "out", "--all-sources")
    for name in TEXTS:
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        ours = DatasetDirectory.open(own_data / name).tokenizer()
        assert len(theirs) == ours.vocab_size and suppressed(tmp_path / "out" / name) == []
        assert theirs("il mare, the sea")["input_ids"] == ours.encode("il mare, the sea")
    convert(run, tmp_path / "one", "--source", "it")
    assert (tmp_path / "one" / "config.json").is_file()


def test_without_the_datasets_the_tokenizer_is_asked_for(data, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    run = write_run(tmp_path / "run", moved, "trim")
    shutil.rmtree(moved)
    with pytest.raises(DataError, match="moved/en.*give it with --tokenizer"):
        convert(run, tmp_path / "out")
    convert(run, tmp_path / "out", "--tokenizer", data / "en" / "tokenizer.model")
    assert "compared on random ids" in capsys.readouterr().out
    convert(run, tmp_path / "again", "--check-text", data / "it")
    assert "48 positions" in capsys.readouterr().out


def test_another_tokenizer_is_refused(data, own_data, tmp_path):
    run = write_run(tmp_path / "run", data, "glob")
    with pytest.raises(DataError, match="is not the tokenizer the model was trained with"):
        convert(run, tmp_path / "out", "--tokenizer", own_data / "en" / "tokenizer.model")
    with pytest.raises(DataError, match="is not the tokenizer the model was trained with"):
        convert(run, tmp_path / "out", "--check-text", own_data / "en")
    assert not (tmp_path / "out").exists()


def test_what_a_variant_does_not_have_is_refused(data, tmp_path):
    spec = write_run(tmp_path / "spec", data, "spec", trained=("en",))
    with pytest.raises(CheckpointError, match="no global embedding; name one of the sources en, it"):
        convert(spec, tmp_path / "out")
    with pytest.raises(CheckpointError, match="source it was never sampled"):
        convert(spec, tmp_path / "out", "--source", "it")
    with pytest.raises(CheckpointError, match="no source 'fr'"):
        convert(spec, tmp_path / "out", "--source", "fr")
    glob = write_run(tmp_path / "glob", data, "glob")
    for options in (["--source", "en"], ["--all-sources"]):
        with pytest.raises(CheckpointError, match="its embedding is global"):
            convert(glob, tmp_path / "out", *options)
    never = write_run(tmp_path / "never", data, "spec", trained=())
    with pytest.raises(CheckpointError, match="no source was ever sampled"):
        convert(never, tmp_path / "out", "--all-sources")


def test_alibi_is_refused_before_anything_is_read(data, tmp_path):
    run = write_run(tmp_path / "run", data, "glob", position_embedding="alibi")
    with pytest.raises(UserError, match="alibi cannot be exported"):
        convert(run, tmp_path / "out")


def test_an_existing_directory_is_kept_unless_told(data, tmp_path):
    run = write_run(tmp_path / "run", data, "glob")
    convert(run, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_ino
    with pytest.raises(UserError, match="exists already"):
        convert(run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == before
    convert(run, tmp_path / "out", "--overwrite", "--max-shard-size", "20KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize(
    "options", [["--source", "en", "--all-sources"], ["--all-sources", "--tokenizer", "x"], ["--max-shard-size", "big"]]
)
def test_options_that_make_no_sense_are_refused(data, tmp_path, options):
    run = write_run(tmp_path / "run", data, "glob")
    with pytest.raises(ConfigError):
        convert(run, tmp_path / "out", *options)


def command(*options: object) -> subprocess.CompletedProcess[str]:
    """The tool as a user runs it."""
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1]), "HF_HUB_OFFLINE": "1"},
    )


def test_the_command_prints_its_finding_and_no_noise(data, tmp_path):
    done = command("--checkpoint", write_run(tmp_path / "run", data, "trim"), "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1 and "logits differ by" in done.stdout


def test_the_command_says_an_error_in_one_line_and_exits_2(tmp_path):
    done = command("--checkpoint", tmp_path, "--output", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "no committed checkpoint" in done.stderr
