"""Trains sentencepiece models that give every text back, on a deterministic sample of documents.

The sample is a pure function of (seed, texts): each document has a key, the hash of seed and text, and the documents of
lowest key are taken until the budget of bytes is full. Neither the order of files nor their number matters.
"""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import sentencepiece

from megatron_dept.common.errors import DataError
from megatron_dept.common.seeding import seed_for
from megatron_dept.tokenizers import model_proto
from megatron_dept.tokenizers.chunks import SCORE_STEP, split_chunks

MODEL_TYPES = ("unigram", "bpe")
TRAINER_THREADS = 8  # fixed: the sums of unigram's EM depend on it, and a model must not depend on the machine

# U+2581 is sentencepiece's own space and U+2585 its mark for unknown characters: it skips sentences that hold one.
_RESERVED = re.compile("[\u2581\u2585\0]")


@dataclass(frozen=True)
class Sample:
    """A sample of one input: its documents, in order of key, and their UTF-8 bytes."""

    documents: list[str]
    size: int


def sample_digest(documents: Iterable[str]) -> str:
    """Hex SHA-256 over documents, each led by its length in bytes: the name of what a model was trained on."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def coverage(text: str) -> float:
    """The `character_coverage` that `text` spells: above 0, 1 at most. `ValueError` otherwise."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(f"{text} is not above 0 and 1 at most")
    return value


def sample_documents(documents: Iterable[str], budget: int, seed: int) -> Sample:
    """Draw documents without replacement until `budget` bytes of UTF-8 are reached; the last is cut to fit, at a line.

    Equal texts count once. Memory: the budget and one document more, whatever the corpus. `DataError`: no text at all.
    """
    salt = seed_for(seed, "tokenizer sample").to_bytes(8, "little")
    kept: list[tuple[int, bytes]] = []  # a heap, largest key first
    keys: set[int] = set()
    size = 0
    for document in documents:
        data = document.encode()
        key = int.from_bytes(hashlib.blake2b(data, digest_size=16, key=salt).digest(), "little")
        if key in keys or not data or (size >= budget and key > -kept[0][0]):
            continue
        heapq.heappush(kept, (-key, data))
        keys.add(key)
        size += len(data)
        # What stays is the shortest run of lowest keys that fills the budget; later documents can only shorten it.
        while size - len(kept[0][1]) >= budget:
            gone, text = heapq.heappop(kept)
            keys.remove(-gone)
            size -= len(text)
    if not kept:
        raise DataError("there is no text to train a tokenizer on; give files with text")
    texts = [text for _, text in sorted(kept, reverse=True)]
    texts[-1] = _cut(texts[-1], len(texts[-1]) - max(0, size - budget))
    return Sample([text.decode() for text in texts], sum(map(len, texts)))


def _cut(text: bytes, size: int) -> bytes:
    """The first `size` bytes at most: up to the last line's end in them, or else up to a whole character."""
    if len(text) <= size:
        return text
    end = text.rfind(b"\n", 0, size) + 1
    return text[:end] if end else text[:size].decode("utf-8", errors="ignore").encode()


def train_sentencepiece(
    documents: Iterable[str], vocab_size: int, model_type: str = "unigram", character_coverage: float = 0.9995
) -> bytes:
    """The bytes of a `.model` file: sentencepiece's unigram (Kudo 2018) or BPE model with `vocab_size` ids.

    Identity normalization, no added space, whitespace kept, byte fallback, ids <unk> 0, <s> 1, </s> 2, bytes 3..258; so
    decode(encode(text)) == text for any text. `character_coverage` of the sample's characters get a piece of their own.
    Unigram scores are rounded to `SCORE_STEP` (see `chunks`).

    `DataError` where the sample cannot fill the vocabulary or the vocabulary cannot hold its characters.
    """
    if model_type not in MODEL_TYPES:
        raise DataError(f"model type {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents),
            model_writer=out,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            required_chars=model_proto.SPACE,  # where text had no space, one would be spelled as U+2581's bytes
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=TRAINER_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(_remedy(str(error), vocab_size)) from error
    data = out.getvalue()
    assert model_proto.parse_model(data).lossless, "the options above"
    if model_type == "unigram":
        data = model_proto.map_scores(data, lambda piece: round(piece.score / SCORE_STEP) * SCORE_STEP)
    return data


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for part in _RESERVED.split(document):
            yield from split_chunks(part)


def _remedy(message: str, vocab_size: int) -> str:
    """Sentencepiece's own reason for a refusal, as one line with what to do."""
    if match := re.search(r"set it to a value <= (\d+)", message):
        return f"vocab-size {vocab_size} is too large for this text; set it to {match[1]} at most, or give more text"
    if re.search(r"required_chars|smaller than required|too small", message):
        needed = re.search(r"vs\.? (\d+)", message)
        size = f" to {needed[1]} or more" if needed else ""
        return (
            f"vocab-size {vocab_size} is too small for the characters and bytes of this text; raise it{size}, or lower "
            "character-coverage so that rare characters are spelled by their bytes"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on but line breaks; give files with text"
    return f"sentencepiece cannot train a vocabulary of {vocab_size} on this text: {message.splitlines()[-1]}"
