"""tools/preprocess_data.py from the command line: what it makes, says and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import preprocess_data
import pytest

from megatron_dept.common.errors import ConfigError, DataError
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.tokenizers.train import train_sentencepiece

TOOL = Path(preprocess_data.__file__)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a tokenizer and a corpus of 60 documents, as the working directory."""
    texts = [f"text number {index} of the corpus\n" for index in range(60)]
    (tmp_path / "corpus").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "corpus" / f"{index:02}.txt").write_text(text)
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(texts, 290, "bpe"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run(place, capsys):
    argv = ["--input", "corpus", "--tokenizer", "tokenizer.model", "--output", "data/de", "--heldout-fraction", "0.2"]
    assert preprocess_data.main(argv) == 0
    dataset = DatasetDirectory.open(place / "data" / "de")
    assert dataset.name == "de"
    assert len(dataset.indexed("train")) + len(dataset.indexed("heldout")) == 60
    out, err = capsys.readouterr()
    assert f"train: {len(dataset.indexed('train'))} documents, " in out
    assert "encode de: 0.0 MB in " in err
    assert "tokens/s" in err
    assert "MB/s" in err


def test_the_card_names_a_command_that_makes_it_again(place):
    base = ["--input", "corpus/*.txt", "--tokenizer", "tokenizer.model"]
    preprocess_data.main([*base, "--output", "one", "--name", "x", "--document-separator", "line", "--workers", "2"])
    command = json.loads((place / "one" / "card.json").read_text())["command"]
    assert "--workers" not in command
    argv = [part.strip("'") for part in command.split()[1:]]
    before = {path.name: path.read_bytes() for path in (place / "one").iterdir()}
    preprocess_data.main([*argv, "--overwrite"])
    assert {path.name: path.read_bytes() for path in (place / "one").iterdir()} == before


def test_bad_input_is_one_line_and_exit_code_2(place):
    (place / "corpus" / "99.txt").write_bytes(b"fine\ncaf\xe9\n")
    done = subprocess.run(
        [sys.executable, TOOL, "--input", "corpus", "--tokenizer", "tokenizer.model", "--output", "out"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(TOOL.parents[1])},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: corpus/99.txt line 2 is not valid UTF-8")
    assert done.stderr.count("\n") == 1
    assert not (place / "out").exists()
    assert not list(place.glob(".*"))


def test_what_cannot_be_is_refused(place):
    base = ["--tokenizer", "tokenizer.model", "--output", "out"]
    with pytest.raises(DataError, match="input none does not exist"):
        preprocess_data.main(["--input", "none", *base])
    with pytest.raises(DataError, match=r"tokenizer none\.model does not exist"):
        preprocess_data.main(["--input", "corpus", "--tokenizer", "none.model", "--output", "out"])
    for wrong in (["--heldout-fraction", "1"], ["--workers", "0"], ["--min-heldout-documents", "0"], ["--colour"]):
        with pytest.raises(ConfigError):
            preprocess_data.main(["--input", "corpus", *base, *wrong])
    assert not (place / "out").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        preprocess_data.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--heldout-fraction" in out
    assert "(default: 0.02)" in out
