"""Score a checkpoint on held-out text: perplexity and bits per byte by source, as a table and as evaluation.json.

Each source is scored in the vocabulary it trained in: all ids of the global tokenizer (GLOB, STD, ACT, and any run
after adapt), V_k of it (TRIM, SPEC), or the ids of the source's own tokenizer (SPEC-OPT). A token outside that
vocabulary is scored by its bytes. A source out of distribution (--ood) is scored with every row that the global
embedding has learned; where each source has an embedding of its own there is none to score it with before adapt.

    python tools/evaluate.py --run runs/trim --ood el=data/el
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.common.cli import ToolParser, positive_int, run_tool
from megatron_dept.common.errors import CheckpointError, ConfigError, DataError
from megatron_dept.common.files import write_json
from megatron_dept.common.progress import Progress
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.data.remap import VocabularyMap
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.evaluation.heldout import HeldoutText, heldout_windows
from megatron_dept.evaluation.perplexity import Score, module_forward, score
from megatron_dept.models.build import body_from_state
from megatron_dept.models.embedding import SourceEmbedding

LOSS_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Embedding:
    """Rows that text can be scored with; `ids` int64 [v] ascending, `token` fp32 [v, h], `position` fp32 [L, h]."""

    ids: np.ndarray
    token: Tensor
    position: Tensor | None

    @classmethod
    def load(cls, checkpoint: Checkpoint, source: str | None = None) -> "Embedding":
        """A source's own, or the global one with the rows that some source holds."""
        return cls(*checkpoint.token_table(source), checkpoint.position_table(source))

    def restrict(self, ids: np.ndarray) -> "Embedding":
        """The rows of `ids` alone, for a softmax over them alone."""
        return Embedding(ids, self.token[torch.from_numpy(np.searchsorted(self.ids, ids))], self.position)


@dataclass(frozen=True)
class Task:
    """One source to score; its embedding is made when its turn comes."""

    name: str
    text: HeldoutText
    embedding: Callable[[], Embedding]
    out_of_distribution: bool


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    checkpoint = Checkpoint.open(arguments.run)
    output = arguments.output or _run_directory(arguments.run) / "evaluation.json"
    tasks = _tasks(checkpoint, arguments)
    body = _load_body(checkpoint, arguments.device)
    results = {}
    seq_length = checkpoint.model_config.seq_length
    with Progress("evaluate", total=sum(len(task.text.windows) for task in tasks), unit="windows") as progress:
        for task in tasks:
            progress.note(task.name)
            found = task.embedding()
            embedding = SourceEmbedding(found.token, found.position, torch.float32, LOSS_CHUNK_TOKENS)
            total = score(
                module_forward(body, embedding.to(arguments.device), arguments.device),
                task.text,
                arguments.batch_size,
                lambda windows: progress.advance(windows, tokens=windows * seq_length),
            )
            results[task.name] = _result(task, total)
    manifest = checkpoint.manifest
    report = {
        "run": str(_run_directory(arguments.run, or_else=arguments.run)),
        "checkpoint": checkpoint.directory.name,
        "variant": manifest["variant"],
        "phase": manifest["phase"],
        "vocabulary": manifest["vocabulary"],
        "sources": results,
    }
    _show(report)
    write_json(output, report)
    print(f"written to {output}")
    return 0


def _parse(argv: Sequence[str] | None) -> Namespace:
    parser = ToolParser(description="Perplexity and bits per byte of a checkpoint on held-out text, by source.")
    parser.add_argument("--run", type=Path, required=True, help="run directory (its newest checkpoint) or a checkpoint")
    parser.add_argument(
        "--sources", nargs="+", metavar="NAME=DIR", help="dataset directories; default: those the run trained on"
    )
    parser.add_argument("--ood", nargs="+", metavar="NAME=DIR", help="sources held out of pre-training")
    parser.add_argument("--max-tokens", type=positive_int, help="held-out tokens a source at most; default: all")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="sequences a forward pass")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help="where the model runs")
    parser.add_argument("--output", type=Path, help="default: evaluation.json in the run directory")
    arguments = parser.parse_args(argv)
    arguments.sources = _pairs("--sources", arguments.sources)
    arguments.ood = _pairs("--ood", arguments.ood)
    both = set(arguments.sources) & set(arguments.ood)
    if both:
        raise ConfigError(f"--ood: {', '.join(sorted(both))} is among --sources too; give each source once")
    return arguments


def _pairs(option: str, values: Sequence[str] | None) -> dict[str, Path]:
    pairs: dict[str, Path] = {}
    for value in values or ():
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"{option}: {value!r} is not NAME=DIR; write for example de=data/de")
        if name in pairs:
            raise ConfigError(f"{option}: {name} is given twice; give each source once")
        pairs[name] = Path(path)
    return pairs


def _run_directory(path: Path, or_else: Path | None = None) -> Path:
    """The run that `path` belongs to: the nearest directory that holds `checkpoints`."""
    for directory in (path, *path.parents):
        if (directory / "checkpoints").is_dir():
            return directory
    if or_else is not None:
        return or_else
    raise ConfigError(f"--run {path} is in no run directory; say with --output where evaluation.json goes")


def _tasks(checkpoint: Checkpoint, arguments: Namespace) -> list[Task]:
    """What can be scored, in order; what cannot is said and left out. Raises ConfigError where nothing is left."""
    manifest = checkpoint.manifest
    known = manifest["sources"]
    sources = arguments.sources or _present(known)
    for name in arguments.ood:
        if name in known:
            raise ConfigError(f"--ood: the run trained on {name}; give it under --sources")
    if VARIANTS[manifest["variant"]].token_rows == "local" and manifest["phase"] == "pretrain":
        tasks = list(_own_tasks(checkpoint, sources, arguments))
        for name in arguments.ood:
            _skip(name, f"{manifest['variant']} has no embedding for it before adapt")
    else:
        tasks = list(_global_tasks(checkpoint, sources, arguments))
    if not tasks:
        raise ConfigError(f"--run {arguments.run}: no source is left to score; train further, or adapt first")
    return tasks


def _present(known: dict[str, Any]) -> dict[str, Path]:
    """The sources that the run trains on now, and where their datasets were then."""
    for name, entry in known.items():
        if entry.get("retired"):
            _skip(name, f"it has left the run; score it with --sources {name}={entry['data']}")
    return {name: Path(entry["data"]) for name, entry in known.items() if not entry.get("retired")}


def _skip(name: str, reason: str) -> None:
    print(f"{name} is left out: {reason}")


def _own_tasks(checkpoint: Checkpoint, sources: dict[str, Path], arguments: Namespace) -> Iterator[Task]:
    """SPEC and SPEC-OPT: each source with its own rows and its own positions."""
    known = checkpoint.manifest["sources"]
    for name, path in sources.items():
        if name not in known:
            raise ConfigError(f"--sources: {name} has no embedding in {arguments.run}; it has {', '.join(known)}")
        if not known[name]["trained"]:
            _skip(name, "it was never sampled and has no embedding yet")
            continue
        directory = _open(path, name, known[name]["tokenizer_fingerprint"])
        text = _text(checkpoint, directory, checkpoint.vocabulary(name), arguments.max_tokens)
        yield Task(name, text, partial(Embedding.load, checkpoint, name), out_of_distribution=False)


def _global_tasks(checkpoint: Checkpoint, sources: dict[str, Path], arguments: Namespace) -> Iterator[Task]:
    """Each source with the global embedding: all its rows, or under TRIM the rows of the source's V_k."""
    known = checkpoint.manifest["sources"]
    whole = Embedding.load(checkpoint)
    for name, path in (sources | arguments.ood).items():
        # One global tokenizer: any source's entry names it.
        entry = known.get(name, next(iter(known.values())))
        directory = _open(path, name, entry["tokenizer_fingerprint"])
        trimmed = checkpoint.manifest["vocabulary"] == "trimmed" and name in known
        ids = checkpoint.vocabulary(name) if trimmed else whole.ids
        embedding = partial(whole.restrict, ids) if trimmed else lambda: whole
        yield Task(name, _text(checkpoint, directory, ids, arguments.max_tokens), embedding, name in arguments.ood)


def _open(path: Path, name: str, fingerprint: str) -> DatasetDirectory:
    """The dataset at `path`; DataError unless it was made with the tokenizer of that fingerprint."""
    directory = DatasetDirectory.open(path)
    found = directory.card["tokenizer"]["fingerprint"]
    if found != fingerprint:
        raise DataError(
            f"{name}: {path} was made with tokenizer {found[:12]}, the checkpoint with {fingerprint[:12]}; "
            "preprocess the source with the checkpoint's tokenizer"
        )
    return directory


def _text(
    checkpoint: Checkpoint, directory: DatasetDirectory, vocabulary: np.ndarray, max_tokens: int | None
) -> HeldoutText:
    vocab_size = directory.card["tokenizer"]["vocab_size"]
    complete = len(vocabulary) == vocab_size
    vocabulary_map = None if complete else VocabularyMap(vocabulary, vocab_size)
    return heldout_windows(directory, checkpoint.model_config.seq_length, max_tokens, vocabulary_map)


def _load_body(checkpoint: Checkpoint, device: str) -> nn.Module:
    """The checkpoint's body as a plain fp32 module in evaluation mode."""
    try:
        return body_from_state(checkpoint.model_config, checkpoint.body()).to(device).eval()
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.directory}: {error}; use the release that wrote it") from error


def _result(task: Task, found: Score) -> dict[str, Any]:
    """One source's entry of evaluation.json; a figure that is not finite is null."""
    figures = {
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "nats_per_token": found.nats_per_token,
    }
    return {name: value if math.isfinite(value) else None for name, value in figures.items()} | {
        "tokens": found.tokens,
        "bytes": found.text_bytes,
        "replaced_tokens": task.text.replaced,
        "vocabulary_size": len(task.text.bytes_per_token),
        "out_of_distribution": task.out_of_distribution,
    }


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['run']} {report['checkpoint']}: {report['variant']}, {report['phase']}")
    for heading in ("source", "perplexity", "bits per byte", "tokens", "bytes", "replaced", "vocabulary"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, entry in report["sources"].items():
        table.add_row(
            name + (" (out of distribution)" if entry["out_of_distribution"] else ""),
            _number(entry["perplexity"], ",.2f"),
            _number(entry["bits_per_byte"], ".3f"),
            *(f"{entry[field]:,}" for field in ("tokens", "bytes", "replaced_tokens", "vocabulary_size")),
        )
    Console().print(table)


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


if __name__ == "__main__":
    run_tool(main)
