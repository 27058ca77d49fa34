"""Token files in Megatron's indexed format, byte for byte: a writer and a validating, memory-mapped reader.

`PREFIX.bin` holds the ids of all documents one after another; `PREFIX.idx` holds, little-endian:

    magic "MMIDIDX\\0\\0" (9) | version 1 (u64) | dtype code (u8) | sequences n (u64) | document marks d (u64)
    sizes int32[n], tokens | pointers int64[n], bytes into .bin | document_indices int64[d], 0 first and n last

We write one sequence a document (d = n + 1). Files of other writers may hold several sequences a document; as in
Megatron's GPT dataset the sequence is then the unit that is read and shuffled, so "document" here means sequence.
"""

import contextlib
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

import numpy as np

from megatron_dept.common.errors import DataError, UserError
from megatron_dept.common.files import flush_to_disk

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are Megatron's float64 and float32: legal in its format, meaningless as token ids.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
FLOAT_CODES = (6, 7)
# Megatron's own threshold for two bytes a token.
UINT16_VOCABULARY = 65500
# Entries checked or written at once, so that neither needs memory in proportion to the number of documents.
CHUNK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The stored dtype for ids below `vocab_size`, as Megatron chooses it: uint16 below 65500, else int32."""
    return np.dtype("<u2" if vocab_size < UINT16_VOCABULARY else "<i4")


def index_path(prefix: str | Path) -> Path:
    """`PREFIX.idx`."""
    return Path(f"{prefix}.idx")


def tokens_path(prefix: str | Path) -> Path:
    """`PREFIX.bin`."""
    return Path(f"{prefix}.bin")


class IndexedDataset:
    """Documents of token ids at `prefix`, memory-mapped; everything the header claims is checked at construction.

    `sizes` int32[n] (tokens a document), `pointers` int64[n] (bytes), `document_indices` int64[d] and `tokens` (all
    ids, in the stored `dtype`) are read-only views of the files, those of the index unaligned in memory, as the format
    puts them at byte 34. Ids themselves are not checked here: that would read the whole file.

    Raises `DataError` naming the file and the defect.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index_file = index_path(prefix)
        index = _map(index_file)
        if index.size < HEADER.size:
            _refuse(index_file, f"is truncated: {index.size} bytes, less than its header of {HEADER.size}")
        magic, version, code, sequences, marks = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC:
            _refuse(index_file, f"is not a Megatron index: it starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            _refuse(index_file, f"has version {version}, not {VERSION}")
        if code in FLOAT_CODES:
            _refuse(index_file, f"has dtype code {code}, a floating-point type, which holds no token ids")
        if code not in DTYPES:
            _refuse(index_file, f"has dtype code {code}, which is none of {sorted(DTYPES)}")
        # Python integers: hostile counts neither overflow nor allocate before the file's length has refuted them.
        implied = HEADER.size + 12 * sequences + 8 * marks
        if index.size != implied:
            _refuse(
                index_file,
                f"is {index.size} bytes, but its header ({sequences} sequences, {marks} document marks) "
                f"implies {implied}",
            )
        self.dtype: np.dtype[Any] = np.dtype(DTYPES[code]).newbyteorder("<")
        offsets = (HEADER.size, HEADER.size + 4 * sequences, HEADER.size + 12 * sequences)
        self.sizes = np.frombuffer(index, "<i4", sequences, offsets[0])
        self.pointers = np.frombuffer(index, "<i8", sequences, offsets[1])
        self.document_indices = np.frombuffer(index, "<i8", marks, offsets[2])
        self.total_tokens = self._check_index(index_file)
        tokens_file = tokens_path(prefix)
        stored = _map(tokens_file)
        implied = self.total_tokens * self.dtype.itemsize
        if stored.size != implied:
            _refuse(
                tokens_file,
                f"is {stored.size} bytes, but {index_file.name} describes {self.total_tokens} tokens of "
                f"{self.dtype.name}, {implied} bytes",
            )
        self.tokens = np.frombuffer(stored, self.dtype, self.total_tokens)

    def _check_index(self, file: Path) -> int:
        """Check sizes, pointers and document marks against one another; the number of tokens."""
        total = 0
        for start in range(0, len(self.sizes), CHUNK):
            sizes = self.sizes[start : start + CHUNK].astype(np.int64)
            if sizes.min() < 0:
                where = start + int(np.argmax(sizes < 0))
                _refuse(file, f"gives document {where} the negative size {self.sizes[where]}")
            expected = (total + np.cumsum(sizes) - sizes) * self.dtype.itemsize
            wrong = np.flatnonzero(self.pointers[start : start + CHUNK] != expected)
            if wrong.size:
                where = start + int(wrong[0])
                _refuse(
                    file,
                    f"points document {where} at byte {self.pointers[where]}, but the sizes before it imply "
                    f"{expected[wrong[0]]}",
                )
            total += int(sizes.sum())
        marks = self.document_indices
        if not len(marks) or marks[0] != 0 or marks[-1] != len(self.sizes):
            _refuse(file, f"has document marks that do not run from 0 to its {len(self.sizes)} sequences")
        for start in range(0, len(marks), CHUNK):
            # Comparing neighbours, not subtracting them: hostile int64 values may overflow a difference.
            part = marks[start : start + CHUNK + 1]
            if (part[1:] < part[:-1]).any():
                _refuse(file, "has document marks that run backwards")
        return total

    def __len__(self) -> int:
        """Number of documents (sequences, where a foreign file holds several a document)."""
        return len(self.sizes)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        """Pickle the path, not the tokens: a worker process maps the same files."""
        return type(self), (self.prefix,)

    def document(self, index: int) -> np.ndarray:
        """Ids of one document, `dtype`[sizes[index]], a read-only view of the file. Raises IndexError."""
        return self.read(index, 0, None)

    def read(self, document: int, offset: int, length: int | None) -> np.ndarray:
        """`length` ids of `document` from `offset` (None: to its end), a read-only view of the file.

        Raises IndexError where the document does not exist or does not hold that range.
        """
        if not 0 <= document < len(self.sizes):
            raise IndexError(f"document {document} of {len(self.sizes)} in {self.prefix}")
        size = int(self.sizes[document])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"tokens {offset} to {offset + length} of {size} in document {document} of {self.prefix}")
        start = int(self.pointers[document]) // self.dtype.itemsize + offset
        return self.tokens[start : start + length]


class IndexedDatasetWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`, whole or absent: temporary neighbours, flushed to disk, then renamed.

    A context manager: it finalizes at a normal end and discards at an exception. Memory: 4 bytes a document.

    Raises `DataError` naming an id outside [0, vocab_size), `UserError` where the disk is full or not writable, and
    then leaves no file behind.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        if not 0 < vocab_size <= 1 << 31:
            raise ValueError(f"vocab_size {vocab_size} is not in 1 to 2**31, which Megatron's int32 ids can hold")
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.tokens = 0
        self._sizes = array("i")
        self._temporary_tokens = _neighbour(tokens_path(prefix))
        self._temporary_index = _neighbour(index_path(prefix))
        self._file: IO[bytes] | None = None
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            # Closed by finalize or discard.
            self._file = open(self._temporary_tokens, "wb", buffering=1 << 20)  # noqa: SIM115
        except OSError as error:
            self._fail(error)

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return len(self._sizes)

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document of ids, integer [s]; an empty one is kept as a document of no tokens."""
        assert self._file is not None, "add_document after finalize or discard"
        given = np.asarray(ids)
        if given.size == 0:
            given = given.astype(np.int64)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise DataError(
                f"{self.prefix}: document {self.documents} is {given.dtype} of shape {given.shape}; "
                "give a one-dimensional list of integer ids"
            )
        if given.size > np.iinfo(np.int32).max:
            raise DataError(f"{self.prefix}: document {self.documents} has {given.size} tokens; split it below 2**31")
        if given.size and (given.min() < 0 or given.max() >= self.vocab_size):
            bad = given[(given < 0) | (given >= self.vocab_size)][0]
            raise DataError(
                f"{self.prefix}: document {self.documents} holds id {bad}, outside the vocabulary of "
                f"{self.vocab_size}; tokenize with the tokenizer that this vocabulary size belongs to"
            )
        try:
            self._file.write(given.astype(self.dtype, copy=False).tobytes())
        except OSError as error:
            self._fail(error)
        self._sizes.append(given.size)
        self.tokens += given.size

    def finalize(self) -> None:
        """Write the index, flush both files to disk and put them in their places."""
        assert self._file is not None, "finalize after finalize or discard"
        final_tokens, final_index = tokens_path(self.prefix), index_path(self.prefix)
        try:
            _flush_to_disk(self._file)
            self._file.close()
            with open(self._temporary_index, "wb") as index:
                self._write_index(index)
                _flush_to_disk(index)
            # An index always describes the tokens beside it: the old one goes first, the new one comes last.
            final_index.unlink(missing_ok=True)
            os.replace(self._temporary_tokens, final_tokens)
            os.replace(self._temporary_index, final_index)
            flush_to_disk(final_index.parent)
        except OSError as error:
            self._fail(error)
        self._file = None

    def _write_index(self, index: IO[bytes]) -> None:
        sizes = np.frombuffer(self._sizes, np.int32) if self._sizes else np.empty(0, np.int32)
        code = next(code for code, dtype in DTYPES.items() if np.dtype(dtype).newbyteorder("<") == self.dtype)
        index.write(HEADER.pack(MAGIC, VERSION, code, len(sizes), len(sizes) + 1))
        index.write(sizes.astype("<i4", copy=False).tobytes())
        total = 0
        for start in range(0, len(sizes), CHUNK):
            part = sizes[start : start + CHUNK].astype(np.int64)
            ends = total + np.cumsum(part)
            index.write(((ends - part) * self.dtype.itemsize).astype("<i8").tobytes())
            total = int(ends[-1])
        for start in range(0, len(sizes) + 1, CHUNK):
            index.write(np.arange(start, min(start + CHUNK, len(sizes) + 1), dtype="<i8").tobytes())

    def discard(self) -> None:
        """Drop what was written; files that stood at the prefix before stay as they were."""
        if self._file is not None:
            # A full disk makes closing fail too, as it flushes; what matters is that the file goes.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        for temporary in (self._temporary_tokens, self._temporary_index):
            # Nor must this hide the error that led here, where the directory itself cannot be used.
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _fail(self, error: OSError) -> NoReturn:
        self.discard()
        raise UserError(
            f"cannot write {self.prefix}.bin and .idx: {error.strerror or error}; free space or choose another place"
        ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
        elif self._file is not None:
            self.finalize()


def _refuse(file: Path, defect: str) -> NoReturn:
    raise DataError(f"{file} {defect}; make the dataset again with tools/preprocess_data.py")


def _map(file: Path) -> np.ndarray:
    """The file's bytes, uint8[length], memory-mapped read-only; an empty file, which cannot be mapped, is no bytes."""
    try:
        if file.stat().st_size == 0:
            return np.empty(0, np.uint8)
        # A plain array over the map: slicing np.memmap itself costs ten times as much.
        return np.memmap(file, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        _refuse(file, f"cannot be read ({error.strerror or error})")


def _neighbour(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
