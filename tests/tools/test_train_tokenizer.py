"""tools/train_tokenizer.py from the command line: what it makes, says and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import train_tokenizer

from megatron_dept.common.errors import ConfigError, DataError, UserError
from megatron_dept.tokenizers.load import load_tokenizer

TOOL = Path(train_tokenizer.__file__)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two sources of unlike size, as the working directory: 200 documents of de, 50 of he."""
    for name, words, count in (("de", "für das schöne Wetter", 200), ("he", "שלום עולם טוב", 50)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": f"{words} {index}\n\n"}) + "\n" for index in range(count)]
        (tmp_path / name / "a.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def card(place, name):
    return json.loads((place / name / "tokenizer_card.json").read_text())


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_run(place, capfd, model_type):
    argv = ["--input", "de", "--vocab-size", "300", "--model-type", model_type, "--output", "tokenizers/de"]
    assert train_tokenizer.main(argv) == 0
    tokenizer = load_tokenizer(place / "tokenizers" / "de")
    found = card(place, "tokenizers/de")
    assert tokenizer.vocab_size == found["vocab_size"] == 300
    assert tokenizer.fingerprint == found["fingerprint"]
    assert found["model_type"] == tokenizer.proto.model_type == model_type
    assert found["samples"][0]["documents"] == 200
    assert tokenizer.decode(tokenizer.encode("  für\t\n\n\u2581 שלום")) == "  für\t\n\n\u2581 שלום"
    out, err = capfd.readouterr()  # of the native library too
    assert "300 ids" in out
    assert [line.split(":")[0].split(" of ")[0] for line in err.splitlines()] == ["read", f"train {model_type}"]


def test_a_mix_is_balanced_when_told(place):
    base = ["--input", "de", "he", "--vocab-size", "296", "--sample-bytes", "2400"]
    train_tokenizer.main([*base, "--output", "pooled"])
    train_tokenizer.main([*base, "--output", "even", "--balance"])
    (pooled,) = card(place, "pooled")["samples"]
    assert pooled["inputs"] == ["de", "he"]
    assert 2350 < pooled["bytes"] <= 2400
    de, he = card(place, "even")["samples"]
    assert (de["inputs"], he["inputs"]) == (["de"], ["he"])
    for sample in (de, he):
        assert 1150 < sample["bytes"] <= 1200  # a whole number of documents, the last cut at a line


def test_the_command_makes_the_same_again_and_the_seed_another(place):
    base = ["--input", "de/*.jsonl", "--vocab-size", "290", "--sample-bytes", "2000"]
    train_tokenizer.main([*base, "--output", "one", "--seed", "5"])
    first = card(place, "one")
    argv = [part.strip("'") for part in first["command"].split()[1:]]
    train_tokenizer.main([*argv, "--overwrite"])
    assert card(place, "one") == first
    train_tokenizer.main([*base, "--output", "two", "--seed", "6"])
    assert card(place, "two")["sample_sha256"] != first["sample_sha256"]


def test_too_large_a_vocabulary_is_one_line_and_exit_code_2(place):
    done = subprocess.run(
        [sys.executable, TOOL, "--input", "de", "--vocab-size", "9000", "--output", "out"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(TOOL.parents[1])},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: vocab-size 9000 is too large for this text; set it to ")
    assert not (place / "out").exists()
    assert not list(place.glob(".*"))


def test_what_cannot_be_is_refused(place):
    base = ["--vocab-size", "300", "--output", "out"]
    with pytest.raises(DataError, match="input none does not exist"):
        train_tokenizer.main(["--input", "de", "none", *base])
    (place / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"bad\.txt line 1 is not valid UTF-8"):
        train_tokenizer.main(["--input", "bad.txt", *base])
    for wrong in (["--model-type", "word"], ["--character-coverage", "2"], ["--sample-bytes", "0"], ["--seed", "-1"]):
        with pytest.raises(ConfigError):
            train_tokenizer.main(["--input", "de", *base, *wrong])
    (place / "out").mkdir()
    (place / "out" / "file").touch()
    with pytest.raises(UserError, match="not ours to replace"):
        train_tokenizer.main(["--input", "de", *base])


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        train_tokenizer.main(["--help"])
    assert caught.value.code == 0
    assert "--balance" in capsys.readouterr().out
