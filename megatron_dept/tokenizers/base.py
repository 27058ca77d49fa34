"""The one interface of every tokenizer: text to ids and back, and which bytes of text each id stands for.

Legend: `V` vocab_size, the number of ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_dept.common.errors import DataError
from megatron_dept.common.files import sha256_file

Ids = npt.NDArray[np.int64]


class Tokenizer(ABC):
    """A tokenizer read from one file; cheap to pickle (the other side reads the file again).

    `encode` never turns text into a special id: a document that holds the letters `</s>` does not end there.
    """

    kind: Literal["sentencepiece", "huggingface"]
    path: Path
    vocab_size: int  # V
    eod_id: int  # appended to each document
    special_ids: Ids  # sorted; unknown, begin, end, pad, control: they stand for no text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.path),)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the file's bytes."""
        return sha256_file(self.path)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without specials, in order."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without specials."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; specials give nothing, bytes that are no UTF-8 give U+FFFD. `DataError`: id outside V."""

    @abstractmethod
    def _token_bytes(self) -> list[bytes]:
        """What `token_bytes` returns, computed once."""

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        return self._token_bytes()

    def token_bytes(self) -> list[bytes]:
        """For each of the V ids the UTF-8 bytes of the text it stands for; b"" for specials.

        A token may hold a part of a character. Bits per byte are counted by these.
        """
        return self._bytes_of

    @cached_property
    def _byte_ids(self) -> Ids | None:
        # Byte tokens stand before the pieces in every family of tokenizers, so the lowest id is the byte's own.
        found: dict[bytes, int] = {}
        for index, text in enumerate(self.token_bytes()):
            if len(text) == 1:
                found.setdefault(text, index)
        single = [found.get(bytes([value])) for value in range(256)]
        return None if None in single else np.array(single, dtype=np.int64)

    @property
    def has_byte_fallback(self) -> bool:
        """Whether each of the 256 bytes has a token, so that any text can be spelled."""
        return self._byte_ids is not None

    @property
    def byte_ids(self) -> Ids:
        """int64 [256]: the id of each single byte's token. `DataError` where the tokenizer has none."""
        if self._byte_ids is None:
            raise DataError(
                f"{self.path} has no token for each single byte, so text outside a source's vocabulary cannot be "
                "spelled; use a tokenizer with byte fallback (tools/train_tokenizer.py makes one)"
            )
        return self._byte_ids

    def byte_pieces(self, token_id: int) -> Ids:
        """int64 [bytes of the token]: the same text as `token_id`, spelled by single-byte ids; empty for specials."""
        self._check_ids([token_id])
        return self.byte_ids[np.frombuffer(self.token_bytes()[token_id], dtype=np.uint8)]

    def _check_ids(self, ids: Sequence[int]) -> None:
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise DataError(f"id {index} is outside the vocabulary of {self.path}, which has {self.vocab_size} ids")
