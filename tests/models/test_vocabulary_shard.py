"""Rows of a vocabulary over tensor ranks: balanced, nothing padded, nothing lost; and what an embedding refuses."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.tags import check_tagged
from megatron_dept.models.vocabulary_shard import VocabularyShard
from megatron_dept.tensor_parallel.group import ALONE
from megatron_dept.tensor_parallel.shards import ParameterShard, Run, shard_of


@dataclass(frozen=True)
class Place:
    """A rank of a group that is never asked for anything."""

    rank: int
    size: int


@given(ranks=st.integers(1, 9), more=st.integers(0, 200))
def test_ranges_follow_one_another_and_differ_by_one_at_most(ranks, more):
    total = ranks + more
    ranges = [VocabularyShard.vocabulary_range(total, ranks, rank) for rank in range(ranks)]
    assert [row for part in ranges for row in part] == list(range(total))
    sizes = [len(part) for part in ranges]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_ranges_by_hand():
    assert [VocabularyShard.vocabulary_range(97, 4, rank) for rank in range(4)] == [
        range(0, 25),
        range(25, 49),
        range(49, 73),
        range(73, 97),
    ]


@given(ranks=st.integers(1, 5), total=st.integers(5, 30))
def test_each_id_is_one_ranks_and_a_foreign_one_is_outside_every_table(ranks, total):
    ids = torch.arange(-3, total + 3)
    owners = torch.zeros(len(ids), dtype=torch.int64)
    for rank in range(ranks):
        shard = VocabularyShard(Place(rank, ranks), total)
        rows, elsewhere = shard.local(ids)
        foreign = (ids < 0) | (ids >= total)
        assert ((rows[foreign] < 0) | (rows[foreign] >= shard.stop - shard.start)).all() and not elsewhere[
            foreign
        ].any()
        assert (rows[elsewhere] == 0).all()
        here = ~elsewhere & ~foreign
        assert torch.equal(rows[here], ids[here] - shard.start)
        owners += here
    assert torch.equal(owners, ((ids >= 0) & (ids < total)).long())


def test_fewer_ids_than_ranks_are_refused():
    VocabularyShard(Place(3, 4), 4)
    with pytest.raises(ValueError, match="vocabulary of 3 leaves some of 4 tensor ranks without a row; use at most 3"):
        VocabularyShard(Place(0, 4), 3)


def test_an_embeddings_table_knows_its_rows():
    shard = VocabularyShard(Place(1, 4), 97)
    embedding = SourceEmbedding(torch.zeros(24, 6), None, torch.float32, 8, shard)
    check_tagged(embedding, "embedding")
    assert shard_of(embedding.token) == ParameterShard((97, 6), (Run(0, 25 * 6, 24 * 6, True),))
    assert embedding.token.model_parallel and embedding.token.tensor_model_parallel
    alone = SourceEmbedding(torch.zeros(97, 6), None, torch.float32, 8)
    assert (alone.shard.tensor, alone.shard.start, alone.shard.stop) == (ALONE, 0, 97)
    assert not hasattr(alone.token, "model_parallel")


def test_tables_of_other_ranks_are_refused():
    shard = VocabularyShard(Place(1, 4), 97)
    with pytest.raises(ValueError, match="token has 25 rows; this rank holds 25..48"):
        SourceEmbedding(torch.zeros(25, 6), None, torch.float32, 8, shard)
    with pytest.raises(ValueError, match="position belongs to the first tensor rank"):
        SourceEmbedding(torch.zeros(24, 6), torch.zeros(8, 6), torch.float32, 8, shard)
