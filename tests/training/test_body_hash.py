"""The body's hash as a GPU computes it is the host's."""

import numpy as np
import pytest
import torch

from megatron_dept.common.segments import Segment
from megatron_dept.training import body_hash


def test_int64_arithmetic_gives_the_hosts_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over chunks that end within pieces, copies that do not count, and numbers of every sign and size."""
    monkeypatch.setattr(body_hash, "_CHUNK", 1000)
    monkeypatch.setattr(body_hash, "_CHUNK_IN_PLACE", 700)
    flat = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.linspace(-38, 38, 5000)
    flat[:3] = torch.tensor([0.0, -0.0, torch.inf])
    segments = [Segment("a", 0, 3000, 0), Segment("a", 7, 9, 3000, primary=False), Segment("b", 100, 2098, 3002)]
    shapes = {"a": [3000], "b": [50, 60]}
    expected = body_hash.hash_partition(flat, segments, shapes)
    pieces = [(0, segments[0].place), (3100, segments[2].place)]
    assert body_hash._hash_in_place(flat, pieces) == expected
    assert body_hash._hash_on_host(flat.numpy().view(np.uint32), pieces) == expected
    flat[1] = 0.0  # -0.0 and 0.0 are different bits
    assert body_hash._hash_in_place(flat, pieces) != expected
