"""Finished runs that several tests look at, each trained once a session."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.corpus import Corpus
from tests.support.runs import small_config, train

Finished = Callable[..., Path]
"""`finished(ranks=2, parallel={"silos": 2}, ...)`: the directory of that run of `small_config`, to be left as it is."""


@pytest.fixture(scope="session")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done: dict[str, Path] = {}

    def run(ranks: int = 1, **sections: Any) -> Path:
        key = json.dumps([ranks, sections], sort_keys=True)
        if key not in done:
            run_dir = tmp_path_factory.mktemp("finished") / "run"
            assert train(small_config(corpus, run_dir, **sections), ranks) == [True] * ranks
            done[key] = run_dir
        return done[key]

    return run
