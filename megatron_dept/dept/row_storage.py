"""Where a rank's rows of a table are kept: in host memory, pinned beside a GPU, or in a mapped file on disk.

A table on disk may be far larger than memory: whoever works on it does so block by block and lets go of each, so what
is resident of it is a block. Files have no name from the moment they are made: no other run finds them, and their
space is free when the process ends, however it ends. What must last is a checkpoint's.
Shapes: `n` rows, `h` hidden; fp32.
"""

import mmap
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dept.common.errors import UserError
from megatron_dept.common.sizes import FP32_BYTES, PENDING_ON_DISK

BLOCK_BYTES = 8 << 20
"""Rows are worked on so many bytes at a time: bounds scratch memory, and what of a file is resident."""


@dataclass(frozen=True)
class RowStorage:
    """Makes tables: in files of `directory`, or in memory where that is None, `pinned` for GPUs to read it directly."""

    directory: Path | None = None
    pinned: bool = False

    def make(self, rows: int, hidden: int, initial: Callable[[int, int], Tensor] | None = None) -> "StoredRows":
        """A table of what `initial(start, stop)` gives for its blocks, or of zeros.

        `UserError` where the disk refuses: room is reserved now, since a disk that is full when a mapped page is
        written kills the process.
        """
        if self.directory is not None:
            stored = StoredRows(*_mapped(self.directory, rows, hidden))
        else:
            stored = StoredRows(torch.empty(rows, hidden))
            if initial is None:
                stored.tensor.zero_()
            if self.pinned:
                _pin(stored)
        if initial is not None:
            for start, stop in stored.blocks():
                stored.write(start, initial(start, stop))
        return stored

    def pending_rows(self, rows: int, hidden: int) -> int:
        """Of a table of `rows`, how many rows' worth of a round's deltas may wait in memory as they came."""
        return rows if self.directory is None else min(rows, PENDING_ON_DISK // (hidden * FP32_BYTES))


class StoredRows:
    """A table's rows: `tensor` fp32 [n, h], to be read and written in place; blocks of a mapped one are let go of."""

    def __init__(self, tensor: Tensor, mapping: mmap.mmap | None = None) -> None:
        self.tensor = tensor
        self._mapping = mapping

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the blocks that the table is worked on in, in order."""
        rows, at_once = len(self.tensor), block_rows(self.tensor.shape[1])
        for start in range(0, rows, at_once):
            yield start, min(start + at_once, rows)

    def read(self, start: int, stop: int) -> Tensor:
        """A copy of rows start..stop-1, which need not be resident any longer."""
        rows = self.tensor[start:stop].clone()
        self.let_go(start, stop)
        return rows

    def write(self, start: int, rows: Tensor) -> None:
        """Put `rows` in place from row `start` on; they need not be resident any longer."""
        stop = start + len(rows)
        self.tensor[start:stop] = rows
        self.let_go(start, stop)

    def let_go(self, start: int, stop: int) -> None:
        """Rows start..stop-1 need not be resident any longer; in host memory nothing changes."""
        if self._mapping is None or start >= stop:
            return
        row = self.tensor.shape[1] * FP32_BYTES
        first = start * row // mmap.PAGESIZE * mmap.PAGESIZE
        # A shared mapping loses nothing: what was written is the kernel's to bring to the file.
        self._mapping.madvise(mmap.MADV_DONTNEED, first, stop * row - first)


def block_rows(hidden: int) -> int:
    """Rows of a block."""
    return max(1, BLOCK_BYTES // max(1, hidden * FP32_BYTES))


def _mapped(directory: Path, rows: int, hidden: int) -> tuple[Tensor, mmap.mmap | None]:
    """A mapped file of zeros, as a tensor."""
    size = rows * hidden * FP32_BYTES
    if not size:
        return torch.empty(rows, hidden), None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory, prefix="rows-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            mapping = mmap.mmap(file.fileno(), size)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{directory} has no room for {size / 1e9:,.3f} GB of a shared table ({reason}); free space, set "
            "embedding.directory to another disk, or embedding.row_table to host"
        ) from error
    return torch.frombuffer(mapping, dtype=torch.float32).view(rows, hidden), mapping


def _forget_refusal() -> None:
    """CUDA keeps a refusal for whoever looks next: that would be a kernel, which would take it for its own failure."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.ones(1, device="cuda").add_(1)


def _pin(stored: StoredRows) -> None:
    """Pin a table's memory for as long as the table lives; where the machine refuses, say so and leave it pageable.

    Registered, not allocated pinned: torch's pinned allocations are rounded up to a power of two.
    """
    size = stored.tensor.numel() * FP32_BYTES
    if not size:
        return
    runtime = torch.cuda.cudart()
    address = stored.tensor.data_ptr()
    refusal = int(runtime.cudaHostRegister(address, size, 1))
    if refusal:
        _forget_refusal()
        warnings.warn(
            f"the machine would not pin {size / 1e9:,.3f} GB of a shared table (CUDA error {refusal}); it stays in "
            "pageable memory, from which copies to the GPU are slower; raise the limit of locked memory (ulimit -l)",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    weakref.finalize(stored, runtime.cudaHostUnregister, address).atexit = False
