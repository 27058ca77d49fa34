"""Many small sources of different vocabularies under one tokenizer, written as ids without text; what a run of them
holds: memory, open files and threads of each rank after every round."""

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dept.common.seeding import generator_for
from megatron_dept.config.load import validate_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.data.indexed import IndexedDatasetWriter
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.load import load_tokenizer
from megatron_dept.tokenizers.train import train_sentencepiece
from megatron_dept.tokenizers.vocabulary import source_vocabulary
from megatron_dept.topology.launch import Launch


def build_tokenizer(file: Path, vocabulary: int) -> Tokenizer:
    """A sentencepiece tokenizer of seeded words."""
    generator = generator_for("many sources")
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(generator.choice(letters, generator.integers(3, 9))) for _ in range(2 * vocabulary)]
    texts = [" ".join(words[start : start + 50]) for start in range(0, len(words), 50)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(train_sentencepiece(texts, vocabulary))
    return load_tokenizer(file)


def build_sources(directory: Path, tokenizer: Tokenizer, count: int, tokens: int = 400) -> dict[str, Path]:
    """`count` dataset directories, each of some `tokens` ids drawn from a tenth to a third of the tokenizer's."""
    made = {}
    for number in range(count):
        name = f"source{number:04d}"
        generator = generator_for("many sources", name)
        size = int(tokenizer.vocab_size * generator.uniform(0.1, 0.33))
        ids = generator.choice(tokenizer.vocab_size, size, replace=False)
        splits = {"train": generator.choice(ids, (4, tokens // 4)), "heldout": generator.choice(ids, (1, 40))}
        made[name] = _write(directory / name, name, tokenizer, splits)
    return made


def _write(place: Path, name: str, tokenizer: Tokenizer, splits: dict[str, np.ndarray]) -> Path:
    place.mkdir(parents=True)
    shutil.copyfile(tokenizer.path, place / tokenizer.path.name)
    card_splits = {}
    for split, documents in splits.items():
        with IndexedDatasetWriter(place / split, tokenizer.vocab_size) as writer:
            for document in documents:
                writer.add_document(document)
        card_splits[split] = {"documents": len(documents), "tokens": documents.size, "bytes": 4 * documents.size}
    counts = np.bincount(splits["train"].ravel(), minlength=tokenizer.vocab_size)
    np.save(place / "token_counts.npy", counts)
    card = {
        "format_version": 1,
        "name": name,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "file": tokenizer.path.name,
        },
        "splits": card_splits,
        "tokens_per_byte": 0.25,
        "vocabulary_size": len(source_vocabulary(counts, tokenizer)),
    }
    (place / "card.json").write_text(json.dumps(card))
    return place


def many_config(sources: dict[str, Path], run_dir: Path, **sections: Any) -> RunConfig:
    """Two silos of SPEC over `sources`, a few of which train in a round; `sections` are merged over."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "seq_length": 32},
        "sources": [{"name": name, "data": str(data), "own_data": str(data)} for name, data in sources.items()],
        "dept": {"variant": "spec", "rounds": 4, "n_local": 1, "sources_per_round": 10, "inner_state": "keep"},
        "parallel": {"silos": 2},
        "training": {"micro_batch_size": 2, "global_batch_size": 2, "threads_per_rank": 1, "timeout_seconds": 120},
        "evaluation": {"interval_rounds": 0},
        "checkpoint": {"save_interval": 0},
        "logging": {"peak_tflops": 1.0, "interval_steps": 10_000, "norm_interval_steps": 10_000},
    }
    for section, fields in sections.items():
        values[section] = {**values[section], **fields} if section in values else fields
    return validate_config(values, "many sources")


@dataclass
class Held:
    """What one rank's process holds: after each round, and at most."""

    start_seconds: float = 0.0
    """To open and check all sources; of the processor's time."""
    seconds: float = 0.0
    resident: list[int] = field(default_factory=list)
    """Bytes after each round; of memory, not of files mapped."""
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    peak: int = 0
    """Bytes resident at most, files mapped included."""


def run_and_measure(launch: Launch, config: RunConfig) -> Held:
    """One rank of a run."""
    from megatron_dept.training import setup
    from megatron_dept.training.metrics import Metrics
    from megatron_dept.training.sources import SourceSet

    held = Held()
    write = Metrics.write

    def noted(self: Metrics, kind: str, **values: Any) -> None:
        write(self, kind, **values)
        if kind == "round":
            held.resident.append(_status("RssAnon"))
            held.files.append(len(os.listdir("/proc/self/fd")))
            held.threads.append(_count("Threads"))

    class Timed(SourceSet):
        def __init__(self, config: RunConfig) -> None:
            began = time.process_time()
            super().__init__(config)
            held.start_seconds = time.process_time() - began

    Metrics.write = noted  # type: ignore[method-assign]
    setup.SourceSet = Timed  # type: ignore[misc]
    began = time.perf_counter()
    setup.run(config, launch)
    held.seconds = time.perf_counter() - began
    held.peak = _status("VmHWM")
    return held


def _status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    return 1024 * _count(field)


def _count(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
