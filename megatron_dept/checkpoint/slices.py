"""State as named slices: safetensors files whose keys say which rows of which tensor they hold.

A key is `path@start`: rows `start` onwards (along the first dimension) of the tensor called `path`. Body parameters and
their optimizer moments are flattened first, so their rows are elements; embedding tables are cut by rows. Whoever reads
asks for a path and a range and never learns which rank wrote it, on which layout, or in how many files.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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


def save_slices(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file; `CheckpointError` names it where the disk refuses."""
    try:
        # Copies: safetensors refuses tensors that share memory, and pieces of one partition do.
        save_file({key: value.clone() for key, value in tensors.items()}, path)
        # safetensors makes files for their owner alone; a checkpoint is as open as any file its user makes.
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)
        flush_to_disk(path)
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path} ({error}); free space or choose another run_dir") from error


class SliceIndex:
    """All slices in a set of files, by path. Files are opened when read."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._pieces: dict[str, list[tuple[int, int, Path, str]]] = defaultdict(list)
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    for key in handle.keys():  # noqa: SIM118  not a dictionary
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
                with safe_open(file, framework="pt") as handle:
                    parts.append(handle.get_slice(key)[at - begin : min(end, stop) - begin])
                at = min(end, stop)
        if at < stop:
            raise CheckpointError(f"checkpoint holds {path} only up to row {at} of {stop}; it is of another model")
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def fill(self, flat: Tensor, prefix: str, segments: Iterable[Segment]) -> Tensor:
        """Fill a flat partition by name: the inverse of `cut_by_name` on any layout. Returns `flat`."""
        for segment in segments:
            flat[segment.place] = self.read(f"{prefix}/{segment.name}", segment.start, segment.stop)
        return flat
