"""Several sources as one stream: each draw is of source k with probability n_k**tau / sum_j n_j**tau.

tau = 1 is proportional sampling, tau = 0 uniform: the mixtures of the DEPT paper's baseline STD, and of ACT.
Draws are independent, and draw i is a pure function of (seed, i): they are made in blocks, each seeded by its number.
A block first draws how many samples each source has in it (multinomial), then shuffles them: the same distribution as
independent draws, and what came before any cursor is counted from the multinomials alone, without making the draws.

Shapes: `n` samples, `L` seq_length, `k` sources, `B` draws a block.
"""

from collections.abc import Sequence
from operator import index as as_int

import numpy as np

from megatron_dept.common.errors import DataError
from megatron_dept.common.seeding import generator_for
from megatron_dept.data.sampler import SampleStream

# A change of this changes every blended order.
BLOCK = 1 << 16


def draw_probabilities(weights: Sequence[int] | np.ndarray, tau: float) -> np.ndarray:
    """n_k**tau, normalized, float64[k]; in logarithms, so that token counts to any tau do not overflow."""
    logarithms = tau * np.log(np.asarray(weights, np.float64))
    powers = np.exp(logarithms - logarithms.max())
    probabilities: np.ndarray = powers / powers.sum()
    return probabilities


class BlendedStream:
    """Endless samples of all `streams`; `weights` are the sources' token counts n_k, in the order of `streams`.

    Within a source samples come in its own order: the source's cursor is the number of earlier draws of it.
    Raises `DataError` where a source has no tokens, ValueError where the arguments do not fit together.
    """

    def __init__(
        self, streams: Sequence[SampleStream], weights: Sequence[int] | np.ndarray, tau: float, seed: int
    ) -> None:
        if not streams or len(streams) != len(weights):
            raise ValueError(f"{len(streams)} streams and {len(weights)} weights do not make a blend")
        if len({stream.seq_length for stream in streams}) != 1:
            raise ValueError(f"streams differ in seq_length: {[stream.seq_length for stream in streams]}")
        for stream, weight in zip(streams, weights, strict=True):
            if not weight > 0:
                raise DataError(f"source {stream.name} has weight {weight}; every blended source needs tokens")
        self.streams = tuple(streams)
        self.seq_length = streams[0].seq_length
        # Plain integers, because seeds are made of the printed form, in which numpy's integers differ.
        self.seed = as_int(seed)
        self.probabilities = draw_probabilities(weights, tau)
        # counts_before[b]: draws of each source in the blocks before b, int64[k]; grows as cursors ask for it.
        self._counts_before = [np.zeros(len(streams), np.int64)]
        self._block: tuple[int, np.ndarray] | None = None

    def source_of(self, cursor: int) -> int:
        """Which source (index into `streams`) sample `cursor` comes from."""
        return int(self.sources_of(cursor, 1)[0])

    def sources_of(self, cursor: int, n: int) -> np.ndarray:
        """The sources of samples cursor to cursor + n, int64[n]. Raises ValueError for a negative cursor."""
        cursor = _checked(cursor)
        out = np.empty(n, np.int64)
        filled = 0
        while filled < n:
            block, start = divmod(cursor + filled, BLOCK)
            part = self._draws(block)[start : start + n - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out

    def cursors(self, cursor: int) -> np.ndarray:
        """Draws of each source before `cursor`, int64[k]: where each source's own stream stands."""
        block, start = divmod(_checked(cursor), BLOCK)
        while len(self._counts_before) <= block:
            counts, _ = self._block_counts(len(self._counts_before) - 1)
            self._counts_before.append(self._counts_before[-1] + counts)
        within = np.bincount(self._draws(block)[:start], minlength=len(self.streams)) if start else 0
        total: np.ndarray = self._counts_before[block] + within
        return total

    def sample(self, cursor: int) -> np.ndarray:
        """Sample number `cursor`, int64[L + 1]."""
        return self.batch(cursor, 1)[0][0]

    def batch(self, cursor: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples cursor to cursor + n, int64[n, L + 1], and their sources, int64[n]."""
        sources = self.sources_of(cursor, n)
        positions = self.cursors(cursor)
        out = np.empty((n, self.seq_length + 1), np.int64)
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            # Draws of one source within consecutive cursors are consecutive samples of its stream.
            out[rows] = self.streams[source].batch(int(positions[source]), len(rows))
        return out, sources

    def _block_counts(self, block: int) -> tuple[np.ndarray, np.random.Generator]:
        """Draws of each source in a block, int64[k], and the generator that goes on to shuffle them."""
        generator = generator_for(self.seed, "blend", block)
        return generator.multinomial(BLOCK, self.probabilities), generator

    def _draws(self, block: int) -> np.ndarray:
        """The sources of a block's draws, int64[B]; the last block asked for is kept."""
        if self._block is None or self._block[0] != block:
            counts, generator = self._block_counts(block)
            draws = np.repeat(np.arange(len(self.streams)), counts)
            generator.shuffle(draws)
            self._block = (block, draws)
        return self._block[1]


def _checked(cursor: int) -> int:
    cursor = as_int(cursor)
    if cursor < 0:
        raise ValueError(f"cursor {cursor} is negative")
    return cursor
