"""A dataset directory is what its card says, or is refused by name."""

import io
import json

import numpy as np
import pytest
import sentencepiece

from megatron_dept.common.errors import DataError
from megatron_dept.common.files import sha256_file
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.data.indexed import IndexedDatasetWriter
from megatron_dept.tokenizers.load import load_tokenizer

TEXTS = ["one two three", "two three four", "three four five"]


def train(texts):
    """The bytes of a tiny sentencepiece model with byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def models():
    return train(TEXTS), train(["alpha beta", "beta gamma delta"])


@pytest.fixture
def made(tmp_path, models):
    """A dataset directory as the format says, written out by hand."""
    directory = tmp_path / "en"
    directory.mkdir()
    model = directory / "tokenizer.model"
    model.write_bytes(models[0])
    tokenizer = load_tokenizer(model)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    splits = {}
    for split, texts in (("train", TEXTS[:2]), ("heldout", TEXTS[2:])):
        with IndexedDatasetWriter(directory / split, tokenizer.vocab_size) as writer:
            for text in texts:
                ids = [*tokenizer.encode(text), tokenizer.eod_id]
                writer.add_document(ids)
                if split == "train":
                    np.add.at(counts, ids, 1)
            size = sum(len(text.encode()) for text in texts)
            splits[split] = {"documents": writer.documents, "tokens": writer.tokens, "bytes": size}
    np.save(directory / "token_counts.npy", counts)
    required = {*tokenizer.byte_ids.tolist(), *tokenizer.special_ids.tolist()}
    card = {
        "format_version": 1,
        "name": "en",
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": sha256_file(model),
            "vocab_size": tokenizer.vocab_size,
            "file": model.name,
        },
        "splits": splits,
        "tokens_per_byte": splits["train"]["tokens"] / splits["train"]["bytes"],
        "vocabulary_size": len(required | set(np.flatnonzero(counts).tolist())),
        "command": "tools/preprocess_data.py ...",
    }
    (directory / "card.json").write_text(json.dumps(card))
    return directory


def edit(directory, **changes):
    """Set fields of the card; a dotted field is given as a__b, and None removes it."""
    file = directory / "card.json"
    card = json.loads(file.read_text())
    for field, value in changes.items():
        *path, last = field.split("__")
        place = card
        for step in path:
            place = place[step]
        if value is None:
            del place[last]
        else:
            place[last] = value
    file.write_text(json.dumps(card))


def test_opens_what_was_made(made):
    directory = DatasetDirectory.open(made)
    assert directory.name == "en" and directory.card == json.loads((made / "card.json").read_text())
    tokenizer = directory.tokenizer()
    assert tokenizer is directory.tokenizer()
    document = directory.indexed("heldout").document(0).tolist()
    assert document == [*tokenizer.encode(TEXTS[2]), tokenizer.eod_id]
    tokens = directory.indexed("train").tokens
    np.testing.assert_array_equal(directory.token_counts, np.bincount(tokens, minlength=tokenizer.vocab_size))
    vocabulary = directory.vocabulary()
    expected = set(tokens.tolist()) | set(tokenizer.byte_ids.tolist()) | set(tokenizer.special_ids.tolist())
    assert vocabulary.dtype == np.int64 and vocabulary.tolist() == sorted(expected)
    assert len(vocabulary) < tokenizer.vocab_size, "or this would not tell V_k from V"
    directory.check_tokenizer(tokenizer)


def test_another_tokenizer_is_refused_naming_both(made, models, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(models[1])
    with pytest.raises(DataError) as error:
        DatasetDirectory.open(made).check_tokenizer(load_tokenizer(other))
    assert str(made / "tokenizer.model") in str(error.value) and str(other) in str(error.value)


def test_an_exchanged_tokenizer_copy_is_refused(made, models):
    (made / "tokenizer.model").write_bytes(models[1])
    with pytest.raises(DataError, match=r"tokenizer\.model has fingerprint [0-9a-f]{64}, but card\.json names"):
        DatasetDirectory.open(made)
    (made / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model, the tokenizer that card\.json names, does not exist"):
        DatasetDirectory.open(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"card\.json: format_version: "),
        ({"name": None}, r"card\.json: name: Field required"),
        ({"tokenizer": "x"}, r"card\.json: tokenizer: "),
        ({"tokenizer__vocab_size": 0}, r"tokenizer\.vocab_size: .*greater than 0"),
        ({"tokenizer__kind": "words"}, r"tokenizer\.kind: "),
        ({"tokenizer__file": "../en/tokenizer.model"}, r"tokenizer\.file: .*is not a plain file name"),
        ({"splits__train__tokens": -1}, r"splits\.train\.tokens: "),
        ({"splits__train__bytes": None}, r"splits\.train\.bytes: Field required"),
        ({"vocabulary_size": "many"}, r"vocabulary_size: "),
    ],
)
def test_a_broken_card_names_its_field(made, changes, message):
    edit(made, **changes)
    with pytest.raises(DataError, match=message) as error:
        DatasetDirectory.open(made)
    assert "\n" not in str(error.value)


def test_what_is_no_dataset_directory(made, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            DataError, match=r"is not a dataset directory: it has no card\.json; make the dataset again"
        ):
            DatasetDirectory.open(path)
    for content, message in (("{", "is not valid JSON"), ("[1]", "the card: ")):
        (made / "card.json").write_text(content)
        with pytest.raises(DataError, match=message):
            DatasetDirectory.open(made)


@pytest.mark.parametrize(
    ("changes", "use", "message"),
    [
        ({"tokenizer__vocab_size": 17}, lambda d: d.tokenizer(), r"is sentencepiece of \d+ ids, but .* of 17"),
        ({"tokenizer__kind": "huggingface"}, lambda d: d.tokenizer(), r"says huggingface of \d+"),
        ({"splits__train__tokens": 5}, lambda d: d.indexed("train"), r"train\.idx has \d+ tokens, but .* says 5"),
        ({"splits__heldout__documents": 5}, lambda d: d.indexed("heldout"), r"has 1 documents, but .* says 5"),
        ({"splits__heldout": None}, lambda d: d.indexed("heldout"), r"has no split heldout, only \['train'\]"),
        ({"splits__train__tokens": 5}, lambda d: d.token_counts, r"counts \d+ tokens, but card\.json says 5 in train"),
        (
            {"tokenizer__vocab_size": 17},
            lambda d: d.token_counts,
            r"token_counts\.npy is int64\(\d+,\), not int64\(17,\)",
        ),
        ({"vocabulary_size": 5}, lambda d: d.vocabulary(), r"has a vocabulary of \d+ ids, but its card\.json says 5"),
    ],
)
def test_files_that_contradict_the_card_are_named(made, changes, use, message):
    edit(made, **changes)
    directory = DatasetDirectory.open(made)
    with pytest.raises(DataError, match=message):
        use(directory)


def test_broken_counts_are_named(made):
    file = made / "token_counts.npy"
    whole = file.read_bytes()
    claims_more = whole.replace(b"'shape': (", b"'shape': (9999999", 1)[: len(whole)]
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    for content in (whole[:-1], whole[:20], b"", b"junk" * 100, claims_more, objects.getvalue()):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"token_counts\.npy"):
            _ = DatasetDirectory.open(made).token_counts
    counts = np.load(io.BytesIO(whole))
    counts[:2] += [-1 - counts[0], 1 + counts[0]]
    np.save(file, counts)
    with pytest.raises(DataError, match=r"token_counts\.npy"):
        _ = DatasetDirectory.open(made).token_counts
    file.unlink()
    with pytest.raises(DataError, match=r"token_counts\.npy cannot be read"):
        _ = DatasetDirectory.open(made).token_counts
