"""Fixtures of all rooms: hypothesis without a clock, and the small corpus, made once a session."""

from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.corpus import Corpus, build_corpus

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three small sources with a global tokenizer and one each of their own."""
    return build_corpus(Path(tmp_path_factory.mktemp("corpus")) / "sources")
