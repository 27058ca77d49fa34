"""Export a checkpoint as a directory that plain transformers loads, after checking that it computes the same.

A model with a global embedding (GLOB, TRIM, STD, ACT, and any run after adapt) is one directory; where each source has
an embedding of its own (SPEC, SPEC-OPT) each source's is one, with that source's tokenizer. Logits are compared with
our own on held-out text in fp32, and the exported tokenizer with ours; a directory that differs is not written.

    python tools/convert_to_hf.py --checkpoint runs/trim --output export/trim
    python tools/convert_to_hf.py --checkpoint runs/spec --all-sources --output export/spec
"""

import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.common.cli import ToolParser, run_tool
from megatron_dept.common.errors import CheckpointError, ConfigError, DataError
from megatron_dept.common.seeding import generator_for
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.export.huggingface import LOGIT_TOLERANCE, TrainedModel, export_model
from megatron_dept.export.state import check_exportable
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.load import load_tokenizer

SEQUENCES = 4  # whose logits are compared, of each dataset
DOCUMENTS = 32  # whose text the tokenizers are compared on, of each dataset
DOCUMENT_TOKENS = 2000  # of each of them at most


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    check_exportable(checkpoint.model_config)
    for source in _sources(checkpoint, arguments):
        output = arguments.output / source if arguments.all_sources and source else arguments.output
        _export(checkpoint, source, output, arguments)
    return 0


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = ToolParser(description="Export a checkpoint for Hugging Face transformers.")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run directory (its newest checkpoint) or a checkpoint"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--source", metavar="NAME", help="spec, spec_opt: the source whose embedding is taken")
    which.add_argument("--all-sources", action="store_true", help="spec, spec_opt: one directory per trained source")
    parser.add_argument(
        "--output", type=Path, required=True, help="directory to write (with --all-sources: its parent)"
    )
    parser.add_argument(
        "--check-text",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="dataset directories whose held-out text is compared on; default: those the run trained on, where they "
        "still are, else random ids",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="the model's tokenizer; default: the copy in the datasets the run trained on"
    )
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", help="weights above it are split over several files"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a directory that is there already")
    arguments = parser.parse_args(argv)
    if arguments.all_sources and (arguments.check_text or arguments.tokenizer):
        raise ConfigError("--check-text and --tokenizer are of one source; give them with --source NAME")
    return arguments


def _size(text: str) -> str:
    """An argparse type: a size as huggingface_hub reads it."""
    if not re.fullmatch(r"[1-9][0-9]*(KB|MB|GB|TB)", text):
        raise ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return text


def _sources(checkpoint: Checkpoint, arguments: Namespace) -> list[str | None]:
    """The sources to export in turn; None is the global embedding."""
    if not arguments.all_sources:
        return [arguments.source]
    known = checkpoint.manifest["sources"]
    trained = []
    for name, entry in known.items():
        if not entry["trained"]:
            print(f"{name} is left out: it was never sampled and has no embedding yet")
        elif entry.get("retired"):
            print(f"{name} is left out: it has left the run; export it with --source {name}")
        else:
            trained.append(name)
    if not trained:
        raise CheckpointError(f"{checkpoint.directory}: no source was ever sampled; train further first")
    return trained


def _export(checkpoint: Checkpoint, source: str | None, output: Path, arguments: Namespace) -> None:
    ids, rows = checkpoint.token_table(source)
    datasets = _datasets(checkpoint, source, arguments.check_text)
    tokenizer = _tokenizer(checkpoint, source, datasets, arguments.tokenizer)
    for dataset in datasets:
        dataset.check_tokenizer(tokenizer)
    samples, texts = _held_out(datasets, tokenizer, ids, checkpoint.model_config.seq_length)
    if not samples:
        print("no held-out text: compared on random ids")
        samples, texts = _random(tokenizer, ids, checkpoint.model_config.seq_length)
    model = TrainedModel(
        checkpoint.model_config, checkpoint.body(), ids, rows, checkpoint.position_table(source), tokenizer
    )
    report = export_model(
        model,
        output,
        title=" ".join(filter(None, ("DEPT", checkpoint.manifest["variant"], checkpoint.manifest["phase"], source))),
        facts=_facts(checkpoint, source, model),
        samples=samples,
        texts=texts,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
    )
    print(
        f"{output}: {len(ids):,} ids have embeddings, {report.suppressed:,} are suppressed; logits differ by "
        f"{report.logit_difference:.2e} at most over {report.positions:,} positions (allowed {LOGIT_TOLERANCE:.0e}), "
        f"ids agree on {len(texts):,} texts"
    )


def _datasets(checkpoint: Checkpoint, source: str | None, given: Sequence[Path] | None) -> list[DatasetDirectory]:
    """The datasets to compare on: those given, else those of the run that can still be found."""
    if given:
        return [DatasetDirectory.open(path) for path in given]
    known = checkpoint.manifest["sources"]
    paths = [Path(known[name]["data"]) for name in ([source] if source else known)]
    return [DatasetDirectory.open(path) for path in paths if path.exists()]


def _tokenizer(
    checkpoint: Checkpoint, source: str | None, datasets: Sequence[DatasetDirectory], given: Path | None
) -> Tokenizer:
    """The tokenizer the embedding was trained under; `DataError` where it is not at hand or another one."""
    known = checkpoint.manifest["sources"]
    entry = known[source] if source else next(iter(known.values()))  # one global tokenizer: any source names it
    if given is None and not datasets:
        raise DataError(
            f"the dataset {entry['data']}, which holds the model's tokenizer, is not there; give it with --tokenizer"
        )
    tokenizer = datasets[0].tokenizer() if given is None else load_tokenizer(given)
    if tokenizer.fingerprint != entry["tokenizer_fingerprint"]:
        raise DataError(
            f"{tokenizer.path} ({tokenizer.fingerprint[:12]}) is not the tokenizer the model was trained with "
            f"({entry['tokenizer_fingerprint'][:12]}); give that one with --tokenizer"
        )
    return tokenizer


def _held_out(
    datasets: Sequence[DatasetDirectory], tokenizer: Tokenizer, ids: np.ndarray, length: int
) -> tuple[list[np.ndarray], list[str]]:
    """Held-out sequences of at most `length` ids that have rows, int64, and texts."""
    samples, texts = [], []
    for dataset in datasets:
        indexed = dataset.indexed("heldout")
        documents = [
            indexed.document(i)[:DOCUMENT_TOKENS].astype(np.int64) for i in range(min(len(indexed), DOCUMENTS))
        ]
        texts += [tokenizer.decode(document[document != tokenizer.eod_id].tolist()) for document in documents]
        stream = np.concatenate([np.empty(0, np.int64), *documents])
        # What is compared is arithmetic: an id without a row has none and is passed over.
        stream = stream[np.isin(stream, ids)][: SEQUENCES * length]
        samples += [stream[start : start + length] for start in range(0, len(stream), length)]
    return samples, texts


def _random(tokenizer: Tokenizer, ids: np.ndarray, length: int) -> tuple[list[np.ndarray], list[str]]:
    samples = [generator_for("export parity", index).choice(ids, length) for index in range(SEQUENCES)]
    return samples, [tokenizer.decode(sample.tolist()) for sample in samples]


def _facts(checkpoint: Checkpoint, source: str | None, model: TrainedModel) -> dict[str, str]:
    manifest, config = checkpoint.manifest, checkpoint.model_config
    body = sum(tensor.numel() for tensor in model.body.values())
    tokenizer = model.tokenizer
    return {
        "variant": manifest["variant"],
        "phase": manifest["phase"],
        "embedding": f"of source {source}" if source else "global",
        "sources": ", ".join(manifest["sources"]),
        "checkpoint": checkpoint.directory.name,
        "round": str(manifest["round"]),
        "sequential steps": f"{manifest['step']:,}",
        "tokens trained": f"{manifest['tokens']:,}",
        "seed": str(manifest["seed"]),
        "body": f"{body:,} parameters: {config.num_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, positions {config.position_embedding}",
        "token table": f"{len(model.ids):,} rows of {config.hidden_size}",
        "sequence length": str(config.seq_length),
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, SHA-256 {tokenizer.fingerprint}",
    }


if __name__ == "__main__":
    run_tool(main)
