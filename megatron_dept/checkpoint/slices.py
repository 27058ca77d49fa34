"""State as named slices: safetensors files whose keys say which rows of which tensor they hold.

A key is `path@start`: rows `start` onwards (along the first dimension) of the tensor called `path`. Body parameters and
their optimizer moments are flattened first, so their rows are elements; embedding tables are cut by rows. Whoever reads
asks for a path and a range and never learns which rank wrote it, on which layout, or in how many files.

Each entry has its CRC-32 in the file's metadata, over key, type, shape and bytes, and whoever reads it verifies that.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dept.checkpoint.slice_file import Deferred, Entry, write_slice_file
from megatron_dept.common.errors import CheckpointError
from megatron_dept.common.files import flush_to_disk
from megatron_dept.common.segments import Segment


def cut_by_name(prefix: str, flat: Tensor, segments: Iterable[Segment]) -> dict[str, Tensor]:
    """The named pieces of a flat partition as {"prefix/name@start": piece}; copies that another rank saves left out."""
    return {
        f"{prefix}/{segment.name}@{segment.start}": flat[segment.place].detach().cpu().contiguous()
        for segment in segments
        if segment.primary
    }


def whole(path: str, tensor: Tensor, start: int = 0) -> dict[str, Tensor]:
    """One tensor, or the rows of it from `start` on, as an entry."""
    return {f"{path}@{start}": tensor.detach().cpu().contiguous()}


def in_blocks(
    path: str, start: int, blocks: Iterable[tuple[int, int]], hidden: int, rows: Callable[[int, int], Tensor]
) -> dict[str, Entry]:
    """The rows of a table from `start` on, fp32 [n, hidden], as an entry a block, each made when it is written.

    `blocks`: (first, last) within the table; `rows(first, last)` gives them.
    """
    return {
        f"{path}@{start + first}": Deferred((last - first, hidden), torch.float32, partial(rows, first, last))
        for first, last in blocks
    }


def checksum(key: str, tensor: Tensor) -> str:
    """CRC-32 of an entry as it stands in a file: of its key, type, shape and bytes."""
    named = zlib.crc32(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, named):08x}"


def save_slices(path: Path, tensors: Mapping[str, Entry]) -> None:
    """Write one file, entry after entry; `CheckpointError` names it where the disk refuses."""
    try:
        write_slice_file(path, tensors, checksum)
        flush_to_disk(path)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path} ({error}); free space or choose another run_dir") from error


class SliceIndex:
    """All slices in a set of files, by path. Files are opened when read, and what is read of them is verified once."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._verified: set[tuple[Path, str]] = set()
        self._pieces: dict[str, list[tuple[int, int, Path, str]]] = defaultdict(list)
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    keys, sums = handle.keys(), handle.metadata()
                    if sums is not None and sums.keys() != set(keys):
                        raise ValueError("its header was damaged after it was written")
                    for key in keys:
                        path, _, start = key.rpartition("@")
                        rows = handle.get_slice(key).get_shape()[0]
                        self._pieces[path].append((int(start), int(start) + rows, file, key))
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(
                    f"{file} is not a readable checkpoint file ({error}); remove this checkpoint and use an earlier one"
                ) from error
        for pieces in self._pieces.values():
            pieces.sort()

    def __contains__(self, path: str) -> bool:
        return path in self._pieces

    def paths(self, prefix: str) -> list[str]:
        """Every path under `prefix`, with the prefix taken off."""
        return [path[len(prefix) :] for path in self._pieces if path.startswith(prefix)]

    def read(self, path: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of `path` (default: to its end); `CheckpointError` where any of them is in no file."""
        pieces = self._pieces.get(path)
        if pieces is None:
            raise CheckpointError(f"checkpoint has no tensor {path}; it is of another model or another variant")
        stop = max(piece[1] for piece in pieces) if stop is None else stop
        parts = []
        at = start
        for begin, end, file, key in pieces:
            if begin <= at < end and at < stop:
                parts.append(self._rows(file, key, at - begin, min(end, stop) - begin))
                at = min(end, stop)
        if at < stop:
            raise CheckpointError(f"checkpoint holds {path} only up to row {at} of {stop}; it is of another model")
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _rows(self, file: Path, key: str, first: int, last: int | None) -> Tensor:
        """Rows [first, last) of one entry (None: to its end), a copy; `CheckpointError` where the entry is damaged."""
        with safe_open(file, framework="pt") as handle:
            # Mapped, not read: to verify all of a large entry takes time, and no memory.
            entry = handle.get_tensor(key)
            # Files of earlier releases have no checksums.
            expected = (handle.metadata() or {}).get(key)
            if expected is not None and (file, key) not in self._verified:
                found = checksum(key, entry)
                if found != expected:
                    raise CheckpointError(
                        f"{file}: {key} has checksum {found}, not {expected}: the file was damaged after it was "
                        "written; check the disk, remove this checkpoint and start again from an earlier one"
                    )
                self._verified.add((file, key))
            return entry[first:last].clone()

    def fill(self, flat: Tensor, prefix: str, segments: Iterable[Segment]) -> Tensor:
        """Fill a flat partition by name: the inverse of `cut_by_name` on any layout. Returns `flat`."""
        for segment in segments:
            flat[segment.place] = self.read(f"{prefix}/{segment.name}", segment.start, segment.stop)
        return flat
