"""Tokenizers trained by sentencepiece, from their `.model` file.

A model of ours (`ModelProto.lossless`: no normalization, no added space, byte fallback) is cut by `chunks` and gives
every text back: decode(encode(text)) == text. Any other model sees the whole text and may normalize it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers import model_proto
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.chunks import split_chunks
from megatron_dept.tokenizers.model_proto import SPACE


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece unigram or BPE model (Kudo 2018; Kudo and Richardson 2018). `DataError`: not such a file."""

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            data = self.path.read_bytes()
            self.proto = model_proto.parse_model(data)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except FileNotFoundError as error:
            raise DataError(f"tokenizer {path} does not exist; make it with tools/train_tokenizer.py") from error
        except RuntimeError as error:
            raise DataError(f"{path}: sentencepiece cannot read it ({error}); give a .model file") from error
        self.vocab_size = self._processor.vocab_size()
        self.eod_id = self._processor.eos_id()
        if self.eod_id < 0:
            raise DataError(f"{path} has no end-of-sentence piece to end documents with; train one with eos_id set")
        self.unknown_id = self._processor.unk_id()
        self.begin_id = None if self._processor.bos_id() < 0 else self._processor.bos_id()
        specials = (model_proto.UNKNOWN, model_proto.CONTROL)
        self.special_ids = np.array([i for i, p in enumerate(self.proto.pieces) if p.type in specials], dtype=np.int64)
        self.lossless = self.proto.lossless

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.lossless:
            return self._processor.encode(list(texts), out_type=int, num_threads=1)
        chunks: list[str] = []
        ends = []
        for text in texts:
            chunks += split_chunks(text)
            ends.append(len(chunks))
        encoded = self._processor.encode(chunks, out_type=int, num_threads=1)
        out = []
        start = 0
        for text, end in zip(texts, ends, strict=True):
            if SPACE in text:
                parts = [part for chunk in chunks[start:end] for part in self._encode_with_sign(chunk)]
            else:
                parts = encoded[start:end]
            out.append([index for part in parts for index in part])
            start = end
        return out

    def _encode_with_sign(self, chunk: str) -> list[list[int]]:
        # Sentencepiece takes U+2581 in the text for a space. To keep it, it is spelled by its bytes.
        sign = self.byte_ids[list(SPACE.encode())].tolist()
        first, *others = self._processor.encode(chunk.split(SPACE), out_type=int, num_threads=1)
        return [first, *(ids for other in others for ids in (sign, other))]

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(index) for index in ids]
        self._check_ids(ids)
        if not self.lossless:
            return self._processor.decode(ids)
        table = self.token_bytes()
        return b"".join(table[index] for index in ids).decode("utf-8", errors="replace")

    def _token_bytes(self) -> list[bytes]:
        return [piece_bytes(piece) for piece in self.proto.pieces]


def piece_bytes(piece: model_proto.Piece) -> bytes:
    """The UTF-8 bytes that a piece stands for; b"" for unknown and control pieces."""
    if piece.type == model_proto.BYTE:  # "<0x0A>"
        return bytes([int(piece.text[3:5], 16)])
    if piece.type in (model_proto.UNKNOWN, model_proto.CONTROL):
        return b""
    return piece.text.replace(SPACE, " ").encode()
