"""The source store: what belongs to a source and must outlive its turn, on disk while another source trains.

One directory a source; files are named slices, written under a new version and renamed, never changed, so a checkpoint
can hold them by link. The store needs a file system that every silo a source may visit can reach.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from megatron_dept.checkpoint.slices import SliceIndex, save_slices
from megatron_dept.common.files import flush_to_disk

SOURCE_MARK = "@"
"""Between a source's name and its file's in a checkpoint; no source name holds it."""


class SourceStore:
    """Files `<directory>/<source>/<part>.<version>.safetensors`; the newest version of each part counts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, source: str, part: str, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a new version of one part and drop the older ones. Parts are written by one rank each."""
        folder = self._directory / source
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{part}.{version:08d}.safetensors"
        temporary = target.with_suffix(".tmp")
        save_slices(temporary, tensors)
        os.replace(temporary, target)
        flush_to_disk(folder)
        for old in folder.glob(f"{part}.*.safetensors"):
            if old != target:
                old.unlink()

    def files(self, source: str) -> list[Path]:
        """The current files of a source; none before its first turn.

        Of a part written by several ranks (`inner-0`, `inner-1`, ...) only the newest version counts, so pieces from a
        layout of more ranks do not outlive it.
        """
        files = sorted((self._directory / source).glob("*.safetensors"))
        newest: dict[str, str] = {}
        for file in files:
            part, version, _ = file.name.split(".")
            newest[_family(part)] = max(newest.get(_family(part), ""), version)
        return [file for file in files if file.name.split(".")[1] == newest[_family(file.name.split(".")[0])]]

    def index(self, source: str) -> SliceIndex | None:
        """What is stored of a source, or None before its first turn."""
        files = self.files(source)
        return SliceIndex(files) if files else None

    def restore(self, directory: Path, files: Iterable[str]) -> None:
        """Put the store back to what a checkpoint's linked `files` hold; of other times' files nothing stays."""
        self.clear()
        for name in files:
            source, mark, own_name = name.partition(SOURCE_MARK)
            if mark:
                target = self._directory / source / own_name
                target.parent.mkdir(parents=True, exist_ok=True)
                # Never copied over: a file that is there may be one that checkpoints hold by link.
                target.unlink(missing_ok=True)
                try:
                    os.link(directory / name, target)
                except OSError:
                    shutil.copyfile(directory / name, target)

    def clear(self) -> None:
        """Forget everything: a run that starts anew."""
        shutil.rmtree(self._directory, ignore_errors=True)


def _family(part: str) -> str:
    return part.partition("-")[0]
