"""Identities of DEPT that hold whatever the numbers: the whole program against itself and against plain torch."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.data.indexed import IndexedDatasetWriter
from tests.engine.plain import Plain
from tests.support.corpus import Corpus
from tests.support.runs import final_state, largest_difference, losses, metrics, small_config, train
from tests.training.conftest import Finished
from tests.training.plain_run import (
    by_checkpoint_name,
    first_tables,
    plain_run,
    source_batch,
    union_batch,
    vocabulary_size,
)

TOLERANCE = 1e-5
"""Relative L2 per tensor: sums of the same terms in another order, over a handful of steps, differ by about 1e-6."""
SMOOTH = {"epsilon": 1e-3}
"""AdamW whose update is a smooth function of the gradient: with 1e-8, rounding alone decides the sign of an update
wherever a gradient is nearly zero, and no tolerance would mean anything."""
PLAIN_SGD: dict[str, dict[str, Any]] = {
    "optimizer": {"optimizer": "sgd", "learning_rate": 0.5, "schedule": "constant", "warmup_steps": 0, "clip_grad": 0},
    "dept": {"n_local": 1, "rounds": 3},
}
NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}
VARIANTS = ["glob", "trim", "spec", "spec_opt"]


def assert_close(left: Path, right: Path) -> None:
    """Two finished runs have the same parameters and losses within tolerance."""
    assert largest_difference(final_state(left), final_state(right)) < TOLERANCE
    expected = losses(right)
    assert losses(left) == pytest.approx(expected, rel=TOLERANCE) and expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_silos_are_one_process_running_the_sources_in_turn(finished: Finished, variant: str) -> None:
    """Bitwise with two sources: each sum has two terms, and silos and turns add them in the same order."""
    same = {"source_names": ["latin", "greek"], "dept": {"variant": variant}}
    one, two = finished(**same), finished(2, **same, parallel={"silos": 2})
    assert largest_difference(final_state(one), final_state(two)) == 0
    assert losses(one) == losses(two)


def test_where_tables_lie_changes_no_bit_and_rows_in_bf16_are_rounded_on_any_silo(finished: Finished) -> None:
    """In bf16 a silo's own rows are rounded like those that it sends: two silos are one process there too."""
    same = {"source_names": ["latin", "greek"], "dept": {"variant": "trim", "outer": NESTEROV}}
    on_disk = finished(2, **same, parallel={"silos": 2}, embedding={"row_table": "disk"})
    in_memory = finished(**same)
    assert largest_difference(final_state(in_memory), final_state(on_disk)) == 0
    one = finished(**same, embedding={"wire": "bf16"})
    two = finished(2, **same, parallel={"silos": 2}, embedding={"wire": "bf16", "row_table": "disk"})
    assert largest_difference(final_state(one), final_state(two)) == 0
    # Rows are rounded twice a round, by 2^-9 of themselves at most: the run is another, and as good.
    assert largest_difference(final_state(one), final_state(in_memory)) > 0
    assert losses(one) == pytest.approx(losses(in_memory), rel=2e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_sources_than_silos_are_one_process_too(finished: Finished, variant: str) -> None:
    """Three sources on two silos: two slots, the second with an idle silo."""
    same = {"dept": {"variant": variant}, "optimizer": SMOOTH}
    assert_close(finished(2, **same, parallel={"silos": 2}), finished(**same))


def five_sources(corpus: Corpus) -> list[dict[str, str]]:
    """Names decide the order of samples, so one data set makes several sources."""
    data = ["latin", "greek", "code", "latin", "greek"]
    return [
        {"name": f"s{i}", "data": str(corpus.data[name]), "own_data": str(corpus.own_data[name])}
        for i, name in enumerate(data)
    ]


@pytest.mark.parametrize("variant", ["trim", "spec_opt"])
def test_sampled_sources_on_silos_are_one_process_too(finished: Finished, corpus: Corpus, variant: str) -> None:
    """Three of five sources a round."""
    same = {
        "sources": five_sources(corpus),
        "dept": {"variant": variant, "sources_per_round": 3, "rounds": 3, "n_local": 2},
        "optimizer": SMOOTH,
    }
    one, two = finished(**same), finished(2, **same, parallel={"silos": 2})
    assert_close(two, one)
    sampled = [line["sources"] for line in metrics(one, "round")]
    assert [len(names) for names in sampled] == [3, 3, 3] and len({tuple(names) for names in sampled}) > 1


@pytest.mark.parametrize(("silos", "data", "stage"), [(1, 1, 1), (2, 1, 0), (2, 2, 3)])
def test_one_inner_step_and_fedavg_is_synchronous_data_parallel(
    finished: Finished, corpus: Corpus, silos: int, data: int, stage: int
) -> None:
    """GLOB with one SGD step a round: the mean of the sources' updates is the update of the mean gradient.

    The synchronous side is plain torch, in one process, on the union of the sources' batches.
    """
    sections: dict[str, Any] = {**PLAIN_SGD, "parallel": {"silos": silos, "zero_stage": stage}}
    run_dir = finished(silos * data, **sections)
    config = small_config(corpus, run_dir, **sections)
    plain = plain_run(config, vocabulary_size(config))
    start = by_checkpoint_name(plain)
    synchronous = [plain.step(union_batch(config, step), 0.5)[0] for step in range(3)]
    assert largest_difference(final_state(run_dir), by_checkpoint_name(plain)) < TOLERANCE
    assert largest_difference(start, by_checkpoint_name(plain)) > 100 * TOLERANCE, "the steps must have moved something"
    found = losses(run_dir)
    for step, loss in enumerate(synchronous):
        of_sources = [value for (_, at), value in found.items() if at == step]
        assert len(of_sources) == 3 and np.mean(of_sources) == pytest.approx(loss, rel=TOLERANCE)


@pytest.mark.parametrize(("silos", "data", "stage"), [(2, 1, 1), (2, 2, 2)])
def test_one_inner_step_and_nesterov_is_torchs_nesterov(
    finished: Finished, corpus: Corpus, silos: int, data: int, stage: int
) -> None:
    """With one SGD step a round, a delta is a gradient times the inner rate: the outer optimizer on body and rows
    is then torch's SGD with Nesterov momentum on the union of the batches, at the product of both rates."""
    outer = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}
    sections: dict[str, Any] = {
        "optimizer": {**PLAIN_SGD["optimizer"], "learning_rate": 0.1},
        "dept": {**PLAIN_SGD["dept"], "outer": outer},
        "parallel": {"silos": silos, "zero_stage": stage},
    }
    run_dir = finished(silos * data, **sections)
    config = small_config(corpus, run_dir, **sections)
    plain = plain_run(config, vocabulary_size(config))
    groups = [{"params": list(plain.body.parameters())}, {"params": plain.embedding_parameters()}]
    plain.optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    for step in range(3):
        plain.step(union_batch(config, step), 0.7 * 0.1)
    assert largest_difference(final_state(run_dir), by_checkpoint_name(plain)) < TOLERANCE


@pytest.mark.parametrize("silos", [1, 2])
def test_one_schedule_runs_on_through_all_rounds(finished: Finished, silos: int) -> None:
    """Two steps of warm-up, once, then one cosine to a tenth over the rest of the run; every source of a round is at
    the same sequential step, whatever its slot."""
    lines = metrics(finished(silos, optimizer=SMOOTH, parallel={"silos": silos}), "step")
    cosine = [0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * step / 4)) for step in range(4)]
    expected = 3e-3 * np.array([0.5, 1.0, *cosine])
    assert len(lines) == 3 * len(expected)
    for line in lines:
        assert line["learning_rate"] == pytest.approx(expected[line["step"]])


@pytest.mark.parametrize("state", ["keep", "reset"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_source_alone_is_plain_training(finished: Finished, corpus: Corpus, variant: str, state: str) -> None:
    """FedAvg of one source leaves nothing out: AdamW on one continuous schedule, clipped; `reset` forgets its moments
    at every round's start, body's and embedding's alike.

    GLOB's softmax is over all ids, TRIM's and SPEC's over V_k alone, SPEC-OPT's over those of the source's tokenizer.
    GLOB and TRIM start from rows of one global table, SPEC and SPEC-OPT from a table drawn for the source.
    """
    sections: dict[str, Any] = {
        "source_names": ["latin"],
        "dept": {"variant": variant, "inner_state": state},
        "optimizer": {**SMOOTH, "clip_grad": 0.5},
    }
    run_dir = finished(**sections)
    config = small_config(corpus, run_dir, **sections)
    data = DatasetDirectory.open(getattr(config.sources[0], config.data_field))
    size = data.card["tokenizer"]["vocab_size"]
    ids = data.vocabulary() if variant in ("trim", "spec") else np.arange(size)
    local = np.full(size, -1)
    local[ids] = np.arange(len(ids))
    if variant in ("glob", "trim"):
        whole_table, position = first_tables(config, size)
        plain = Plain(config, whole_table[torch.from_numpy(ids)], position)
    else:
        plain = Plain(config, *first_tables(config, len(ids), "latin"))
    lines = metrics(run_dir, "step")
    for step, line in enumerate(lines):
        if state == "reset" and step == config.dept.n_local:
            plain.reset_optimizer()
        batch = torch.from_numpy(local[source_batch(config, "latin", step).numpy()])
        loss, norm = plain.step(batch, line["learning_rate"])
        assert (line["loss"], line["grad_norm"]) == pytest.approx((loss, norm), rel=TOLERANCE)
    assert min(line["grad_norm"] for line in lines) > 0.5, "the clip must bite"
    assert len(lines) == 6
    expected = by_checkpoint_name(plain)
    if variant in ("glob", "trim"):
        whole_table[torch.from_numpy(ids)] = expected["token"]
        expected["token"] = whole_table
    else:
        expected = {(name if "/" in name else f"source/latin/{name}"): value for name, value in expected.items()}
    assert largest_difference(final_state(run_dir), expected) < TOLERANCE


@pytest.fixture(scope="module")
def whole_vocabulary(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The corpus with one more training document a source, of every id once: then V_k = V."""
    data = {}
    for name, source in corpus.data.items():
        target = Path(shutil.copytree(source, tmp_path_factory.mktemp("whole") / name))
        opened = DatasetDirectory.open(source)
        size, train_split = opened.card["tokenizer"]["vocab_size"], opened.indexed("train")
        with IndexedDatasetWriter(target / "train", size) as writer:
            for number in range(len(train_split)):
                writer.add_document(train_split.document(number))
            writer.add_document(np.arange(size))
            writer.finalize()
        np.save(target / "token_counts.npy", opened.token_counts + 1)
        card = opened.card | {"vocabulary_size": size}
        card["splits"] = {**card["splits"], "train": dict(card["splits"]["train"])}
        card["splits"]["train"]["documents"] += 1
        card["splits"]["train"]["tokens"] += size
        (target / "card.json").write_text(json.dumps(card))
        assert len(DatasetDirectory.open(target).vocabulary()) == size
        data[name] = target
    return replace(corpus, data=data)


def test_trim_with_the_whole_vocabulary_is_glob(whole_vocabulary: Corpus, tmp_path: Path) -> None:
    """To the bit, and byte for byte on the wire."""
    for variant in ("glob", "trim"):
        sections = {"dept": {"variant": variant}, "parallel": {"silos": 2}}
        train(small_config(whole_vocabulary, tmp_path / variant, **sections), ranks=2)
    glob, trim = tmp_path / "glob", tmp_path / "trim"
    assert largest_difference(final_state(trim), final_state(glob)) == 0
    assert losses(trim) == losses(glob)
    assert (trim / "ledger.json").read_text() == (glob / "ledger.json").read_text()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_must_not_matter_does_not(finished: Finished, stage: int, precision: str) -> None:
    """One process or two silos, validation in between, activations computed again instead of kept: the same bits."""
    names = ["latin", "greek"]
    same = {"source_names": names, "dept": {"n_local": 1}, "training": {"precision": precision}}
    plain = finished(2, **same, parallel={"silos": 2, "zero_stage": stage})
    others = [
        finished(**same, parallel={"zero_stage": stage}),
        finished(
            2,
            **{**same, "training": {"precision": precision, "activation_checkpointing": True}},
            parallel={"silos": 2, "zero_stage": stage},
            evaluation={"interval_rounds": 1, "max_tokens": 200},
        ),
    ]
    for other in others:
        assert losses(other) == losses(plain)
        assert largest_difference(final_state(other), final_state(plain)) == 0


def test_trim_without_the_whole_vocabulary_is_not_glob(finished: Finished) -> None:
    """The softmax is over V_k alone; so the identity above is not empty."""
    glob, trim = (finished(2, dept={"variant": v}, optimizer=SMOOTH, parallel={"silos": 2}) for v in ("glob", "trim"))
    assert losses(glob)[("latin", 0)] > losses(trim)[("latin", 0)] + 0.1
