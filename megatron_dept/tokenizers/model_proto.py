"""Reads and edits a sentencepiece `.model` file: the few fields of its protocol buffer that we need.

Written out by hand (protobuf's wire format is five lines) so that the protobuf package is not needed. Field numbers
are those of sentencepiece_model.proto.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_dept.common.errors import DataError

SPACE = "\u2581"  # sentencepiece's sign for a space

# SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# TrainerSpec.ModelType
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of the model
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of a piece


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary: `text` with U+2581 for a space, `score` (a float32), `type` one of the above."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class ModelProto:
    """What a model is: its pieces in order of id, and how it treats text before it looks for them."""

    pieces: list[Piece]
    model_type: str
    normalizes: bool  # rewrites characters (NFKC and the like)
    dummy_prefix: bool  # puts a space before the text
    removes_whitespace: bool  # joins runs of spaces and strips the ends
    escapes_whitespace: bool  # writes a space as U+2581
    whitespace_as_suffix: bool

    @cached_property
    def lossless(self) -> bool:
        """Whether text goes through unchanged, and byte by byte where no piece has it."""
        changes = self.normalizes or self.dummy_prefix or self.removes_whitespace or self.whitespace_as_suffix
        types = {piece.type for piece in self.pieces}
        has_space = any(piece.text == SPACE and piece.type == NORMAL for piece in self.pieces)
        return (
            not changes
            and self.escapes_whitespace
            and has_space
            and self.model_type in ("unigram", "bpe")
            and BYTE in types
            and types <= {NORMAL, UNKNOWN, CONTROL, BYTE}
        )


def parse_model(data: bytes) -> ModelProto:
    """Parse a `.model` file's bytes; `DataError` where they are no sentencepiece model."""
    try:
        fields = list(_fields(data))
        pieces = [_parse_piece(value) for number, _, value in fields if number == _PIECES]
        trainer = _last(b"".join(value for number, _, value in fields if number == _TRAINER))
        normalizer = _last(b"".join(value for number, _, value in fields if number == _NORMALIZER))
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise DataError(f"not a sentencepiece model ({error}); give a .model file") from error
    if not pieces:
        raise DataError("not a sentencepiece model (it has no pieces); give a .model file")
    return ModelProto(
        pieces=pieces,
        model_type=MODEL_TYPES.get(_number(trainer, 3, 1), "unknown"),
        normalizes=bool(normalizer.get(2)),
        dummy_prefix=bool(_number(normalizer, 3, 1)),
        removes_whitespace=bool(_number(normalizer, 4, 1)),
        escapes_whitespace=bool(_number(normalizer, 5, 1)),
        whitespace_as_suffix=bool(_number(trainer, 24, 0)),
    )


def map_scores(data: bytes, change: Callable[[Piece], float]) -> bytes:
    """The same model with each piece's score replaced by `change(piece)`; all other bytes are kept."""
    out = bytearray()
    for number, wire, value in _fields(data):
        if number == _PIECES:
            score = struct.pack("<f", change(_parse_piece(value)))
            fields = [(n, w, score if n == _SCORE else v) for n, w, v in _fields(value)]
            if not any(n == _SCORE for n, _, _ in fields):
                fields.append((_SCORE, _FIXED32, score))
            value = b"".join(_field(*entry) for entry in fields)
        out += _field(number, wire, value)
    return bytes(out)


def _parse_piece(data: bytes) -> Piece:
    fields = _last(data)
    score = fields.get(_SCORE, b"\0\0\0\0")
    return Piece(fields.get(_TEXT, b"").decode(), struct.unpack("<f", score)[0], _number(fields, _TYPE, NORMAL))


def _last(data: bytes) -> dict[int, bytes]:
    # Protobuf's rule for a field that is not repeated: the last one counts.
    return {number: value for number, _, value in _fields(data)}


def _number(fields: dict[int, bytes], number: int, default: int) -> int:
    return _varint(fields[number], 0)[0] if number in fields else default


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(field number, wire type, raw value) of one message; the value of a varint is its own bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            end = _varint(data, at)[1]
        elif wire == _BYTES:
            size, at = _varint(data, at)
            end = at + size
        elif wire in (_FIXED32, _FIXED64):
            end = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if number == 0 or end > len(data):
            raise ValueError(f"field {number} at byte {at} of {len(data)} ends at {end}")
        yield number, wire, data[at:end]
        at = end


def _field(number: int, wire: int, value: bytes) -> bytes:
    size = _to_varint(len(value)) if wire == _BYTES else b""
    return _to_varint(number << 3 | wire) + size + value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"number too long at byte {at}")


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
