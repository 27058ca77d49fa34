"""The order in which one source's samples are trained: an endless stream, a pure function of (seed, name, epoch).

Megatron's way: each epoch shuffles the documents, concatenates them, cuts the concatenation into windows of
seq_length + 1 tokens with stride seq_length (a window's last token is the next one's first), and shuffles the windows.
The last partial window is dropped. The cursor is one number, samples consumed, so it does not depend on the layout,
the batch size or the rank.

Shapes: `n` samples, `L` seq_length.
"""

from dataclasses import dataclass
from operator import index as as_int

import numpy as np

from megatron_dept.common.errors import DataError
from megatron_dept.common.seeding import generator_for
from megatron_dept.data.indexed import IndexedDataset
from megatron_dept.ops.index_builder import build_sample_index


@dataclass(frozen=True)
class Epoch:
    """One epoch's order: `documents` int64[d], `starts` int64[m + 1, 2] (build_sample_index), `samples` int64[m]."""

    number: int
    documents: np.ndarray
    starts: np.ndarray
    samples: np.ndarray


class SampleStream:
    """Endless samples of seq_length + 1 token ids of one source, any of them reachable by its number.

    Memory: the order of one epoch (8 bytes a document, 24 a sample), built when first needed and replaced when a sample
    of another epoch is asked for. Raises `DataError` where the source has too few tokens for one sample.
    """

    def __init__(self, indexed: IndexedDataset, seq_length: int, seed: int, name: str) -> None:
        if seq_length < 1:
            raise ValueError(f"seq_length must be positive, not {seq_length}")
        if indexed.total_tokens <= seq_length:
            raise DataError(
                f"source {name}: {indexed.prefix} has {indexed.total_tokens} tokens, too few for one sample of "
                f"seq_length {seq_length} + 1; add text or lower model.seq_length"
            )
        self.indexed = indexed
        self.seq_length = as_int(seq_length)
        # Plain integers, because seeds are made of the printed form, in which numpy's integers differ.
        self.seed = as_int(seed)
        self.name = name
        self.samples_per_epoch = (indexed.total_tokens - 1) // self.seq_length
        self._epoch: Epoch | None = None

    def sample(self, cursor: int) -> np.ndarray:
        """Sample number `cursor`, int64[L + 1]; inputs are its first L ids, targets its last L. Raises ValueError."""
        return self.batch(cursor, 1)[0]

    def batch(self, cursor: int, n: int) -> np.ndarray:
        """Samples cursor to cursor + n, int64[n, L + 1]; may cross epochs. Raises ValueError for a negative cursor."""
        cursor = as_int(cursor)
        if cursor < 0:
            raise ValueError(f"cursor {cursor} is negative")
        out = np.empty((n, self.seq_length + 1), np.int64)
        for row in range(n):
            number, position = divmod(cursor + row, self.samples_per_epoch)
            self._fill(out[row], self._order(number), position)
        return out

    def prepare(self, cursor: int) -> None:
        """Build now the order of the epoch that sample `cursor` is in, which else its first batch does."""
        self._order(cursor // self.samples_per_epoch)

    def _order(self, number: int) -> Epoch:
        # Held here: another thread may be preparing another epoch.
        epoch = self._epoch
        if epoch is None or epoch.number != number:
            self._epoch = epoch = None  # freed before the next is built: never two in memory
            documents = generator_for(self.seed, "documents", self.name, number).permutation(len(self.indexed))
            starts = build_sample_index(self.indexed.sizes, documents, self.seq_length)
            samples = generator_for(self.seed, "samples", self.name, number).permutation(self.samples_per_epoch)
            assert len(starts) == self.samples_per_epoch + 1, "every epoch holds the same tokens"
            self._epoch = epoch = Epoch(number, documents, starts, samples)
        return epoch

    def _fill(self, out: np.ndarray, epoch: Epoch, position: int) -> None:
        """Copy the sample at `position` of the epoch, document by document, into `out` [L + 1]."""
        place, offset = epoch.starts[epoch.samples[position]].tolist()
        filled = 0
        while filled < len(out):
            document = int(epoch.documents[place])
            wanted = min(int(self.indexed.sizes[document]) - offset, len(out) - filled)
            out[filled : filled + wanted] = self.indexed.read(document, offset, wanted)
            filled += wanted
            place, offset = place + 1, 0
