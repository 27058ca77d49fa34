"""A dataset directory: one source under one tokenizer, as tools/preprocess_data.py writes it.

    card.json                  what it is: see `Card`
    tokenizer.model | .json    a copy of the tokenizer it was made with
    train.bin/.idx, heldout.bin/.idx
    token_counts.npy           int64[V], how often each id occurs in the training split

Everything is checked against the card when it is opened, so that later stages can take it as it is.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from megatron_dept.common.errors import DataError, UserError
from megatron_dept.common.files import read_json, sha256_file
from megatron_dept.data.indexed import IndexedDataset
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.load import load_tokenizer
from megatron_dept.tokenizers.vocabulary import source_vocabulary

CARD_FILE = "card.json"
COUNTS_FILE = "token_counts.npy"
FORMAT_VERSION = 1
REMEDY = "make the dataset again with tools/preprocess_data.py"


class CardTokenizer(BaseModel):
    """The tokenizer of a dataset: its kind, SHA-256 of its file, vocabulary size V, and the file's name."""

    kind: Literal["sentencepiece", "huggingface"]
    fingerprint: str
    vocab_size: int = Field(gt=0)
    file: str

    @field_validator("file")
    @classmethod
    def _inside(cls, value: str) -> str:
        if Path(value).name != value:
            raise ValueError(f"{value!r} is not a plain file name")
        return value


class CardSplit(BaseModel):
    """What a split holds; `bytes` of UTF-8 text, `tokens` with the end-of-document ids."""

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)


class Card(BaseModel):
    """The form of card.json; unknown fields are kept, for they are a later writer's."""

    model_config = ConfigDict(extra="allow")

    format_version: Literal[1]
    name: str
    tokenizer: CardTokenizer
    splits: dict[str, CardSplit]
    tokens_per_byte: float = Field(ge=0)
    vocabulary_size: int = Field(gt=0, description="|V_k|")
    command: Any = None


class TokenizerShelf:
    """The tokenizer used last, by its fingerprint: directories made with one tokenizer hold a copy of its file each."""

    def __init__(self) -> None:
        self._last: tuple[str, Tokenizer] | None = None

    def get(self, fingerprint: str, file: Path) -> Tokenizer:
        """The tokenizer of `file`, which has this fingerprint; loaded where it is not the last."""
        # Read once: another thread may put another there.
        last = self._last
        if last is None or last[0] != fingerprint:
            self._last = None  # freed before the next is loaded
            self._last = last = (fingerprint, load_tokenizer(file))
        return last[1]


class DatasetDirectory:
    """An opened dataset directory. `card` is card.json as it stands (checked against `Card`), `name` the source's."""

    def __init__(self, path: Path, card: dict[str, Any], shelf: "TokenizerShelf") -> None:
        self.path = path
        self.card = card
        self.name: str = card["name"]
        self._shelf = shelf

    @classmethod
    def open(cls, path: str | Path, shelf: "TokenizerShelf | None" = None) -> Self:
        """Read the card and check that the tokenizer beside it is the one it names; `DataError` where not.

        `shelf`: of several directories that may have a tokenizer in common.
        """
        path = Path(path)
        file = path / CARD_FILE
        if not file.is_file():
            raise DataError(f"{path} is not a dataset directory: it has no {CARD_FILE}; {REMEDY}")
        try:
            card = read_json(file)
            Card.model_validate(card)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the card"
            raise DataError(f"{file}: {field}: {first['msg']}; {REMEDY}") from error
        except UserError as error:
            raise DataError(str(error)) from error
        copy = path / card["tokenizer"]["file"]
        if not copy.is_file():
            raise DataError(f"{copy}, the tokenizer that {file.name} names, does not exist; {REMEDY}")
        found, expected = sha256_file(copy), card["tokenizer"]["fingerprint"]
        if found != expected:
            raise DataError(f"{copy} has fingerprint {found}, but {file.name} names {expected}; {REMEDY}")
        return cls(path, card, shelf or TokenizerShelf())

    def tokenizer(self) -> Tokenizer:
        """The dataset's tokenizer, loaded once. Raises `DataError` where it is not what the card says."""
        named = self.card["tokenizer"]
        file = self.path / named["file"]
        tokenizer = self._shelf.get(named["fingerprint"], file)
        if (tokenizer.kind, tokenizer.vocab_size) != (named["kind"], named["vocab_size"]):
            raise DataError(
                f"{file} is {tokenizer.kind} of {tokenizer.vocab_size} ids, but {self.path / CARD_FILE} "
                f"says {named['kind']} of {named['vocab_size']}; {REMEDY}"
            )
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise `DataError`, naming both, unless this dataset was made with `tokenizer`."""
        named = self.card["tokenizer"]
        own = self.path / named["file"]
        if tokenizer.fingerprint != named["fingerprint"]:
            raise DataError(
                f"{self.path} was made with the tokenizer {own} ({named['fingerprint'][:12]}), not "
                f"{tokenizer.path} ({tokenizer.fingerprint[:12]}); give that tokenizer, or {REMEDY}"
            )

    def indexed(self, split: str) -> IndexedDataset:
        """The split's tokens. Raises `DataError` where there is no such split or it is not what the card says."""
        if split not in self.card["splits"]:
            raise DataError(f"{self.path} has no split {split}, only {sorted(self.card['splits'])}; {REMEDY}")
        indexed = IndexedDataset(self.path / split)
        named = self.card["splits"][split]
        for what, found in (("documents", len(indexed)), ("tokens", indexed.total_tokens)):
            if found != named[what]:
                raise DataError(
                    f"{indexed.prefix}.idx has {found} {what}, but {self.path / CARD_FILE} says {named[what]}; {REMEDY}"
                )
        return indexed

    @cached_property
    def token_counts(self) -> np.ndarray:
        """Occurrences of each id in the training split, int64[V]. Raises `DataError`."""
        file = self.path / COUNTS_FILE
        try:
            # Mapped first: a hostile header is then refuted by the file's length instead of by an allocation.
            stored = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # numpy parses the header as Python and raises a dozen kinds for a broken one
            raise DataError(f"{file} cannot be read ({error}); {REMEDY}") from error
        vocab_size = self.card["tokenizer"]["vocab_size"]
        if stored.dtype != np.int64 or stored.shape != (vocab_size,):
            raise DataError(f"{file} is {stored.dtype}{stored.shape}, not int64({vocab_size},); {REMEDY}")
        counts = np.array(stored)
        tokens = self.card["splits"].get("train", {}).get("tokens")
        if counts.min() < 0 or counts.sum() != tokens:
            raise DataError(f"{file} counts {counts.sum()} tokens, but {CARD_FILE} says {tokens} in train; {REMEDY}")
        return counts

    def vocabulary(self) -> np.ndarray:
        """V_k: the ids of the training split and all byte and special ids, sorted, int64[v]. Raises `DataError`."""
        ids = source_vocabulary(self.token_counts, self.tokenizer())
        if len(ids) != self.card["vocabulary_size"]:
            raise DataError(
                f"{self.path} has a vocabulary of {len(ids)} ids, but its {CARD_FILE} says "
                f"{self.card['vocabulary_size']}; {REMEDY}"
            )
        return ids
