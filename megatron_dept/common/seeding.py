"""Randomness seeded by meaning.

A seed is a pure function of what the random numbers are for, such as `seed_for(seed, "order", source, epoch)`, and
never of a rank or of the order of calls. That is what makes a run the same on one process and on many.
"""

import hashlib

import numpy as np


def seed_for(*parts: str | int) -> int:
    """A 63-bit seed from the meaning of the numbers to draw; equal parts give equal seeds on any platform."""
    # numpy's integers print differently from Python's; the seed is that of the number.
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: str | int) -> np.random.Generator:
    """A numpy generator seeded by `seed_for(*parts)`."""
    return np.random.Generator(np.random.PCG64(seed_for(*parts)))
