"""A source's held-out split as windows to score: each token but the first is a target exactly once.

Shapes: `n` windows, `L` tokens a sequence (seq_length), `v` ids of the vocabulary scored in (local ids), `V` ids of the
tokenizer. Numpy only.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from megatron_dept.common.errors import DataError
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.data.indexed import IndexedDataset
from megatron_dept.data.remap import VocabularyMap, expand_to_bytes


@dataclass(frozen=True)
class HeldoutText:
    """Held-out text cut into windows with stride L; see `heldout_windows`."""

    name: str
    windows: np.ndarray
    """int64 [n, L+1], local ids; the last window is filled up with id 0, which is never scored."""
    scored: np.ndarray
    """int64 [n]: the first so many targets of a window are scored."""
    bytes_per_token: np.ndarray
    """int64 [v]: UTF-8 bytes of text that a local id stands for; 0 for special tokens."""
    replaced: int
    """Held-out tokens outside the vocabulary, scored by their byte pieces."""

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return int(self.scored.sum())

    def share(self, index: int, count: int) -> Self:
        """Every count-th window from `index` on: a data-parallel rank's part.

        All shares have equally many windows (short ones end in windows of which nothing is scored), so ranks run
        equally many forward passes. The scores of all shares add up to the score of the whole; `replaced` is told by
        share 0 alone.
        """
        missing = -len(self.windows) % count
        windows = np.pad(self.windows, ((0, missing), (0, 0)))[index::count]
        scored = np.pad(self.scored, (0, missing))[index::count]
        return replace(self, windows=windows, scored=scored, replaced=self.replaced if index == 0 else 0)


def heldout_windows(
    directory: DatasetDirectory,
    seq_length: int,
    max_tokens: int | None = None,
    vocabulary_map: VocabularyMap | None = None,
) -> HeldoutText:
    """Concatenate the held-out split (eod after each document) and cut it into windows of seq_length + 1, stride L.

    Of the stream, the first token and up to `max_tokens` after it are taken (None: all of them). Only then tokens
    outside `vocabulary_map` (None: all V ids are known) are replaced by their byte pieces, so that all vocabularies
    under one tokenizer score the same text; scored tokens may therefore exceed `max_tokens` by the pieces.
    Raises DataError where there is nothing to score.
    """
    tokenizer = directory.tokenizer()
    stream = _read_stream(directory.indexed("heldout"), None if max_tokens is None else max_tokens + 1)
    if len(stream) < 2:
        raise DataError(
            f"{directory.name}: held-out split of {len(stream)} tokens has nothing to score; "
            "preprocess the source with a larger held-out share"
        )
    token_bytes = np.array([len(text) for text in tokenizer.token_bytes()], dtype=np.int64)
    replaced = 0
    if vocabulary_map is not None:
        try:
            stream, replaced = expand_to_bytes(stream, vocabulary_map, tokenizer)
            stream = vocabulary_map.to_local(stream)
        except DataError as error:
            raise DataError(f"{directory.name}: held-out split: {error}") from error
        token_bytes = token_bytes[vocabulary_map.ids]
    windows, scored = cut_windows(stream, seq_length)
    return HeldoutText(directory.name, windows, scored, token_bytes, int(replaced))


def cut_windows(stream: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut ids [t] into int64 windows [n, L+1] that overlap by one token, n = ceil((t - 1) / L), and targets [n] scored.

    Window i is stream[i L : i L + L + 1]: its L inputs predict the L tokens after them.
    """
    targets = len(stream) - 1
    count = -(-targets // seq_length)
    padded = np.zeros(count * seq_length + 1, dtype=np.int64)
    padded[: len(stream)] = stream
    windows = np.lib.stride_tricks.sliding_window_view(padded, seq_length + 1)[::seq_length].copy()
    scored = np.minimum(targets - np.arange(count) * seq_length, seq_length).astype(np.int64)
    return windows, scored


def _read_stream(indexed: IndexedDataset, limit: int | None) -> np.ndarray:
    """The first `limit` tokens of the split, documents in their order, int64; reads no document beyond."""
    parts, length = [np.empty(0, dtype=np.int64)], 0
    for document in range(len(indexed)):
        if limit is not None and length >= limit:
            break
        parts.append(indexed.document(document).astype(np.int64))
        length += len(parts[-1])
    return np.concatenate(parts)[:limit]
