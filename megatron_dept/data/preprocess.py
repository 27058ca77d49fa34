"""Turns text into a dataset directory: documents to ids, split into train and held-out, counted, whole or not at all.

The text is read twice. The first reading checks all of it and chooses the held-out documents, so that bad input is
found before the work; the second encodes. What is written is a pure function of the text, in its order, the tokenizer
and the options, and not of the number of workers.

A document is held out by the hash of its text alone: equal documents fall on one side, the same documents are held out
under every tokenizer, and adding files moves none.
"""

import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
from array import array
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from megatron_dept.common.directories import whole_directory
from megatron_dept.common.errors import ConfigError, DataError
from megatron_dept.common.files import atomic_write, write_json
from megatron_dept.common.progress import Progress
from megatron_dept.config.schema import SourceConfig
from megatron_dept.data.directory import CARD_FILE, COUNTS_FILE, FORMAT_VERSION
from megatron_dept.data.indexed import IndexedDatasetWriter
from megatron_dept.data.text import TextFormat, find_files, read_documents
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.load import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, load_tokenizer
from megatron_dept.tokenizers.vocabulary import source_vocabulary

SPLITS = ("train", "heldout")
BATCH_BYTES = 1 << 20  # text sent to a worker at once
CHECKED_DOCUMENTS = 50  # documents at the start on which decode(encode(text)) is tried
CHECKED_CHARACTERS = 10_000  # of each of them
HASH_RANGE = 2.0**64


@dataclass(frozen=True)
class PreprocessOptions:
    """What to read and how; see the options of tools/preprocess_data.py."""

    inputs: Sequence[str | Path]
    tokenizer: Path
    output: Path
    name: str
    form: TextFormat = field(default_factory=TextFormat)
    heldout_fraction: float = 0.02
    min_heldout_documents: int = 1
    append_eod: bool = True
    workers: int = 1
    overwrite: bool = False
    command: str = ""


@dataclass
class _Counts:
    """Of one split: documents, tokens with end-of-document ids, bytes of UTF-8 text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


def preprocess(options: PreprocessOptions) -> dict[str, Any]:
    """Write the dataset directory `options.output` and return its card.

    `DataError`: invalid or no text, or too few documents to hold one out; `UserError`: the directory exists, or cannot
    be written. After any error there is no directory.
    """
    try:
        SourceConfig(name=options.name)
    except ValidationError as error:
        raise ConfigError(
            f"name {options.name!r} is not letters, digits, '.', '_' and '-', the first a letter or digit; change it"
        ) from error
    tokenizer = load_tokenizer(options.tokenizer)
    files = find_files(options.inputs)
    with whole_directory(options.output, CARD_FILE, options.overwrite) as directory:
        hashes, size = _scan(files, options)
        heldout = choose_heldout(hashes, options.heldout_fraction, options.min_heldout_documents)
        _check_round_trip(files, options.form, tokenizer)
        counts, token_counts = _encode_all(files, heldout, size, tokenizer, options, directory)
        copy = SENTENCEPIECE_FILE if tokenizer.kind == "sentencepiece" else HUGGINGFACE_FILE
        shutil.copyfile(tokenizer.path, directory / copy)
        with atomic_write(directory / COUNTS_FILE) as handle:
            np.save(handle, token_counts)
        card = {
            "format_version": FORMAT_VERSION,
            "name": options.name,
            "tokenizer": {
                "kind": tokenizer.kind,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "file": copy,
            },
            "splits": {split: vars(counts[split]) for split in SPLITS},
            "tokens_per_byte": counts["train"].tokens / counts["train"].bytes,
            "vocabulary_size": len(source_vocabulary(token_counts, tokenizer)),
            "command": options.command,
        }
        write_json(directory / CARD_FILE, card)
    return card


def choose_heldout(hashes: np.ndarray, fraction: float, minimum: int) -> np.ndarray:
    """Which documents are held out, bool [n], by their `hashes` uint64 [n]: those below `fraction` of the range.

    Where that gives fewer than `minimum`, the `minimum` lowest hashes are held out, with all their equals. `DataError`
    where nothing would be left to train on.
    """
    heldout = hashes < np.uint64(min(int(fraction * HASH_RANGE), 2**64 - 1))
    if heldout.sum() < minimum:
        lowest = np.partition(hashes, minimum - 1)[minimum - 1] if len(hashes) >= minimum else hashes.max()
        heldout = hashes <= lowest
    if heldout.all():
        raise DataError(
            f"the source has {len(hashes)} documents, of which {int(heldout.sum())} would be held out and none left to "
            "train on; give more, part the files with --document-separator, or hold out fewer"
        )
    return heldout


def text_hash(text: str) -> int:
    """A document's 64-bit hash, which decides its split; the same on every platform."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _documents(files: Sequence[Path], form: TextFormat) -> Iterator[str]:
    for file in files:
        yield from read_documents(file, form)


def _scan(files: Sequence[Path], options: PreprocessOptions) -> tuple[np.ndarray, int]:
    """Read and check everything once: hash of each document, uint64 [n], and bytes of all."""
    hashes = array("Q")
    size = 0
    with Progress(f"read {options.name}", unit="bytes") as progress:
        for text in _documents(files, options.form):
            data = text.encode()
            hashes.append(text_hash(text))
            size += len(data)
            progress.advance(len(data), documents=1)
    if not hashes:
        raise DataError(f"source {options.name} has no text in {len(files)} files; check --input")
    return np.frombuffer(hashes, dtype=np.uint64), size


def _check_round_trip(files: Sequence[Path], form: TextFormat, tokenizer: Tokenizer) -> None:
    """Warn on stderr where the tokenizer does not give text back: losses are then of other text than was given."""
    for index, text in enumerate(_documents(files, form)):
        if index == CHECKED_DOCUMENTS:
            return
        text = text[:CHECKED_CHARACTERS]
        back = tokenizer.decode(tokenizer.encode(text))
        if back == text:
            continue
        at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
        print(
            f"warning: the tokenizer {tokenizer.path} changes text: document {index} from character {at} "
            f"is {text[at : at + 20]!r} and comes back as {back[at : at + 20]!r}; losses are of the changed text",
            file=sys.stderr,
        )
        return


def _encode_all(
    files: Sequence[Path],
    heldout: np.ndarray,
    size: int,
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    directory: Path,
) -> tuple[dict[str, _Counts], np.ndarray]:
    """Encode every document into its split's files; what each split holds, and int64[V] counts of the train split."""
    counts = {split: _Counts() for split in SPLITS}
    token_counts = np.zeros(tokenizer.vocab_size, np.int64)
    number = 0
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(IndexedDatasetWriter(directory / split, tokenizer.vocab_size))
            for split in SPLITS
        }
        progress = stack.enter_context(Progress(f"encode {options.name}", total=size, unit="bytes"))
        for sizes, lengths, ids in stack.enter_context(closing(_encoded_batches(files, options, tokenizer))):
            if number + len(sizes) > len(heldout):
                break
            documents = np.split(ids, np.cumsum(lengths)[:-1])
            for document, document_bytes in zip(documents, sizes, strict=True):
                split = "heldout" if heldout[number] else "train"
                writers[split].add_document(document)
                counts[split].documents += 1
                counts[split].tokens += len(document)
                counts[split].bytes += document_bytes
                number += 1
            kept = ids[np.repeat(~heldout[number - len(sizes) : number], lengths)]
            token_counts += np.bincount(kept, minlength=tokenizer.vocab_size)
            progress.advance(sum(sizes), tokens=len(ids))
        if number != len(heldout) or sum(split.bytes for split in counts.values()) != size:
            raise DataError(
                f"the text of source {options.name} changed while it was read; run again when it is at rest"
            )
    return counts, token_counts


Encoded = tuple[list[int], np.ndarray, np.ndarray]  # bytes of each document, tokens of each int64 [n], ids int32 [sum]


def _encoded_batches(
    files: Sequence[Path], options: PreprocessOptions, tokenizer: Tokenizer
) -> Generator[Encoded, None, None]:
    """The documents, in batches of about `BATCH_BYTES`, encoded by `options.workers` processes, in their order."""
    eod = tokenizer.eod_id if options.append_eod else None
    batches = _batches(_documents(files, options.form))
    if options.workers == 1:
        for texts, sizes in batches:
            yield sizes, *encode_documents(tokenizer, texts, eod)
        return
    waiting: deque[tuple[list[int], Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of sentencepiece and others
    pool = ProcessPoolExecutor(options.workers, mp_context=context, initializer=_start_worker)
    try:
        for texts, sizes in batches:
            waiting.append((sizes, pool.submit(_encode_in_worker, str(tokenizer.path.resolve()), texts, eod)))
            while len(waiting) > 2 * options.workers:
                done, future = waiting.popleft()
                yield done, *future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, *future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {options.workers} worker processes died, as when memory runs out; give fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(documents: Iterator[str]) -> Iterator[tuple[list[str], list[int]]]:
    texts: list[str] = []
    sizes: list[int] = []
    waiting = 0
    for text in documents:
        texts.append(text)
        sizes.append(len(text.encode()))
        waiting += sizes[-1]
        if waiting >= BATCH_BYTES:
            yield texts, sizes
            texts, sizes, waiting = [], [], 0
    if texts:
        yield texts, sizes


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], eod: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each document, int64 [n], and the ids of all one after another, int32, each ended by `eod` if given."""
    end = [] if eod is None else [eod]
    encoded = [np.array(ids + end, dtype=np.int32) for ids in tokenizer.encode_batch(texts)]
    return np.array([len(ids) for ids in encoded], dtype=np.int64), np.concatenate(encoded)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of the group; the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: the workers share the cores


@cache
def _worker_tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


def _encode_in_worker(path: str, texts: list[str], eod: int | None) -> tuple[np.ndarray, np.ndarray]:
    return encode_documents(_worker_tokenizer(path), texts, eod)
