"""Small sources of seeded text in three scripts, as dataset directories under a global tokenizer and their own."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dept.common.seeding import generator_for
from megatron_dept.data.indexed import IndexedDatasetWriter
from megatron_dept.tokenizers.load import load_tokenizer
from megatron_dept.tokenizers.train import train_sentencepiece
from megatron_dept.tokenizers.vocabulary import source_vocabulary

ALPHABETS = {"latin": "abcdefghijklmnop", "greek": "αβγδεζηθικλμν", "code": "xyz_=()[]+-0123"}


def documents(source: str, count: int) -> list[str]:
    """Documents of words over the source's alphabet, frequent words short: enough regularity for a model to learn."""
    generator = generator_for("test corpus", source)
    letters = np.array(list(ALPHABETS[source]))
    words = ["".join(generator.choice(letters, size=generator.integers(2, 7))) for _ in range(60)]
    chances = 1 / np.arange(1, len(words) + 1)
    chances /= chances.sum()
    return [" ".join(generator.choice(words, size=generator.integers(30, 90), p=chances)) + "\n" for _ in range(count)]


@dataclass(frozen=True)
class Corpus:
    """`data[name]` and `own_data[name]`: dataset directories; `tokenizer`: the global one's file."""

    tokenizer: Path
    data: dict[str, Path]
    own_data: dict[str, Path]


def build_corpus(directory: Path, train: int = 60, heldout: int = 6) -> Corpus:
    """All three sources under `directory`."""
    texts = {name: documents(name, train + heldout) for name in ALPHABETS}
    merged = [text for source in texts.values() for text in source]
    (directory / "tokenizers").mkdir(parents=True)
    file = directory / "tokenizers" / "global.model"
    shared = train_sentencepiece(merged, 421)
    file.write_bytes(shared)
    data, own_data = {}, {}
    for size, (name, source) in zip((331, 337, 317), texts.items(), strict=True):
        own = train_sentencepiece(source, size)
        data[name] = write_dataset(directory / "global" / name, name, shared, source[:train], source[train:])
        own_data[name] = write_dataset(directory / "own" / name, name, own, source[:train], source[train:])
    return Corpus(file, data, own_data)


def write_dataset(directory: Path, name: str, model: bytes, train: list[str], heldout: list[str]) -> Path:
    """A dataset directory by hand, so that tests of what comes after do not hang on preprocessing.

    `model`: the bytes of a sentencepiece tokenizer.
    """
    directory.mkdir(parents=True)
    copy = directory / "tokenizer.model"
    copy.write_bytes(model)
    tokenizer = load_tokenizer(copy)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    splits = {}
    for split, texts in (("train", train), ("heldout", heldout)):
        tokens = 0
        with IndexedDatasetWriter(directory / split, tokenizer.vocab_size) as writer:
            for text in texts:
                ids = np.array([*tokenizer.encode(text), tokenizer.eod_id])
                writer.add_document(ids)
                tokens += len(ids)
                if split == "train":
                    counts += np.bincount(ids, minlength=tokenizer.vocab_size)
            writer.finalize()
        size = sum(len(text.encode()) for text in texts)
        splits[split] = {"documents": len(texts), "tokens": tokens, "bytes": size}
    np.save(directory / "token_counts.npy", counts)
    card = {
        "format_version": 1,
        "name": name,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "file": copy.name,
        },
        "splits": splits,
        "tokens_per_byte": splits["train"]["tokens"] / max(1, splits["train"]["bytes"]),
        "vocabulary_size": len(source_vocabulary(counts, tokenizer)),
        "command": "tests",
    }
    (directory / "card.json").write_text(json.dumps(card))
    return directory
