"""Train a sentencepiece tokenizer (unigram or BPE) that gives every text back, for one source or over several.

    python tools/train_tokenizer.py --input corpus/de --vocab-size 8000 --output tokenizers/de
    python tools/train_tokenizer.py --input corpus/de corpus/fr --balance --vocab-size 16000 --output tokenizers/global

The output directory holds tokenizer.model and tokenizer_card.json, and appears when it is whole.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_dept.common.cli import ToolParser, non_negative_int, positive_int, run_tool
from megatron_dept.common.directories import whole_directory
from megatron_dept.common.files import sha256_file, write_json
from megatron_dept.common.progress import Progress
from megatron_dept.data.text import TextFormat, add_text_options, find_files, read_documents, text_format
from megatron_dept.tokenizers.load import SENTENCEPIECE_FILE
from megatron_dept.tokenizers.train import (
    MODEL_TYPES,
    Sample,
    coverage,
    sample_digest,
    sample_documents,
    train_sentencepiece,
)

CARD_FILE = "tokenizer_card.json"
FORMAT_VERSION = 1


def build_parser() -> ToolParser:
    """The tool's options."""
    parser = ToolParser(__doc__.splitlines()[0], prog="train_tokenizer.py")
    parser.add_argument("--input", nargs="+", required=True, help="files, directories or quoted globs (** too)")
    parser.add_argument("--output", type=Path, required=True, help="the directory to make")
    parser.add_argument(
        "--vocab-size", type=positive_int, required=True, help="ids, the 259 bytes and specials included"
    )
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="unigram", help="sentencepiece's algorithm")
    parser.add_argument(
        "--character-coverage",
        type=coverage,
        default=0.9995,
        help="share of the text's characters with a piece of their own; the rest are spelled by bytes",
    )
    parser.add_argument("--sample-bytes", type=positive_int, default=10_000_000, help="text to train on, at most")
    parser.add_argument("--balance", action="store_true", help="the same share of --sample-bytes for each input")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="decides which documents are in the sample")
    add_text_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the directory if it exists")
    return parser


def draw_samples(options: Namespace) -> list[tuple[list[str], Sample]]:
    """(inputs, their sample): one entry for all inputs together, or with --balance one for each."""
    groups = [[given] for given in options.input] if options.balance else [list(options.input)]
    files = [find_files(group) for group in groups]  # all are found before any is read
    budget = max(1, options.sample_bytes // len(groups))
    form = text_format(options)
    with Progress("read", unit="bytes") as progress:
        return [
            (group, sample_documents(_counted(found, form, progress), budget, options.seed))
            for group, found in zip(groups, files, strict=True)
        ]


def _counted(files: Sequence[Path], form: TextFormat, progress: Progress) -> Iterator[str]:
    for file in files:
        for text in read_documents(file, form):
            progress.advance(len(text.encode()), documents=1)
            yield text


def command_line(options: Namespace) -> str:
    """The command that makes this tokenizer again: what decides its content and nothing else."""
    parts = ["tools/train_tokenizer.py", "--input", *options.input, "--output", options.output]
    parts += ["--vocab-size", options.vocab_size, "--model-type", options.model_type]
    parts += ["--character-coverage", options.character_coverage, "--sample-bytes", options.sample_bytes]
    parts += ["--balance"] * options.balance + ["--seed", options.seed, "--text-key", options.text_key]
    return shlex.join(map(str, [*parts, "--document-separator", options.document_separator]))


def write_tokenizer(options: Namespace, directory: Path) -> dict[str, Any]:
    """Draw, train and write the model and its card into `directory`; the card."""
    samples = draw_samples(options)
    documents = [document for _, sample in samples for document in sample.documents]
    size = sum(sample.size for _, sample in samples)
    print(f"train {options.model_type} of {options.vocab_size:,} ids on {size / 1e6:.1f} MB", file=sys.stderr)
    model = train_sentencepiece(documents, options.vocab_size, options.model_type, options.character_coverage)
    (directory / SENTENCEPIECE_FILE).write_bytes(model)
    card = {
        "format_version": FORMAT_VERSION,
        "kind": "sentencepiece",
        "model_type": options.model_type,
        "vocab_size": options.vocab_size,
        "character_coverage": options.character_coverage,
        "seed": options.seed,
        "sample_bytes": options.sample_bytes,
        "balance": options.balance,
        "samples": [
            {"inputs": group, "documents": len(sample.documents), "bytes": sample.size} for group, sample in samples
        ],
        "sample_sha256": sample_digest(documents),
        "fingerprint": sha256_file(directory / SENTENCEPIECE_FILE),
        "sentencepiece": sentencepiece.__version__,
        "command": command_line(options),
    }
    write_json(directory / CARD_FILE, card)
    return card


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; `UserError` for what its user can mend."""
    options = build_parser().parse_args(argv)
    with whole_directory(options.output, CARD_FILE, options.overwrite) as directory:
        card = write_tokenizer(options, directory)
    for sample in card["samples"]:
        print(f"{' '.join(sample['inputs'])}: {sample['documents']:,} documents, {sample['bytes']:,} bytes sampled")
    print(f"{options.output / SENTENCEPIECE_FILE}: {card['vocab_size']:,} ids, sha256 {card['fingerprint'][:12]}")
    return 0


if __name__ == "__main__":
    run_tool(main)
