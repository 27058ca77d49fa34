"""Many small sources on two silos: memory, open files and threads do not grow with the sources, nor with the switches.

`benchmarks/results/many_sources.md` has the figures of a thousand.
"""

import os
from pathlib import Path

import pytest

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.training.sources import KEPT_OPEN, SourceSet
from tests.support.distributed import run_ranks
from tests.support.many_sources import Held, build_sources, build_tokenizer, many_config, run_and_measure


def runs_of(root: Path, counts: tuple[int, int], rounds: int, vocabulary: int, hidden: int) -> list[list[Held]]:
    """What both ranks of a run of each number of sources held."""
    tokenizer = build_tokenizer(root / "tokenizer" / "tokenizer.model", vocabulary)
    sources = build_sources(root / "sources", tokenizer, max(counts))
    held = []
    for count in counts:
        of_run = dict(list(sources.items())[:count])
        config = many_config(of_run, root / f"run{count}", dept={"rounds": rounds}, model={"hidden_size": hidden})
        held.append(run_ranks(2, run_and_measure, config, limit=280))
        checkpoint = Checkpoint.open(config.run_dir)
        trained = [name for name, entry in checkpoint.manifest["sources"].items() if entry["trained"]]
        assert len(trained) > min(count, 30) - 1
        for name in (trained[0], trained[-1]):
            ids, rows = checkpoint.token_table(name)
            assert len(ids) == len(rows) == checkpoint.manifest["sources"][name]["vocabulary_size"]
    return held


def check_flat(few: list[Held], many: list[Held], most: float) -> None:
    """`most`: the peak of many sources over that of few; two runs of the same sources differ by a hundredth."""
    for of_few, of_many in zip(few, many, strict=True):
        assert of_many.peak < most * of_few.peak, (of_few, of_many)
        # Two files each of those that are open, and what one of another round happens to have open.
        assert max(of_many.files) <= max(of_few.files) + 2 * KEPT_OPEN + 4, (of_few.files, of_many.files)
        assert of_many.threads[-1] == of_many.threads[0] == of_few.threads[0]


def test_sixty_sources_hold_what_ten_do(tmp_path):
    """A source keeps some 8 MB: with those of all kept in memory the peak was a seventh higher when that was tried."""
    few, many = runs_of(tmp_path, (10, 60), rounds=4, vocabulary=1200, hidden=256)
    check_flat(few, many, 1.06)


@pytest.mark.long
def test_a_thousand_sources_hold_what_ten_do(tmp_path):
    """A hundred sources' turns a silo; two hundred are in the benchmark."""
    few, many = runs_of(tmp_path, (10, 1000), rounds=20, vocabulary=2000, hidden=256)
    check_flat(few, many, 1.1)
    for of_rank in many:
        half = len(of_rank.resident) // 2
        # In the second half of the run nothing grows but what the allocator has not given back.
        assert of_rank.resident[-1] < 1.02 * of_rank.resident[half], of_rank.resident


def test_few_sources_are_open(tmp_path):
    tokenizer = build_tokenizer(tmp_path / "tokenizer" / "tokenizer.model", 500)
    sources = build_sources(tmp_path / "sources", tokenizer, 3 * KEPT_OPEN)
    config = many_config(sources, tmp_path / "run")
    before = len(os.listdir("/proc/self/fd"))
    opened = SourceSet(config)
    for name in opened.names:
        batch = opened[name].batch(0, 2)
        assert batch.max() < len(opened.vocabularies[name]) == opened.cards[name].vocabulary_size
    # A source's .bin and .idx.
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * KEPT_OPEN
