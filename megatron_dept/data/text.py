"""Reads documents out of text: JSON lines and plain text files, each also gzip or zstandard compressed.

Text is taken as it is, byte for byte: no newline is translated, nothing is stripped but a byte order mark. Anything
that is not valid is a `DataError` that names file and line; documents of white space alone are left out.
"""

import argparse
import glob
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import orjson
import zstandard

from megatron_dept.common.errors import DataError

Separator = Literal["file", "line", "blank-line"]
SEPARATORS: tuple[Separator, ...] = ("file", "line", "blank-line")
JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
TEXT_SUFFIXES = {".txt"}
COMPRESSED_SUFFIXES = {".gz", ".zst"}

_READ_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GLOB_CHARACTERS = set("*?[")


@dataclass(frozen=True)
class TextFormat:
    """Where documents are: the field of a JSON line, and what parts a plain text file into documents.

    `separator`: "file", the whole file is one; "line", each line; "blank-line", each run of lines between blank ones.
    """

    text_key: str = "text"
    separator: Separator = "file"


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options that `TextFormat` is made of (`text_format`), the same in every tool that reads text."""
    parser.add_argument("--text-key", default="text", help="the field of a JSON line that holds the document")
    parser.add_argument(
        "--document-separator",
        choices=SEPARATORS,
        default="file",
        help="what parts a plain text file into documents: nothing (one file, one document), lines, or blank lines",
    )


def text_format(arguments: argparse.Namespace) -> TextFormat:
    """What `add_text_options` was given."""
    return TextFormat(arguments.text_key, arguments.document_separator)


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files behind `inputs`, each a file, a directory or a glob (`**` too); in order, none twice.

    Of a directory all .txt, .jsonl, .ndjson and .json below it (also .gz, .zst), hidden ones left out. A file named or
    matched by a glob is taken whatever its suffix: JSON lines by those three, plain text otherwise. `DataError`: an
    input that matches nothing.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if _is_corpus_file(file, path)]
        elif path.exists():
            files = [path]
        elif _GLOB_CHARACTERS & set(str(given)):
            files = [file for file in sorted(map(Path, glob.glob(str(given), recursive=True))) if file.is_file()]
        else:
            raise DataError(f"input {given} does not exist; give a file, a directory or a glob")
        if not files:
            suffixes = ", ".join(sorted(TEXT_SUFFIXES | JSON_SUFFIXES))
            raise DataError(f"input {given} holds no file to read ({suffixes}, or what a glob names); check the path")
        found |= dict.fromkeys(files)
    return list(found)


def read_documents(path: Path, form: TextFormat) -> Iterator[str]:
    """The documents of one file in order, without those of white space alone. `DataError` names file and line."""
    read = _read_json_lines if _kind(path) in JSON_SUFFIXES else _read_text
    try:
        with _open(path) as handle:
            for document in read(handle, path, form):
                if document and not document.isspace():
                    yield document
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (zlib.error, EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{path} is not a whole {path.suffix} file ({error}); compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _is_corpus_file(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and _kind(file) in JSON_SUFFIXES | TEXT_SUFFIXES and file.is_file()


def _kind(path: Path) -> str:
    """The suffix that says what is inside, `.jsonl` of `a.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstandardFile(path), _READ_BYTES))
    return open(path, "rb")


class _ZstandardFile(io.RawIOBase):
    """The text of a .zst file of one or more frames; unlike the package's own reader it sees a file cut short."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  closed by close
        self._decoder: zstandard.ZstdDecompressionObj | None = None  # of the frame we are in
        self._packed = self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._packed = self._packed or self._file.read(_READ_BYTES)
            if not self._packed:
                if self._decoder is not None:
                    raise EOFError("it ends within a frame")
                return 0
            decoder = self._decoder or zstandard.ZstdDecompressor().decompressobj()
            self._text = decoder.decompress(self._packed)
            self._packed = decoder.unused_data if decoder.eof else b""
            self._decoder = None if decoder.eof else decoder
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_json_lines(handle: BinaryIO, path: Path, form: TextFormat) -> Iterator[str]:
    for number, line in enumerate(handle, 1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            _decode(line, path, number)  # says so where the fault is in the bytes
            raise DataError(f"{path} line {number} is not JSON ({error}); each line is one JSON object") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path} line {number} is not a JSON object; each line is one, with the field {form.text_key!r}"
            )
        text = record.get(form.text_key)
        if not isinstance(text, str):
            fields = ", ".join(map(repr, record)) or "none"
            what = "is not text" if form.text_key in record else f"is missing (fields: {fields})"
            raise DataError(f"{path} line {number}: field {form.text_key!r} {what}; name the right one with --text-key")
        yield text


def _read_text(handle: BinaryIO, path: Path, form: TextFormat) -> Iterator[str]:
    if form.separator == "file":
        yield _decode(handle.read().removeprefix(_BYTE_ORDER_MARK), path, 1)
        return
    gathered: list[str] = []
    for number, line in enumerate(handle, 1):
        text = _decode(line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line, path, number)
        if form.separator == "line":
            yield _without_end(text)
        elif not text.isspace():
            gathered.append(text)
        elif gathered:
            yield _without_end("".join(gathered))
            gathered = []
    if gathered:
        yield _without_end("".join(gathered))


def _without_end(text: str) -> str:
    """The text without its last line's end, which parts documents and is in none."""
    return text.removesuffix("\n").removesuffix("\r")


def _decode(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path} line {line} is not valid UTF-8 (byte 0x{data[error.start]:02x}: {error.reason}); convert the "
            "file, as with iconv, or mend the line"
        ) from error
