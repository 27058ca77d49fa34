"""V_k is the ids that occur, all bytes, and the specials."""

import numpy as np
import pytest

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers.vocabulary import required_ids, source_vocabulary


def test_required_ids(trained):
    assert required_ids(trained).tolist() == list(range(259))
    assert required_ids(trained).dtype == np.int64


def test_source_vocabulary(trained):
    counts = np.zeros(trained.vocab_size, np.int64)
    counts[[300, 5, 419]] = [1, 7, 10**12]
    vocabulary = source_vocabulary(counts, trained)
    assert vocabulary.tolist() == [*range(259), 300, 419]
    assert vocabulary.dtype == np.int64


def test_counts_of_another_tokenizer_are_refused(trained):
    with pytest.raises(DataError, match="420 ids"):
        source_vocabulary(np.zeros(421, np.int64), trained)
