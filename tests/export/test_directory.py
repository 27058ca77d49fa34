"""A directory is whole or absent."""

import errno
import os

import pytest

from megatron_dept.common.errors import UserError
from megatron_dept.export.directory import atomic_directory


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_what_was_written_is_there_and_nothing_else(tmp_path):
    with atomic_directory(tmp_path / "a" / "out") as target:
        (target / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert names(tmp_path / "a") == ["out"] and names(tmp_path / "a" / "out") == ["file"]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out") as target:
        (target / "file").write_text("x")
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


def test_a_full_disk_is_a_user_error_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="out: No space left on device; free space"), atomic_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_a_librarys_own_error_is_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(OSError, match="no such model"), atomic_directory(tmp_path / "out"):
        raise OSError("no such model")


def test_what_exists_is_kept_unless_overwriting_is_allowed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "out"):
        pytest.fail("refused before anything is written")
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out", overwrite=True):
        1 / 0  # noqa: B018
    assert names(tmp_path / "out") == ["old"]
    with atomic_directory(tmp_path / "out", overwrite=True) as target:
        (target / "new").write_text("x")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match="is a file"), atomic_directory(tmp_path / "out", overwrite=True):
        pytest.fail("refused before anything is written")
