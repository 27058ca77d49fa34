"""Turn text into a dataset directory: Megatron's .bin/.idx for train and held-out, the tokenizer, counts and a card.

    python tools/preprocess_data.py --input corpus/de --tokenizer tokenizers/de --output data/de

Inputs are JSON lines (.jsonl, field --text-key) and plain text (.txt), each also .gz or .zst. A document is held out by
the hash of its text, so the same documents are held out under every tokenizer. The directory appears when it is whole.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_dept.common.cli import ToolParser, fraction, positive_int, run_tool
from megatron_dept.data.preprocess import PreprocessOptions, preprocess
from megatron_dept.data.text import add_text_options, text_format


def build_parser() -> ToolParser:
    """The tool's options."""
    parser = ToolParser(__doc__.splitlines()[0], prog="preprocess_data.py")
    parser.add_argument("--input", nargs="+", required=True, help="files, directories or quoted globs (** too)")
    parser.add_argument("--tokenizer", type=Path, required=True, help=".model, tokenizer.json, or directory with one")
    parser.add_argument("--output", type=Path, required=True, help="the dataset directory to make")
    parser.add_argument("--name", help="the source's name (the output directory's where left out)")
    add_text_options(parser)
    parser.add_argument("--heldout-fraction", type=fraction, default=0.02, help="share of the documents to hold out")
    parser.add_argument("--min-heldout-documents", type=positive_int, default=1, help="hold out this many at least")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end-of-document id",
    )
    parser.add_argument("--workers", type=positive_int, default=1, help="processes that encode; the result is the same")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset directory if it exists")
    return parser


def command_line(options: argparse.Namespace) -> str:
    """The command that makes this dataset again: what decides its content and nothing else."""
    parts = ["tools/preprocess_data.py", "--input", *options.input, "--tokenizer", options.tokenizer]
    parts += ["--output", options.output, "--name", options.name, "--text-key", options.text_key]
    parts += ["--document-separator", options.document_separator, "--heldout-fraction", options.heldout_fraction]
    parts += ["--min-heldout-documents", options.min_heldout_documents]
    parts += ["--append-eod" if options.append_eod else "--no-append-eod"]
    return shlex.join(map(str, parts))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; `UserError` for what its user can mend."""
    options = build_parser().parse_args(argv)
    options.name = options.name or options.output.resolve().name
    card = preprocess(
        PreprocessOptions(
            inputs=options.input,
            tokenizer=options.tokenizer,
            output=options.output,
            name=options.name,
            form=text_format(options),
            heldout_fraction=options.heldout_fraction,
            min_heldout_documents=options.min_heldout_documents,
            append_eod=options.append_eod,
            workers=options.workers,
            overwrite=options.overwrite,
            command=command_line(options),
        )
    )
    for split, found in card["splits"].items():
        print(f"{split}: {found['documents']:,} documents, {found['tokens']:,} tokens, {found['bytes']:,} bytes")
    print(
        f"{options.output}: {card['vocabulary_size']:,} of {card['tokenizer']['vocab_size']:,} ids, "
        f"{card['tokens_per_byte']:.3f} tokens a byte"
    )
    return 0


if __name__ == "__main__":
    run_tool(main)
