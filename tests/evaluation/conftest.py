"""A dataset small enough to see through: sixteen words and the 256 bytes under one toy tokenizer."""

from types import SimpleNamespace

import numpy as np
import pytest


class ToyTokenizer:
    """Ids 0 unknown, 1 eod, 2..257 the bytes, 258.. the words."""

    words = (
        "de",
        "zwölf",
        "日本",
        " and",
        "the ",
        "x",
        "naïve",
        "??",
        "aa",
        "bbb",
        "é",
        "\n",
        "  ",
        "it",
        "of",
        "end.",
    )
    eod_id = 1
    vocab_size = 258 + len(words)

    def token_bytes(self) -> list[bytes]:
        return [b"", b"", *(bytes([value]) for value in range(256)), *(word.encode() for word in self.words)]

    def byte_pieces(self, token_id: int) -> np.ndarray:
        return np.frombuffer(self.token_bytes()[token_id], np.uint8).astype(np.int64) + 2


class ToyIndexed:
    """Held-out documents, which remember whether they were read."""

    def __init__(self, documents):
        self.documents = [np.array(ids, np.uint16) for ids in documents]
        self.read = set()

    def __len__(self):
        return len(self.documents)

    def document(self, index):
        self.read.add(index)
        return self.documents[index]


@pytest.fixture(scope="session")
def tokenizer():
    return ToyTokenizer()


@pytest.fixture(scope="session")
def dataset():
    """A maker of dataset directories from documents of ids."""

    def make(documents):
        indexed = ToyIndexed(documents)
        return SimpleNamespace(name="toy", tokenizer=ToyTokenizer, indexed=lambda split: {"heldout": indexed}[split])

    return make
