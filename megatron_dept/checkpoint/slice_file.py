"""A safetensors file written entry by entry, so that no more than one of them need be in memory at once.

The format (huggingface.co/docs/safetensors): eight bytes of the header's length, a JSON header, the entries' bytes end
to end. Checksums, known once an entry has been made, are put into the header's place for them at the end.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PLACE_OF_CHECKSUM = "0" * 8


@dataclass(frozen=True)
class Deferred:
    """An entry that is made when it is written: `make()` gives a tensor of `shape` and `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def __len__(self) -> int:
        return self.shape[0]


Entry = Tensor | Deferred


def write_slice_file(
    path: Path, entries: Mapping[str, Entry], checksum: Callable[[str, Tensor], str] | None = None
) -> None:
    """Write one file; `OSError` where the disk refuses. `checksum(key, tensor)`: eight characters for the metadata."""
    # As the library orders them: the widest types first, so that every entry is aligned to its type.
    keys = sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))
    checksums = dict.fromkeys(keys, _PLACE_OF_CHECKSUM) if checksum is not None else {}
    header = _header(entries, keys, checksums)
    with open(path, "wb") as file:
        file.write(header)
        for key in keys:
            entry = entries[key]
            tensor = entry.make() if isinstance(entry, Deferred) else entry
            assert tuple(tensor.shape) == tuple(entry.shape) and tensor.dtype == entry.dtype, f"{key}: {tensor.shape}"
            tensor = tensor.detach().cpu().contiguous()
            if checksum is not None:
                checksums[key] = checksum(key, tensor)
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
        if checksum is not None:
            with_checksums = _header(entries, keys, checksums)
            assert len(with_checksums) == len(header), f"a checksum is not {len(_PLACE_OF_CHECKSUM)} characters"
            file.seek(0, os.SEEK_SET)
            file.write(with_checksums)


def _header(entries: Mapping[str, Entry], keys: list[str], checksums: dict[str, str]) -> bytes:
    """The length and the header, padded so that the entries begin at a multiple of eight bytes."""
    header: dict[str, object] = {"__metadata__": checksums} if checksums else {}
    at = 0
    for key in keys:
        shape, dtype = list(entries[key].shape), entries[key].dtype
        end = at + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": _TYPES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
