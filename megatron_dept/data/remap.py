"""A source's vocabulary V_k inside its tokenizer's: ids to local rows and back, and what to do with ids outside.

Under TRIM and SPEC (DEPT paper) a source has embedding rows for V_k alone: row r stands for id `ids[r]`.
Held-out text may hold a token that the training split never had; it is scored by the byte tokens of the same text.

Shapes: `v` local vocabulary |V_k|, `V` the tokenizer's vocabulary.
"""

from typing import Protocol

import numpy as np

from megatron_dept.common.errors import DataError


class ByteTokenizer(Protocol):
    """What of a tokenizer is needed here: an id as the byte tokens of the same text."""

    def byte_pieces(self, id: int, /) -> np.ndarray:
        """int64[bytes]; raises DataError where the tokenizer has no byte fallback."""
        ...


class VocabularyMap:
    """The ids of V_k, sorted int64[v], within [0, vocab_size). Memory: 4 bytes an id of the tokenizer.

    Raises ValueError where `ids` is empty, unsorted, repeated or outside.
    """

    def __init__(self, ids: np.ndarray, vocab_size: int) -> None:
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids) or (ids[1:] <= ids[:-1]).any():
            raise ValueError("ids must be a non-empty, strictly increasing list of integers")
        if ids[0] < 0 or ids[-1] >= vocab_size:
            raise ValueError(f"ids run from {ids[0]} to {ids[-1]}, outside the vocabulary of {vocab_size}")
        self.ids = ids.astype(np.int64)
        self.ids.flags.writeable = False
        self.vocab_size = vocab_size
        self._local = np.full(vocab_size, -1, np.int32)
        self._local[self.ids] = np.arange(len(ids), dtype=np.int32)

    def __len__(self) -> int:
        """|V_k|, the rows of the source's embedding."""
        return len(self.ids)

    def contains(self, array: np.ndarray) -> np.ndarray:
        """Which ids of `array` are in V_k, bool of its shape. Raises `DataError` for an id outside the tokenizer's."""
        mask: np.ndarray = self._rows(array) >= 0
        return mask

    def to_local(self, array: np.ndarray) -> np.ndarray:
        """Rows of the ids in `array`, int64 of its shape. Raises `DataError` naming an id that is not in V_k."""
        rows = self._rows(array)
        if (rows < 0).any():
            raise DataError(
                f"id {np.asarray(array)[rows < 0][0]} is not among the {len(self)} ids of the source's vocabulary; "
                "the data and the vocabulary are of different sources or tokenizers"
            )
        return rows

    def to_global(self, array: np.ndarray) -> np.ndarray:
        """Ids of the rows in `array`, int64 of its shape. Raises `DataError` naming a row that does not exist."""
        rows = np.asarray(array)
        outside = (rows < 0) | (rows >= len(self))
        if outside.any():
            raise DataError(f"row {rows[outside][0]} is outside the source's vocabulary of {len(self)} rows")
        return self.ids[rows]

    def _rows(self, array: np.ndarray) -> np.ndarray:
        """int64 rows, -1 where the id is not in V_k."""
        given = np.asarray(array)
        outside = (given < 0) | (given >= self.vocab_size)
        if outside.any():
            raise DataError(
                f"id {given[outside][0]} is outside the vocabulary of {self.vocab_size}; "
                "the data and the tokenizer do not match"
            )
        return self._local[given].astype(np.int64)


def expand_to_bytes(ids: np.ndarray, vocabulary_map: VocabularyMap, tokenizer: ByteTokenizer) -> tuple[np.ndarray, int]:
    """`ids` int64[s] with each id outside V_k replaced by its byte tokens: (ids int64[s'], number of ids replaced).

    The result is still in the tokenizer's ids and lies wholly in V_k, which holds all byte tokens. Raises `DataError`
    where the tokenizer has no byte fallback, an id stands for no text, or V_k lacks the byte tokens.
    """
    ids = np.asarray(ids).astype(np.int64, copy=False)
    known = vocabulary_map.contains(ids)
    if known.all():
        return ids, 0
    pieces = {int(unknown): _pieces(int(unknown), vocabulary_map, tokenizer) for unknown in np.unique(ids[~known])}
    lengths = np.ones(len(ids), np.int64)
    replaced = np.flatnonzero(~known).tolist()
    lengths[replaced] = [len(pieces[int(ids[place])]) for place in replaced]
    expanded = np.repeat(ids, lengths)
    starts = np.cumsum(lengths) - lengths
    for place in replaced:
        expanded[starts[place] : starts[place] + lengths[place]] = pieces[int(ids[place])]
    return expanded, len(replaced)


def _pieces(unknown: int, vocabulary_map: VocabularyMap, tokenizer: ByteTokenizer) -> np.ndarray:
    pieces = np.asarray(tokenizer.byte_pieces(unknown))
    if not len(pieces):
        raise DataError(f"id {unknown} is outside the source's vocabulary and stands for no text; add it to V_k")
    if not vocabulary_map.contains(pieces).all():
        raise DataError(
            f"id {unknown} is outside the source's vocabulary, and so are byte tokens of its text; add all byte tokens"
        )
    return pieces
