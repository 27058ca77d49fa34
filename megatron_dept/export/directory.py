"""A directory that is whole or absent: written beside its place and renamed into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megatron_dept.common.errors import UserError


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty directory beside `path` to write in; on success flush it and rename it to `path`.

    Any failure leaves `path` as it was and removes what was written. Raises `UserError` where `path` exists and
    `overwrite` is not set, and for what the file system refuses (no space, no permission).
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another place or allow overwriting")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose another place")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        _swap(temporary, path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # a library's own complaint, not the file system's: a bug
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; free space or choose another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; a directory that stood there is removed only after the new one is in its place."""
    if not path.exists():
        os.rename(temporary, path)
        return
    former = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, former)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(former, path)
        raise
    shutil.rmtree(former, ignore_errors=True)
