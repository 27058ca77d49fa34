"""Directories that are whole or absent: a result of several files is built beside its place and renamed into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dept.common.errors import UserError


@contextmanager
def whole_directory(path: str | Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary neighbour of `path` to write into; on success it becomes `path`, on any exception it goes.

    A `path` that exists is refused (`UserError`) unless it is empty, or `overwrite` is set and it is one of ours, that
    is, holds the file `marker`: nothing else is ever deleted. The check comes first, before any work.
    """
    path = Path(path)
    _check_place(path, marker, overwrite)
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        neighbour.mkdir(parents=True)
        yield neighbour
        _check_place(path, marker, overwrite)
        if path.exists():
            path.rename(old)
        neighbour.rename(path)
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(neighbour, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise UserError(f"cannot write {path}: {reason}; free space or choose another place") from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_place(path: Path, marker: str, overwrite: bool) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if not path.exists() and not path.is_symlink():
        return
    if not (path / marker).is_file():
        raise UserError(f"{path} exists and holds no {marker}, so it is not ours to replace; choose another place")
    if not overwrite:
        raise UserError(f"{path} exists; choose another place, or give --overwrite to replace it")
