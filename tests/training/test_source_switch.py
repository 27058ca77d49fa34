"""Turning from source to source: what the next one needs is read while another trains, and the time is written down."""

import threading
from typing import Any

import pytest

from megatron_dept.checkpoint.slices import SliceIndex
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from tests.support.distributed import run_ranks
from tests.support.runs import final_state, largest_difference, metrics, small_config, train, train_rank


def readers_of_sources(launch: Launch, config: RunConfig) -> list[tuple[str, bool]]:
    """(source, whether a thread read it ahead) of every entry that this rank's turns read from the store."""
    read: list[tuple[str, bool]] = []
    original = SliceIndex._rows

    def noted(self: SliceIndex, file: Any, *arguments: Any) -> Any:
        read.append((file.parent.name, threading.current_thread() is not threading.main_thread()))
        return original(self, file, *arguments)

    SliceIndex._rows = noted  # type: ignore[method-assign]
    train_rank(launch, config)
    return read


@pytest.mark.parametrize("inner_state", ["reset", "keep"])
def test_no_turn_waits_for_the_disk(corpus, tmp_path, inner_state):
    """Two silos, three sources, so that sources change silos: every turn after a source's first finds it fetched."""
    dept = {"variant": "spec", "rounds": 3, "n_local": 1, "inner_state": inner_state}
    config = small_config(corpus, tmp_path / "run", dept=dept, parallel={"silos": 2})
    read = [entry for of_rank in run_ranks(2, readers_of_sources, config) for entry in of_rank]
    assert {name for name, _ in read} == set(corpus.data)
    assert all(ahead for _, ahead in read), read
    for line in metrics(config.run_dir, "round"):
        assert line["switch_seconds"].keys() == {"total", "read", "write"}
        assert 0 < line["switch_seconds"]["total"] <= line["seconds"]
        assert line["switch_seconds"]["read"] <= line["seconds"]


def test_the_cache_changes_no_number(corpus, tmp_path):
    dept = {"variant": "spec", "rounds": 2, "n_local": 2, "inner_state": "keep"}
    for name, cache in (("without", 0.0), ("with", 1.0)):
        train(small_config(corpus, tmp_path / name, dept=dept, embedding={"cache_gb": cache}))
    assert largest_difference(final_state(tmp_path / "without"), final_state(tmp_path / "with")) == 0
