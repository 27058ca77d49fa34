"""Megatron's .bin/.idx, byte for byte; hostile and broken files; files whole or absent."""

import errno
import os
import pickle
import resource
import struct
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets import indexed_dataset as megatron

from megatron_dept.common.errors import DataError, UserError
from megatron_dept.data import indexed as ours
from megatron_dept.data.indexed import HEADER, IndexedDataset, IndexedDatasetWriter

DOCUMENTS = [[5, 6, 7], [1], [0, 99, 3, 4, 4]]
# A temporary directory shared by the examples of one property is fine: each example writes all of its files anew.
SHARED_DIRECTORY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(prefix, documents, vocab_size=100):
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_layout_spelled_out(tmp_path):
    prefix = write(tmp_path / "train", DOCUMENTS)
    assert prefix.with_suffix(".bin").read_bytes() == struct.pack("<9H", 5, 6, 7, 1, 0, 99, 3, 4, 4)
    assert prefix.with_suffix(".idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 3, 4)
        + struct.pack("<3i", 3, 1, 5)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    assert files(tmp_path) == ["train.bin", "train.idx"]


@settings(SHARED_DIRECTORY, max_examples=30)
@given(
    st.lists(st.lists(st.integers(0, 49_999), min_size=1, max_size=20), min_size=1, max_size=20),
    st.sampled_from([50_000, 65_499, 65_500, 250_112]),
)
def test_bytes_equal_megatrons_and_each_reads_the_other(tmp_path, documents, vocab_size):
    write(tmp_path / "ours", documents, vocab_size)
    dtype = megatron.DType.optimal_dtype(vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read_by_them = megatron.IndexedDataset(str(tmp_path / "ours"))
    read_by_us = IndexedDataset(tmp_path / "theirs")
    assert len(read_by_them) == len(read_by_us) == len(documents)
    assert read_by_us.dtype == read_by_them.index.dtype == dtype
    assert read_by_us.total_tokens == sum(map(len, documents))
    np.testing.assert_array_equal(read_by_us.document_indices, read_by_them.document_indices)
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(read_by_them[number], document)
        np.testing.assert_array_equal(read_by_us.document(number), document)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_reads_megatron_files_of_several_sequences_a_document(tmp_path, dtype):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    builder.add_document(torch.arange(9), [4, 0, 5])
    builder.add_document(torch.arange(2), [2])
    builder.finalize(str(tmp_path / "x.idx"))
    found = IndexedDataset(tmp_path / "x")
    assert [found.document(i).tolist() for i in range(len(found))] == [[0, 1, 2, 3], [], [4, 5, 6, 7, 8], [0, 1]]
    assert found.document_indices.tolist() == [0, 3, 4]
    assert found.dtype == dtype


def test_read_ranges(tmp_path):
    found = IndexedDataset(write(tmp_path / "x", DOCUMENTS))
    assert found.sizes.dtype == np.int32 and found.sizes.tolist() == [3, 1, 5]
    assert found.read(2, 1, 3).tolist() == [99, 3, 4]
    assert found.read(2, 4, None).tolist() == [4]
    assert found.read(0, 3, 0).tolist() == []
    with pytest.raises(ValueError, match="read-only"):
        found.document(0)[0] = 1
    for document, offset, length in [(3, 0, 1), (-1, 0, 1), (0, 2, 2), (0, -1, 1), (0, 0, -1), (0, 4, None)]:
        with pytest.raises(IndexError):
            found.read(document, offset, length)


def test_empty_documents_and_an_empty_dataset(tmp_path):
    found = IndexedDataset(write(tmp_path / "x", [[], [1], []]))
    assert [found.document(i).tolist() for i in range(3)] == [[], [1], []]
    none = IndexedDataset(write(tmp_path / "none", []))
    assert len(none) == none.total_tokens == 0


def test_chunked_checks_and_writes_agree_with_whole_ones(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 100, size) for size in generator.integers(0, 6, 50)]
    whole = write(tmp_path / "whole", documents)
    monkeypatch.setattr(ours, "CHUNK", 7)
    chunked = write(tmp_path / "chunked", documents)
    assert chunked.with_suffix(".idx").read_bytes() == whole.with_suffix(".idx").read_bytes()
    np.testing.assert_array_equal(IndexedDataset(whole).tokens, np.concatenate(documents))
    for place, message in [(20, "points document 20"), (49, "points document 49")]:
        corrupt(whole, HEADER.size + 4 * 50 + 8 * place, b"\xff\xff\xff\xff\xff\xff\xff\x7f")
        with pytest.raises(DataError, match=message):
            IndexedDataset(whole)
        write(whole, documents)
    corrupt(whole, HEADER.size + 12 * 50 + 8 * 7, struct.pack("<q", 3))
    with pytest.raises(DataError, match="run backwards"):
        IndexedDataset(whole)


def test_pickling_maps_the_files_again(tmp_path):
    prefix = write(tmp_path / "x", [np.arange(100) % 100] * 1000)
    pickled = pickle.dumps(IndexedDataset(prefix))
    assert len(pickled) < 1000
    assert pickle.loads(pickled).document(999).tolist() == list(range(100))


# --- broken and hostile files


def corrupt(prefix, place, content):
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(place)
        file.write(content)


def u64(value):
    return struct.pack("<Q", value)


@pytest.mark.parametrize(
    ("place", "content", "defect"),
    [
        (0, b"PK\x03\x04", "is not a Megatron index"),
        (9, u64(2), "has version 2, not 1"),
        (17, b"\x00", "has dtype code 0"),
        (17, b"\x09", "has dtype code 9"),
        (17, b"\x07", "floating-point"),
        (18, u64(2), r"is 102 bytes, but its header \(2 sequences, 4 document marks\) implies 90"),
        (18, u64(2**64 - 1), r"header \(18446744073709551615 sequences"),
        (26, u64(2**62), "4611686018427387904 document marks"),
        (34, struct.pack("<i", -3), "gives document 0 the negative size -3"),
        (38, struct.pack("<i", 2), "points document 2 at byte 8, but the sizes before it imply 10"),
        (46, struct.pack("<q", 2), "points document 0 at byte 2, but the sizes before it imply 0"),
        (70, struct.pack("<q", 1), "do not run from 0"),
        (78, struct.pack("<q", 3), "run backwards"),
        (94, struct.pack("<q", 4), "do not run from 0 to its 3 sequences"),
    ],
)
def test_every_defect_of_an_index_is_named(tmp_path, place, content, defect):
    prefix = write(tmp_path / "x", DOCUMENTS)
    corrupt(prefix, place, content)
    with pytest.raises(DataError, match=defect) as error:
        IndexedDataset(prefix)
    assert str(error.value).startswith(f"{prefix}.idx ") and "\n" not in str(error.value)


def test_wrong_lengths_and_missing_files_are_named(tmp_path):
    prefix = write(tmp_path / "x", DOCUMENTS)
    index, tokens = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    for suffix, content, defect in [
        (".idx", index[:-1], "x.idx is 101 bytes, but its header .* implies 102"),
        (".idx", index + bytes(3), "x.idx is 105 bytes"),  # also Megatron's multimodal files: a mode a sequence
        (".idx", index[:33], "x.idx is truncated: 33 bytes"),
        (".idx", b"", "x.idx is truncated: 0 bytes"),
        (".bin", tokens[:-2], "x.bin is 16 bytes, but x.idx describes 9 tokens of uint16, 18 bytes"),
        (".bin", tokens + b"\0", "x.bin is 19 bytes"),
        (".bin", b"", "x.bin is 0 bytes"),
    ]:
        prefix.with_suffix(".idx").write_bytes(index)
        prefix.with_suffix(".bin").write_bytes(tokens)
        prefix.with_suffix(suffix).write_bytes(content)
        with pytest.raises(DataError, match=defect):
            IndexedDataset(prefix)
    for suffix in (".bin", ".idx"):
        prefix.with_suffix(suffix).unlink()
        with pytest.raises(DataError, match=f"x{suffix} cannot be read .No such file"):
            IndexedDataset(prefix)
    prefix.with_suffix(".idx").mkdir()
    with pytest.raises(DataError, match=r"x\.idx"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("count", [2**31, 2**40, 2**61 - 3, 2**63, 2**64 - 1])
def test_hostile_counts_allocate_nothing(tmp_path, count):
    prefix = write(tmp_path / "x", DOCUMENTS)
    for place in (18, 26):
        corrupt(prefix, place, u64(count))
        tracemalloc.start()
        try:
            with pytest.raises(DataError):
                IndexedDataset(prefix)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A dataset written once, since flushing to disk is what takes the time, and the bytes of its index."""
    prefix = write(tmp_path_factory.mktemp("intact") / "x", DOCUMENTS)
    return prefix, prefix.with_suffix(".idx").read_bytes()


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, 101), st.integers(0, 255)), max_size=4),
    st.integers(0, 102),
    st.binary(max_size=9),
)
def test_fuzzed_index_is_refused_or_read_consistently(intact, changes, kept, appended):
    prefix, index = intact[0], bytearray(intact[1])
    for place, value in changes:
        index[place] = value
    # Half of the examples keep the length, or truncation would hide all other defects.
    if kept % 2:
        index = index[:kept] + appended
    prefix.with_suffix(".idx").write_bytes(index)
    try:
        found = IndexedDataset(prefix)
    except DataError:
        return
    stored = np.fromfile(prefix.with_suffix(".bin"), found.dtype)
    read = [found.document(number) for number in range(len(found))]
    assert [len(document) for document in read] == found.sizes.tolist()
    np.testing.assert_array_equal(np.concatenate([*read, stored[:0]]), stored)


# --- writing: whole or absent


@pytest.mark.parametrize("bad", [100, -1, 2**40])
def test_an_id_outside_the_vocabulary_is_named_and_nothing_is_left(tmp_path, bad):
    with (
        pytest.raises(DataError, match=rf"document 1 holds id {bad}, outside the vocabulary of 100"),
        IndexedDatasetWriter(tmp_path / "x", 100) as writer,
    ):
        writer.add_document([1, 99])
        writer.add_document([3, bad, 4])
    assert files(tmp_path) == []


@pytest.mark.parametrize("bad", [[1.5], [[1, 2]], ["a"], [1, 2**63], [2**70]])
def test_what_is_no_list_of_ids_is_refused(tmp_path, bad):
    with (
        pytest.raises(DataError, match="give a one-dimensional list"),
        IndexedDatasetWriter(tmp_path / "x", 9) as writer,
    ):
        writer.add_document(bad)
    assert files(tmp_path) == []


def test_counts_while_writing(tmp_path):
    with IndexedDatasetWriter(tmp_path / "deep" / "x", 100) as writer:
        writer.add_document(np.array([1, 2], np.uint16))
        writer.add_document([])
        assert (writer.documents, writer.tokens) == (2, 2)
        assert not (tmp_path / "deep" / "x.bin").exists()
    assert files(tmp_path / "deep") == ["x.bin", "x.idx"]


def test_a_failure_leaves_the_files_of_before(tmp_path):
    prefix = write(tmp_path / "x", DOCUMENTS)
    before = prefix.with_suffix(".bin").read_bytes()
    with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(prefix, 100) as writer:
        writer.add_document([1])
        raise KeyboardInterrupt
    assert files(tmp_path) == ["x.bin", "x.idx"]
    assert prefix.with_suffix(".bin").read_bytes() == before
    write(prefix, [[7]])
    assert IndexedDataset(prefix).document(0).tolist() == [7]


def test_no_index_ever_stands_beside_other_tokens(tmp_path, monkeypatch):
    """A stop between any two steps of replacing an old dataset leaves the old, the new, or no index."""
    prefix = tmp_path / "x"
    for steps in range(3):
        write(prefix, DOCUMENTS)
        done = iter(range(steps))
        with monkeypatch.context() as patch:
            for owner, name in ((type(prefix), "unlink"), (os, "replace")):
                patch.setattr(owner, name, stopping(getattr(owner, name), done))
            writer = IndexedDatasetWriter(prefix, 100)
            writer.add_document([7])
            with pytest.raises(StopIteration):
                writer.finalize()
        if prefix.with_suffix(".idx").exists():
            assert len(IndexedDataset(prefix)) == 3


def stopping(function, done):
    def wrapped(*arguments, **options):
        next(done)
        return function(*arguments, **options)

    return wrapped


@contextmanager
def largest_file(size):
    """Writes beyond `size` bytes fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("documents", "size"),
    [(10, 1 << 21), (1, 1 << 16), (3000, 1 << 13)],
    ids=["while adding", "at the last flush", "in the index"],
)
def test_a_full_disk_is_a_user_error_and_leaves_nothing(tmp_path, documents, size):
    tokens = {10: 200_000, 1: 50_000, 3000: 1}[documents]
    with (
        largest_file(size),
        pytest.raises(UserError, match=r"cannot write .*x\.bin and \.idx: File too large; free space"),
        IndexedDatasetWriter(tmp_path / "x", 100) as writer,
    ):
        for _ in range(documents):
            writer.add_document(np.ones(tokens, np.int64))
    assert files(tmp_path) == []


def test_no_space_left_at_fsync(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path / "x", DOCUMENTS)
    assert files(tmp_path) == []


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*; free space or choose another place"):
        IndexedDatasetWriter(tmp_path / "file" / "x", 100)


def test_vocabulary_size_must_fit_the_format(tmp_path):
    for size in (0, -1, 2**31 + 1):
        with pytest.raises(ValueError, match=f"vocab_size {size}"):
            IndexedDatasetWriter(tmp_path / "x", size)
