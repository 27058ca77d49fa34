"""Identities of DEPT that hold whatever the numbers: the whole program against itself."""

from pathlib import Path

from tests.support.corpus import Corpus
from tests.support.runs import final_state, largest_difference, small_config, train


def test_two_silos_are_one_process_running_the_sources_in_turn(corpus: Corpus, tmp_path: Path) -> None:
    """Bitwise with two sources: each sum has two terms, and silos and turns add them in the same order."""
    names = ["latin", "greek"]
    one = small_config(corpus, tmp_path / "one", source_names=names)
    two = small_config(corpus, tmp_path / "two", source_names=names, parallel={"silos": 2})
    train(one)
    train(two, ranks=2)
    assert largest_difference(final_state(tmp_path / "one"), final_state(tmp_path / "two")) == 0
