"""Text to a dataset directory: every document whole and once, held out by its text, whatever the number of workers."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.common.errors import ConfigError, DataError, UserError
from megatron_dept.data import preprocess as module
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.data.preprocess import PreprocessOptions, choose_heldout, preprocess, text_hash
from megatron_dept.tokenizers.load import load_tokenizer
from megatron_dept.tokenizers.to_huggingface import to_huggingface
from megatron_dept.tokenizers.train import train_sentencepiece

TEXTS = [f"document {index}:\n  the cat\tsat on mat {index % 7} für שלום 日本\n\n" for index in range(100)]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "bpe.model"
    path.write_bytes(train_sentencepiece(TEXTS, 330, "bpe"))
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def options(source, model, tmp_path):
    def build(**changes):
        given = {"inputs": [source], "tokenizer": model, "output": tmp_path / "out", "name": "de"}
        return PreprocessOptions(**given | {"heldout_fraction": 0.1, "command": "the command"} | changes)

    return build


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def decoded(directory: Path, split: str) -> list[str]:
    dataset = DatasetDirectory.open(directory)
    indexed, tokenizer = dataset.indexed(split), dataset.tokenizer()
    ids = [indexed.document(index).tolist() for index in range(len(indexed))]
    assert all(document[-1] == tokenizer.eod_id for document in ids)
    assert all(tokenizer.eod_id not in document[:-1] for document in ids)
    return [tokenizer.decode(document) for document in ids]


def test_every_document_is_in_one_split_in_order(options, tmp_path):
    card = preprocess(options())
    train, heldout = (decoded(tmp_path / "out", split) for split in ("train", "heldout"))
    limit = 0.1 * 2**64
    assert train == [text for text in TEXTS if text_hash(text) >= limit]
    assert heldout == [text for text in TEXTS if text_hash(text) < limit]
    assert 3 < len(heldout) < 25
    for split, texts in (("train", train), ("heldout", heldout)):
        assert card["splits"][split]["documents"] == len(texts)
        assert card["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)


def test_the_card_and_the_counts(options, model, tmp_path):
    card = preprocess(options())
    dataset = DatasetDirectory.open(tmp_path / "out")
    assert dataset.card == card
    assert (card["name"], card["command"], card["format_version"]) == ("de", "the command", 1)
    assert card["tokenizer"]["fingerprint"] == load_tokenizer(model).fingerprint
    ids = dataset.indexed("train").tokens
    assert card["splits"]["train"]["tokens"] == len(ids)
    assert card["tokens_per_byte"] == len(ids) / card["splits"]["train"]["bytes"]
    counts = np.bincount(ids, minlength=330)
    assert dataset.token_counts.dtype == np.int64
    assert dataset.token_counts.tolist() == counts.tolist()
    assert dataset.vocabulary().tolist() == sorted({*range(259), *np.flatnonzero(counts).tolist()})
    assert card["vocabulary_size"] == len(dataset.vocabulary())


def test_workers_do_not_change_a_byte(options, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 700)  # many batches
    results = []
    for workers in (1, 2):
        preprocess(options(workers=workers, output=tmp_path / f"out{workers}"))
        results.append(contents(tmp_path / f"out{workers}"))
    assert results[0] == results[1]
    assert decoded(tmp_path / "out1", "train") == [text for text in TEXTS if text_hash(text) >= 0.1 * 2**64]


def test_a_worker_that_dies_is_an_error_and_no_hang(options, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_start_worker", functools.partial(os._exit, 1))
    with pytest.raises(DataError, match="2 worker processes died.* fewer --workers"):
        preprocess(options(workers=2))
    assert not (tmp_path / "out").exists()


def test_the_same_documents_are_held_out_under_a_tokenizer_json(options, model, tmp_path):
    to_huggingface(load_tokenizer(model), tmp_path / "hf")
    for output, tokenizer in (("a", model), ("b", tmp_path / "hf")):
        preprocess(options(output=tmp_path / output, tokenizer=tokenizer))
    for split in ("train", "heldout"):
        assert decoded(tmp_path / "a", split) == decoded(tmp_path / "b", split)
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    first, second = ((tmp_path / name / "train.bin").read_bytes() for name in "ab")
    assert first == second


def test_without_end_of_document(options, tmp_path):
    preprocess(options(append_eod=False))
    assert 2 not in DatasetDirectory.open(tmp_path / "out").indexed("train").tokens


def test_plain_text_parted_by_blank_lines(options, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\nthree\n")
    card = preprocess(options(inputs=[path], form=module.TextFormat(separator="blank-line")))
    assert card["splits"]["train"]["documents"] + card["splits"]["heldout"]["documents"] == 3
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "heldout")) == ["one", "three", "two"]


@given(
    texts=st.lists(st.integers(0, 40), min_size=2, max_size=60),
    fraction=st.floats(0, 0.9),
    minimum=st.integers(1, 5),
)
def test_held_out_by_hash(texts, fraction, minimum):
    hashes = np.array([text_hash(str(text)) for text in texts], dtype=np.uint64)
    below = [int(value) < fraction * 2**64 for value in hashes]
    try:
        heldout = choose_heldout(hashes, fraction, minimum)
    except DataError:
        # Nothing to train on: all below the limit, or as many distinct ones as are left needed for the minimum.
        assert all(below) or len(texts) - (hashes == hashes.max()).sum() < minimum
        return
    assert heldout.sum() >= minimum
    assert not heldout.all()
    assert len({(text, bool(side)) for text, side in zip(texts, heldout, strict=True)}) == len(set(texts))
    if sum(below) >= minimum:
        assert heldout.tolist() == below
    else:  # the fewest lowest hashes that reach the minimum
        assert hashes[heldout].max() < hashes[~heldout].min()
        assert (hashes[heldout] < hashes[heldout].max()).sum() < minimum


def test_adding_documents_moves_none():
    hashes = np.array([text_hash(text) for text in TEXTS], dtype=np.uint64)
    assert choose_heldout(hashes, 0.1, 1)[:50].tolist() == choose_heldout(hashes[:50], 0.1, 1).tolist()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bad.txt", b"caf\xe9", r"bad\.txt line 1 is not valid UTF-8"),
        ("bad.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"bad\.jsonl line 2: field 'text' is missing"),
        ("bad.jsonl", b'{"text": "x"}\n{"text": ', r"bad\.jsonl line 2 is not JSON"),
    ],
)
def test_bad_input_leaves_nothing(options, source, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=message):
        preprocess(options(inputs=[source, tmp_path / name]))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_no_text_is_refused(options, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="source de has no text in 1 files"):
        preprocess(options(inputs=[tmp_path / "empty.txt"]))


def test_one_document_cannot_be_split(options, tmp_path):
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(DataError, match="has 1 documents, .* none left to train on.* --document-separator"):
        preprocess(options(inputs=[tmp_path / "one.txt"]))
    assert not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_nothing(options, source, tmp_path, monkeypatch):
    def full(self, ids):
        raise UserError("the disk is full")

    monkeypatch.setattr(module.IndexedDatasetWriter, "add_document", full)
    with pytest.raises(UserError, match="disk is full"):
        preprocess(options())
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_text_that_changes_between_the_readings_is_refused(options, tmp_path, monkeypatch):
    for change in (lambda texts: texts[:-1], lambda texts: [*texts, "more"], lambda texts: [*texts[:-1], "other"]):
        readings = iter([TEXTS, TEXTS, change(TEXTS)])  # scan, round trip, encode
        monkeypatch.setattr(module, "_documents", lambda files, form, r=readings: iter(next(r)))
        with pytest.raises(DataError, match="source de changed while it was read"):
            preprocess(options())
        assert not (tmp_path / "out").exists()


def test_overwrite(options, source, tmp_path):
    preprocess(options())
    first = contents(tmp_path / "out")
    with pytest.raises(UserError, match="out exists; .*--overwrite"):
        preprocess(options())
    preprocess(options(overwrite=True, heldout_fraction=0.5))
    assert contents(tmp_path / "out") != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", source.name]


@pytest.mark.parametrize("name", ["", "../x", "a b", "-x", "a/b"])
def test_a_name_that_is_no_file_name_is_refused(options, name):
    with pytest.raises(ConfigError, match="name .* change it"):
        preprocess(options(name=name))


def test_a_tokenizer_that_changes_text_is_told_loudly(options, tmp_path, capsys, model):
    preprocess(options())
    assert "warning" not in capsys.readouterr().err
    with open(tmp_path / "foreign.model", "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=handle, vocab_size=60, hard_vocab_limit=False, minloglevel=2
        )
    preprocess(options(tokenizer=tmp_path / "foreign.model", output=tmp_path / "foreign"))
    err = capsys.readouterr().err
    assert err.count("warning: the tokenizer") == 1
    assert "foreign.model changes text: document 0 from character 11 is '\\n  the cat" in err
