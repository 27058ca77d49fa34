"""What evaluation, export and adapt read from a checkpoint: the body, and tables by source, under every variant."""

import numpy as np
import pytest
import torch

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.common.errors import CheckpointError
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.models.build import build_body
from megatron_dept.models.initialise import init_rows
from tests.support.corpus import Corpus
from tests.training.conftest import Finished

NAMES = ["latin", "greek", "code"]


@pytest.fixture
def opened(finished: Finished):
    return lambda variant: Checkpoint.open(finished(2, dept={"variant": variant}, parallel={"silos": 2}))


def test_the_body_fits_the_model_it_names(opened) -> None:
    checkpoint = opened("glob")
    body = build_body(checkpoint.model_config, 0)
    body.load_state_dict(checkpoint.body())
    assert all(tensor.dtype == torch.float32 for tensor in checkpoint.body().values())


def test_a_global_table_has_all_ids(opened) -> None:
    checkpoint = opened("glob")
    ids, table = checkpoint.token_table()
    size = checkpoint.manifest["vocab_size"]
    assert ids.dtype == np.int64 and (ids == np.arange(size)).all()
    assert table.shape == (size, 32) and checkpoint.position_table().shape == (32, 32)


def test_a_trimmed_table_has_the_ids_that_some_source_holds(opened, corpus: Corpus) -> None:
    """Rows that no source holds are still as they were drawn, and are not given out."""
    checkpoint = opened("trim")
    held = [DatasetDirectory.open(corpus.data[name]).vocabulary() for name in NAMES]
    ids, table = checkpoint.token_table()
    assert (ids == np.unique(np.concatenate(held))).all() and len(table) == len(ids)
    whole = checkpoint.index.read("token")
    drawn = init_rows(0, len(whole), 32, 0.02, checkpoint.manifest["seed"], "token")
    absent = np.setdiff1d(np.arange(len(whole)), ids)
    assert torch.equal(whole[absent], drawn[absent])
    moved = (whole[ids] != drawn[ids]).any(dim=1)
    assert moved.all(), "every row that a source holds has been in a softmax"
    assert all((checkpoint.vocabulary(name) == ids_of).all() for name, ids_of in zip(NAMES, held, strict=True))


@pytest.mark.parametrize("variant", ["spec", "spec_opt"])
def test_sources_tables_are_their_own(opened, corpus: Corpus, variant: str) -> None:
    checkpoint = opened(variant)
    for name in NAMES:
        directory = DatasetDirectory.open((corpus.data if variant == "spec" else corpus.own_data)[name])
        ids, table = checkpoint.token_table(name)
        size = directory.card["tokenizer"]["vocab_size"]
        assert (ids == (directory.vocabulary() if variant == "spec" else np.arange(size))).all()
        assert table.shape == (len(ids), 32) and checkpoint.position_table(name).shape == (32, 32)
    with pytest.raises(CheckpointError, match=f"variant {variant} has no global embedding; name one of the sources"):
        checkpoint.token_table()


def test_tables_that_do_not_exist_are_named(opened, finished: Finished) -> None:
    with pytest.raises(CheckpointError, match="its embedding is global; leave the source latin out"):
        opened("trim").token_table("latin")
    with pytest.raises(CheckpointError, match="has no source 'klingon'; it has latin, greek, code"):
        opened("spec").token_table("klingon")
    sections = {"dept": {"variant": "spec", "sources_per_round": 1, "rounds": 1}}
    checkpoint = Checkpoint.open(finished(**sections))
    trained = [name for name, entry in checkpoint.manifest["sources"].items() if entry["trained"]]
    assert len(trained) == 1
    never = next(name for name in NAMES if name not in trained)
    with pytest.raises(CheckpointError, match=f"source {never} was never sampled and has no embedding yet"):
        checkpoint.token_table(never)
