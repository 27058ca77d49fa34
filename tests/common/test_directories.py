"""A directory of results is whole or absent, and nothing that is not ours is deleted."""

import errno
from pathlib import Path

import pytest

from megatron_dept.common.directories import whole_directory
from megatron_dept.common.errors import UserError


def make(path, text="new", **options):
    with whole_directory(path, "card.json", **options) as directory:
        (directory / "card.json").write_text(text)
        assert not path.exists() or not (path / "card.json").exists() or options.get("overwrite")


def test_it_appears_when_it_is_whole(tmp_path):
    make(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "card.json").read_text() == "new"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert (tmp_path / "out" / "card.json").exists()


def test_an_existing_one_is_refused_before_the_work(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(UserError, match="--overwrite"), whole_directory(tmp_path / "out", "card.json"):
        pytest.fail("the work began")
    assert (tmp_path / "out" / "card.json").read_text() == "old"


def test_it_is_replaced_when_told(tmp_path):
    make(tmp_path / "out", "old")
    (tmp_path / "out" / "left_over").touch()
    make(tmp_path / "out", "new", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["card.json"]
    assert (tmp_path / "out" / "card.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("text")
    for name in ("home", "file"):
        with (
            pytest.raises(UserError, match=r"holds no card\.json, so it is not ours"),
            whole_directory(tmp_path / name, "card.json", overwrite),
        ):
            pytest.fail("the work began")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), SystemExit(143)])
def test_after_an_error_all_is_as_before(tmp_path, error):
    make(tmp_path / "old", "old")
    for name, overwrite in (("new", False), ("old", True)):
        with pytest.raises(type(error)), whole_directory(tmp_path / name, "card.json", overwrite) as directory:
            (directory / "half.bin").write_text("x")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["card.json"]


def test_a_full_disk_is_the_users_to_mend(tmp_path):
    with (
        pytest.raises(UserError, match="cannot write .*out: No space left on device; free space"),
        whole_directory(tmp_path / "out", "card.json"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_one_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(UserError, match="--overwrite"), whole_directory(tmp_path / "out", "card.json"):
        make(tmp_path / "out" / "..other", "x")
        (tmp_path / "out" / "card.json").write_text("of another run")
    assert (tmp_path / "out" / "card.json").read_text() == "of another run"


def test_a_place_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), whole_directory(tmp_path / "file" / "out", "card.json"):
        pytest.fail("the work began")


def test_the_old_one_stays_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    make(tmp_path / "out", "old")
    rename = Path.rename

    def fail_for_new(self, target):
        if self.suffix == ".tmp":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(UserError, match="Permission denied"):
        make(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "card.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
