"""Writes a tokenizer as files that plain `transformers.AutoTokenizer.from_pretrained(directory)` loads, ids unchanged.

Both sides cut text by the same `chunks`, and neither reads special tokens in text. Then, for a sentencepiece model of
ours:

- **Unigram** becomes a Unigram over GPT-2's byte alphabet. A character that sentencepiece does not know costs
  `min_score - 10` there; here its first byte costs that and its other bytes nothing, so each path has the same score,
  a character that has a piece never falls to bytes, and ties fall the same way (the longer last piece: both keep the
  first path found from the left). Scores are multiples of `SCORE_STEP` and chunks are short, so that sentencepiece's
  float32 sums and Rust's float64 sums are both exact. Bytes join before they are decoded, as ours do.
  Hugging Face's own byte_fallback is not used: it would read the letters `<0x0A>` in a text as that byte.
- **BPE** becomes a BPE with byte_fallback whose merges are all splits of each piece, by the piece's rank.

A `tokenizer.json` is copied without its post-processor: documents were encoded without added specials.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_dept.common.errors import DataError
from megatron_dept.common.files import atomic_write, write_json
from megatron_dept.tokenizers import model_proto
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.byte_alphabet import spell
from megatron_dept.tokenizers.chunks import CHUNK_PATTERN, MAX_CHUNK_CHARACTERS, SCORE_STEP
from megatron_dept.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megatron_dept.tokenizers.load import HUGGINGFACE_FILE
from megatron_dept.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, piece_bytes

UNKNOWN_PENALTY = 10.0  # sentencepiece's kUnkPenalty
NEVER = -1e6  # a score that loses to any spelling by bytes
FLOAT32_INTEGERS = 2.0**24  # integers up to this are exact in float32


@dataclass(frozen=True)
class Mismatch:
    """The first text that the exported tokenizer treats otherwise: `what` is "ids" or "decoded text"."""

    text: str
    what: str
    ours: Any
    exported: Any


def to_huggingface(tokenizer: Tokenizer, directory: str | Path, model_max_length: int | None = None) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `directory`, with the same V ids.

    `DataError` where no exact construction is known: a sentencepiece model that normalizes, adds a space, has no byte
    fallback, or has user-defined pieces.
    """
    directory = Path(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        spec = _from_sentencepiece(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        spec = json.loads(tokenizer.path.read_text(encoding="utf-8"))
        spec |= {"post_processor": None, "truncation": None, "padding": None}
    else:
        raise DataError(f"{tokenizer.path}: there is no export of a {type(tokenizer).__name__}")
    names = {index: name for name, index in tokenizers.Tokenizer.from_str(json.dumps(spec)).get_vocab().items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what every version of transformers calls a tokenizer.json
        "eos_token": names[tokenizer.eod_id],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # the letters of a special in a text stay letters, as in training
        "model_input_names": ["input_ids", "attention_mask"],  # or else generate() refuses token_type_ids
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        config |= {"unk_token": names[tokenizer.unknown_id]}
        if tokenizer.begin_id is not None:
            config |= {"bos_token": names[tokenizer.begin_id]}
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    with atomic_write(directory / HUGGINGFACE_FILE, "w") as handle:
        json.dump(spec, handle, ensure_ascii=False)
    write_json(directory / "tokenizer_config.json", config)


def parity(tokenizer: Tokenizer, directory: str | Path, texts: Iterable[str]) -> Mismatch | None:
    """The first of `texts` whose ids, or whose decoded ids, are others by the files in `directory`; None if all agree.

    Needs `transformers`, and reads nothing but `directory`.
    """
    from transformers import AutoTokenizer  # heavy, and only needed here

    exported = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    exported.model_max_length = 1 << 62  # no warning: nothing here goes into a model
    for text in texts:
        ours, theirs = tokenizer.encode(text), exported(text)["input_ids"]
        if ours != theirs:
            return Mismatch(text, "ids", ours, theirs)
        ours_back, theirs_back = tokenizer.decode(ours), exported.decode(ours, skip_special_tokens=True)
        if ours_back != theirs_back:
            return Mismatch(text, "decoded text", ours_back, theirs_back)
    return None


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json` for a lossless sentencepiece model."""
    proto = tokenizer.proto
    if not proto.lossless:
        raise DataError(
            f"{tokenizer.path} normalizes text, adds a space, lacks byte fallback or has user-defined pieces, so "
            "it has no exact export; train with a tokenizer.json, or with a model from tools/train_tokenizer.py"
        )
    built = _unigram(tokenizer) if proto.model_type == "unigram" else _bpe(tokenizer)
    specials = [piece.text for piece in proto.pieces if piece.type in (model_proto.UNKNOWN, model_proto.CONTROL)]
    built.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in specials])
    if built.get_vocab_size() != tokenizer.vocab_size:
        raise DataError(f"{tokenizer.path} has two pieces of one spelling, so it has no export; train it again")
    return json.loads(built.to_str())


def _cut_by_chunks() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(CHUNK_PATTERN), behavior="isolated")


def _unigram(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    proto = tokenizer.proto
    normal = {piece_bytes(piece): piece.score for piece in proto.pieces if piece.type == model_proto.NORMAL}
    unknown_score = min(normal.values()) - UNKNOWN_PENALTY
    inexact = any(score / SCORE_STEP != round(score / SCORE_STEP) for score in normal.values())
    if inexact or MAX_CHUNK_CHARACTERS * -unknown_score / SCORE_STEP > FLOAT32_INTEGERS or max(normal.values()) > 0:
        raise DataError(
            f"{tokenizer.path} has scores that are not log probabilities in steps of {SCORE_STEP}, so ties may fall "
            "otherwise after export; train it again with tools/train_tokenizer.py"
        )
    vocabulary: list[tuple[str, float]] = []
    for piece in proto.pieces:
        text = piece_bytes(piece)
        if piece.type == model_proto.NORMAL:
            vocabulary.append((spell(text), piece.score))
        elif piece.type != model_proto.BYTE or text in normal:
            # Specials, and bytes that are pieces too ("a"): kept under their names, never met in text.
            vocabulary.append((piece.text, NEVER))
        else:
            continuation = 0x80 <= text[0] < 0xC0
            vocabulary.append((spell(text), 0.0 if continuation else unknown_score))
    built = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=tokenizer.unknown_id, byte_fallback=False))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [_cut_by_chunks(), pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)]
    )
    # ByteFallback reads the names of the bytes that are pieces too; all are ASCII, so each is a character.
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.ByteLevel()])
    return built


def _bpe(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    proto = tokenizer.proto
    vocabulary: dict[str, int] = {}
    ranked: list[tuple[float, str]] = []
    for index, piece in enumerate(proto.pieces):
        if piece.type == model_proto.NORMAL:
            text = piece_bytes(piece).decode()
            vocabulary[text] = index
            ranked.append((-piece.score, text))
        else:
            vocabulary[piece.text] = index
    known = {text for _, text in ranked}
    merges = [
        (text[:cut], text[cut:])
        for _, text in sorted(ranked)
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]
    unknown = proto.pieces[tokenizer.unknown_id].text
    built = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=False))
    built.pre_tokenizer = _cut_by_chunks()
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return built
