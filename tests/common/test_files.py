"""Files are whole or absent, whatever happens while they are written."""

import errno
import hashlib
import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.common.errors import UserError
from megatron_dept.common.files import atomic_write, read_json, sha256_file, write_json

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def names(directory: Path) -> list[str]:
    """Everything in a directory, hidden and temporary files too."""
    return sorted(os.listdir(directory))


def test_what_is_written_is_there_and_nothing_beside_it(tmp_path):
    with atomic_write(tmp_path / "new" / "file.bin") as handle:
        handle.write(b"\x00\xff")
        assert not (tmp_path / "new" / "file.bin").exists(), "a reader would see half of it"
    assert (tmp_path / "new" / "file.bin").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "new") == ["file.bin"]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    with atomic_write(tmp_path / "text", "w") as handle:
        handle.write("gr\u00fc\u00df \u03b3\n")
    assert (tmp_path / "text").read_bytes() == "gr\u00fc\u00df \u03b3\n".encode()


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_file(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(tmp_path / "file") as handle:
        handle.write(b"new")
        raise error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_disk_that_refuses_is_told_with_file_and_remedy(tmp_path):
    """The kernel's own refusal, by a limit on this process's file sizes."""
    (tmp_path / "file").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError) as caught, atomic_write(tmp_path / "file") as handle:
            handle.write(bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'file'}: {os.strerror(errno.EFBIG)}; free space or choose another place"
    )
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_disk_that_fills_at_the_flush(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_json(tmp_path / "file", {})
    assert names(tmp_path) == []


def test_a_place_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'file' / 'below'}"):
        write_json(tmp_path / "file" / "below", {})


@given(plain)
def test_json_reads_back_equal(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert json.loads(path.read_text(encoding="utf-8")) == value


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff{}"])
def test_json_that_is_none_is_told_with_its_file(tmp_path, content):
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path / 'card.json'} is not valid JSON \(.*\); make it again$"):
        read_json(tmp_path / "card.json")


def test_json_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path / 'none.json'} does not exist$"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_the_hash_is_of_every_byte(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()
