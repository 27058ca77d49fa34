"""Named slices: what any ranks cut and saved, any other ranks read, to the bit, or are told what is missing."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.checkpoint.slices import SliceIndex, cut_by_name, in_blocks, save_slices, whole
from megatron_dept.common.errors import CheckpointError
from megatron_dept.common.segments import Segment

SIZES = {"a.weight": 7, "b": 1, "c.bias": 12}


def body() -> dict[str, torch.Tensor]:
    return {name: torch.randn(size, generator=torch.Generator().manual_seed(size)) for name, size in SIZES.items()}


def partitions(cuts: list[int], padding: int) -> list[tuple[int, list[Segment]]]:
    """The body's parameters end to end, cut at `cuts`: per rank its length, padding included, and its segments."""
    edges = [0, *sorted(cuts), sum(SIZES.values())]
    ranks = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        segments, begin = [], 0
        for name, size in SIZES.items():
            start, stop = max(low, begin), min(high, begin + size)
            if start < stop:
                segments.append(Segment(name, start - begin, stop - begin, start - low))
            begin += size
        ranks.append((high - low + padding, segments))
    return ranks


CUTS = st.lists(st.integers(0, sum(SIZES.values())), max_size=4)


@given(CUTS, CUTS, st.integers(0, 3))
def test_pieces_of_any_partition_fill_any_other(
    tmp_path_factory: pytest.TempPathFactory, saved: list[int], loaded: list[int], padding: int
) -> None:
    directory, tensors = tmp_path_factory.mktemp("slices"), body()
    for rank, (length, segments) in enumerate(partitions(saved, padding)):
        flat = torch.full((length,), torch.nan)
        for segment in segments:
            flat[segment.place] = tensors[segment.name][segment.start : segment.stop]
        save_slices(directory / f"{rank}.safetensors", cut_by_name("body", flat, segments))
    index = SliceIndex(directory.iterdir())
    assert sorted(index.paths("body/")) == sorted(SIZES)
    for name, tensor in tensors.items():
        assert torch.equal(index.read(f"body/{name}"), tensor)
    for length, segments in partitions(loaded, padding):
        flat = index.fill(torch.full((length,), -1.0), "body", segments)
        for segment in segments:
            assert torch.equal(flat[segment.place], tensors[segment.name][segment.start : segment.stop])
        assert (flat[length - padding :] == -1).all(), "padding is nobody's"


def test_a_table_is_saved_in_blocks_that_are_made_one_after_another(tmp_path: Path) -> None:
    """However it was cut, it is read by range; entries of other types beside it come back too."""
    table = torch.randn(11, 3, generator=torch.Generator().manual_seed(1))
    file = tmp_path / "one.safetensors"
    made: list[int] = []

    def rows(first: int, last: int) -> torch.Tensor:
        made.append(first)
        return table[first:last]

    blocks = [(0, 4), (4, 8), (8, 11)]
    odd = whole("flag", torch.tensor([True])) | whole("count", torch.arange(3)) | whole("half", table[:1].bfloat16())
    save_slices(file, {**odd, **in_blocks("token", 5, blocks, 3, rows)})
    assert sorted(made) == [0, 4, 8]
    index = SliceIndex([file])
    assert torch.equal(index.read("token", 5, 16), table) and torch.equal(index.read("token", 8, 14), table[3:9])
    assert torch.equal(index.read("count"), torch.arange(3)) and index.read("flag").tolist() == [True]
    assert torch.equal(index.read("half"), table[:1].bfloat16())


def test_a_file_without_entries_or_with_empty_ones(tmp_path: Path) -> None:
    save_slices(tmp_path / "none.safetensors", {})
    save_slices(tmp_path / "empty.safetensors", whole("nothing", torch.empty(0, 3)) | whole("one", torch.ones(1)))
    assert SliceIndex([tmp_path / "none.safetensors"]).paths("") == []
    index = SliceIndex([tmp_path / "empty.safetensors"])
    assert "nothing" in index and index.read("one").tolist() == [1.0]


def test_rows_of_a_table_are_read_by_range(tmp_path: Path) -> None:
    table = torch.arange(30.0).view(10, 3)
    save_slices(tmp_path / "b.safetensors", whole("token", table[4:], start=4) | whole("step", torch.ones(1)))
    save_slices(tmp_path / "a.safetensors", whole("token", table[:4]))
    index = SliceIndex(tmp_path.iterdir())
    assert "token" in index and "position" not in index
    assert torch.equal(index.read("token"), table)
    assert torch.equal(index.read("token", 2, 7), table[2:7])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    table = torch.zeros(10, 2)
    save_slices(tmp_path / "a.safetensors", whole("token", table[:3]) | whole("token", table[5:], start=5))
    index = SliceIndex(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="no tensor position; it is of another model or another variant"):
        index.read("position")
    with pytest.raises(CheckpointError, match="token only up to row 3 of 10"):
        index.read("token")
    with pytest.raises(CheckpointError, match="token only up to row 10 of 12"):
        index.read("token", 5, 12)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "part.safetensors"
    save_slices(file, whole("token", torch.zeros(100, 2)))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"part\.safetensors is not a readable checkpoint file"):
        SliceIndex([file])


def test_bits_survive(tmp_path: Path) -> None:
    """Zeros with a sign, the smallest number, infinities and a NaN; int32 and int64 as they are."""
    values = torch.tensor([0.0, -0.0, 1e-45, torch.inf, -torch.inf, torch.nan])
    counts, ids = torch.tensor([1, 2**31 - 1], dtype=torch.int32), torch.tensor([2**40])
    save_slices(tmp_path / "a.safetensors", whole("values", values) | whole("counts", counts) | whole("ids", ids))
    index = SliceIndex(tmp_path.iterdir())
    assert torch.equal(index.read("values").view(torch.int32), values.view(torch.int32))
    assert torch.equal(index.read("counts"), counts) and index.read("counts").dtype == torch.int32
    assert torch.equal(index.read("ids"), ids)
