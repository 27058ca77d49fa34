"""Sources that join a run, leave it and come back, by a change of its configuration between two starts.

Which sources a round draws depends on (seed, round, name) alone. So where those that are not there would not have been
drawn, a run whose sources change must have the same losses and end with the same bits as one that had them all along.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dept.checkpoint.reader import Checkpoint, committed
from megatron_dept.common.errors import CheckpointError
from megatron_dept.config.schema import RunConfig
from megatron_dept.training.progress_state import Flight, RunProgress
from megatron_dept.training.resume import resume_point
from megatron_dept.training.source_changes import SourceChanges
from megatron_dept.training.sources import SourceSet
from tests.support.commands import run_command, told, tree
from tests.support.corpus import Corpus
from tests.support.runs import losses, metrics, run_that_greek_left, small_config, train, train_sites
from tests.training.conftest import Finished
from tests.training.interrupts import Stop, assert_same_run, killed, stopped, whole_state
from tests.training.test_sites import shared_state, site_configs

ALL = ["latin", "greek", "code"]
SEED = 268
"""Of all three sources, two a round, it draws latin and greek; latin and code, twice; greek and code."""
TWO_KINDS = ("trim", "spec_opt")
NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}


def drawn(**dept: Any) -> dict[str, Any]:
    """Sections of a run of four rounds, two sources in each."""
    return {
        "seed": SEED,
        "dept": {"rounds": 4, "n_local": 2, "sources_per_round": 2, "outer": NESTEROV, **dept},
        "checkpoint": {"keep_last": 9},
    }


@pytest.mark.parametrize(
    ("variant", "ranks", "overlap"), [("trim", 1, 0), ("spec", 2, 0), ("spec_opt", 1, 0), ("glob", 2, 1)]
)
def test_sources_join_leave_and_come_back(
    finished: Finished, corpus: Corpus, tmp_path: Path, variant: str, ranks: int, overlap: int
) -> None:
    """code joins and greek leaves after the first round; greek is back for the last. Inner state is kept, so it too is
    shown to have been kept for greek. With `overlap` the round's exchange was still on its way."""
    dept = {"variant": variant, "inner_state": "keep", "outer": {**NESTEROV, "overlap": overlap}}
    same = {**drawn(**dept), "parallel": {"silos": ranks}}
    expected = finished(ranks, **same)

    def run(*names: str) -> RunConfig:
        return small_config(corpus, tmp_path / "run", source_names=list(names), **same)

    first = whole_state(killed(run("latin", "greek"), ranks, after_save=1))
    between = killed(run("latin", "code"), ranks, after_save=2)
    assert between.manifest["round"] == 3 and between.manifest["all_sources"] == ["latin", "code"]
    assert {name: entry["retired"] for name, entry in between.manifest["sources"].items()} == {
        "latin": False,
        "code": False,
        "greek": True,
    }
    kept = {path: value for path, value in first.items() if path.split("/")[:2][-1] == "greek"}
    assert any(path.startswith("source/greek/inner/") for path in kept) and "vocabulary/greek" in kept
    for checkpoint in committed(tmp_path / "run" / "checkpoints"):
        state = whole_state(Checkpoint.open(checkpoint))
        assert [path for path, value in kept.items() if not torch.equal(state[path], value)] == []
    assert train(run(*ALL), ranks) == [True] * ranks
    assert_same_run(tmp_path / "run", expected)
    assert Checkpoint.open(tmp_path / "run").manifest["sources"] == Checkpoint.open(expected).manifest["sources"]


def test_the_log_and_the_dry_run_say_who_joined_left_and_came_back(corpus: Corpus, tmp_path: Path) -> None:
    """At a boundary the number of sources a round may change with them: of two only two can be drawn."""
    same = drawn(variant="spec", rounds=3, n_local=1, outer={})
    run_dir = tmp_path / "run"

    def start(names: list[str], **dept: Any) -> list[str]:
        sections = {**same, "dept": {**same["dept"], **dept}}
        config = small_config(corpus, run_dir, source_names=names, **sections)
        planned, ran = run_command(config, flags=["--dry-run"])[0], run_command(config)[0]
        assert planned.code == ran.code == 0, (planned, ran)
        spoken = [
            [line.strip() for line in outcome.stdout.splitlines() if line.startswith("sources:")]
            for outcome in (planned, ran)
        ]
        assert spoken[0] == spoken[1]
        return spoken[0]

    def back_to(saves: int) -> None:
        for path in committed(run_dir / "checkpoints")[saves:]:
            shutil.rmtree(path)

    assert start(ALL[:2]) == []
    back_to(1)
    assert start(["code"], sources_per_round=1) == ["sources: code joined; latin, greek left"]
    back_to(2)
    assert start(ALL, sources_per_round=3) == ["sources: latin (at step 1), greek (at step 1) came back"]
    assert start(ALL, sources_per_round=3) == []


THREE = {"dept": {"variant": "spec", "rounds": 2, "n_local": 3}}


def test_the_round_under_way_goes_on_without_who_leaves_in_its_turn(
    finished: Finished, corpus: Corpus, tmp_path: Path
) -> None:
    """latin is done, greek in its second step, code waits: with greek and code gone the round is latin's alone."""
    config = small_config(corpus, tmp_path / "run", **THREE)
    caught = stopped(config, 1, Stop(0, 5))
    assert caught.manifest["progress"]["done"] == ["latin"] and "greek" in caught.manifest["progress"]["flights"]
    alone = small_config(corpus, tmp_path / "run", source_names=["latin"], **THREE)
    (outcome,) = run_command(alone)
    assert outcome.code == 0
    assert "sources: greek, code left; greek, code not counted in round 1, which is under way" in outcome.stdout
    expected = finished(source_names=["latin"], **THREE)
    assert [line["body_hash"] for line in metrics(config.run_dir, "round")] == [
        line["body_hash"] for line in metrics(expected, "round")
    ]
    assert [line["dropped"] for line in metrics(config.run_dir, "round")] == [["greek", "code"], []]
    # greek has trained, so it is known; its turn did not count, so it has no embedding. Of code nothing is left.
    state = Checkpoint.open(config.run_dir)
    assert list(state.manifest["sources"]) == ["latin", "greek"]
    with pytest.raises(CheckpointError, match="source greek was never sampled"):
        state.token_table("greek")


@pytest.mark.parametrize("outer", [{}, {"overlap": 1}], ids=["at once", "overlapped"])
def test_a_round_that_all_have_left_leaves_the_body_as_it_was(
    corpus: Corpus, tmp_path: Path, outer: dict[str, Any]
) -> None:
    """latin alone, gone in the second round; greek, which comes for it, waits for the third. Overlapped, the first
    round's exchange was still on its way."""
    same = {"dept": {"variant": "spec", "rounds": 3, "n_local": 3, "outer": outer}}
    stopped(small_config(corpus, tmp_path / "run", source_names=["latin"], **same), 1, Stop(0, 5))
    assert train(small_config(corpus, tmp_path / "run", source_names=["greek"], **same)) == [True]
    lines = metrics(tmp_path / "run", "round")
    assert [line["sources"] for line in lines] == [["latin"], ["latin"], ["greek"]]
    assert [line["dropped"] for line in lines] == [[], ["latin"], []]
    first, second, third = (line["body_hash"] for line in lines)
    assert first == second != third


def test_the_round_under_way_keeps_what_a_source_has_done_before_it_left(
    finished: Finished, corpus: Corpus, tmp_path: Path
) -> None:
    """The same stop, and latin leaves: its delta counts in this round. Stopped in it again, and to its end."""
    config = small_config(corpus, tmp_path / "run", **THREE)
    stopped(config, 1, Stop(0, 5))
    without = small_config(corpus, tmp_path / "run", source_names=["greek", "code"], **THREE)
    assert stopped(without, 1, Stop(0, 2)).manifest["progress"]["sampled"] == ALL
    assert train(without) == [True]
    hashes = [line["body_hash"] for line in metrics(config.run_dir, "round")]
    expected = finished(**THREE)
    assert hashes[0] == metrics(expected, "round")[0]["body_hash"]
    assert [line["sources"] for line in metrics(config.run_dir, "round")] == [ALL, ["greek", "code"]]
    before = {key: value for key, value in losses(expected).items() if key[1] < 3}
    assert before.items() <= losses(config.run_dir).items()


def test_who_joins_in_the_middle_of_a_round_waits_for_the_next(
    finished: Finished, corpus: Corpus, tmp_path: Path
) -> None:
    two = small_config(corpus, tmp_path / "run", source_names=["latin", "code"], **THREE)
    stopped(two, 1, Stop(0, 2))
    assert train(small_config(corpus, tmp_path / "run", **THREE)) == [True]
    found, expected = (
        metrics(run, "round") for run in (two.run_dir, finished(source_names=["latin", "code"], **THREE))
    )
    assert found[0]["body_hash"] == expected[0]["body_hash"]
    assert [line["sources"] for line in found] == [["latin", "code"], ALL]


@pytest.fixture(scope="module")
def left(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs, by variant, that greek has left after the first of two rounds."""
    return {variant: run_that_greek_left(corpus, tmp_path_factory.mktemp("left"), variant) for variant in TWO_KINDS}


def test_rows_of_a_source_that_has_left_stay_in_the_shared_table(corpus, left):
    """TRIM: what greek has learned is given out with the rest."""
    checkpoint = Checkpoint.open(left["trim"])
    ids, _ = checkpoint.token_table()
    assert set(checkpoint.vocabulary("greek")) <= set(ids)
    assert set(checkpoint.vocabulary("greek")) - set(checkpoint.vocabulary("latin")), "greek has rows of its own"


def test_one_that_comes_back_must_be_what_it_was(corpus, left):
    """Its rows stand for the ids it had, and its cursor for samples of its text."""
    run_dir = left["spec_opt"]
    data = [("latin", corpus.own_data["latin"]), ("greek", corpus.own_data["code"])]
    config = small_config(
        corpus,
        run_dir,
        sources=[{"name": name, "own_data": str(path)} for name, path in data],
        dept={"variant": "spec_opt", "n_local": 1},
    )
    before = tree(run_dir)
    for flags in (["--dry-run"], []):
        line = told(run_command(config, flags=flags))
        assert "was trained with source greek, which comes back, under tokenizer " in line
    assert tree(run_dir) == before


def test_one_that_joins_a_global_vocabulary_must_have_its_tokenizer(corpus, left):
    """All sources at once are exchanged for others, so that nothing but the checkpoint knows the tokenizer."""
    config = small_config(
        corpus,
        left["trim"],
        sources=[{"name": "another", "data": str(corpus.own_data["code"])}],
        tokenizer=None,
        dept={"variant": "trim", "n_local": 1},
    )
    with pytest.raises(CheckpointError, match="was trained with source another, which joins, under tokenizer "):
        resume_point(config, SourceSet(config))


@pytest.mark.parametrize("variant", ["std", "act"])
def test_a_blend_keeps_its_sources(finished: Finished, corpus: Corpus, variant: str) -> None:
    run_dir = finished(dept={"variant": variant, "rounds": 1, "n_local": 1})
    config = small_config(corpus, run_dir, source_names=["latin"], dept={"variant": variant, "rounds": 1, "n_local": 1})
    assert told(run_command(config)) == (
        f"{run_dir}/checkpoints/step-00000001: variant {variant} trains on one blend of all sources and has come so "
        "far in that blend, so none can join or leave; set sources to latin, greek, code, or choose another run_dir "
        "for a new run"
    )


def test_sources_join_and_leave_at_their_homes(corpus: Corpus, tmp_path: Path) -> None:
    """Silos that are launches of their own: code is at home in the first, which keeps what it has; the second one knows
    its steps alone. It may come back to its own home only."""
    same = {"dept": {"variant": "spec", "rounds": 3, "n_local": 1, "inner_state": "keep"}}
    homes = {"latin": 0, "greek": 1}
    with_code = site_configs(corpus, tmp_path, [{}, {}], {**homes, "code": 0}, **same)
    assert train_sites(with_code, [1, 1]) == [True, True]
    trained = whole_state(Checkpoint.open(with_code[0].run_dir))
    for config in with_code:
        shutil.rmtree(committed(config.run_dir / "checkpoints")[-1])
    kept = {path: of for path, of in whole_state(Checkpoint.open(with_code[0].run_dir)).items() if "/code" in path}
    without = site_configs(corpus, tmp_path, [{}, {}], homes, **same)
    assert train_sites(without, [1, 1]) == [True, True]
    here, there = (Checkpoint.open(config.run_dir) for config in without)
    assert here.manifest["sources"]["code"]["retired"] and "code" not in there.manifest["sources"]
    assert here.manifest["progress"] == there.manifest["progress"] | {"traffic": here.manifest["progress"]["traffic"]}
    now = whole_state(here)
    assert [path for path, value in kept.items() if not torch.equal(now[path], value)] == []
    assert any(not torch.equal(trained[path], value) for path, value in kept.items()), "code has not trained since"
    first, other = shared_state(without)
    assert all(torch.equal(first[name], other[name]) for name in first)
    for config in site_configs(corpus, tmp_path, [{}, {}], {**homes, "code": 1}, **same):
        with pytest.raises(CheckpointError, match="was trained with source code at home "):
            resume_point(config, SourceSet(config))
    for config in site_configs(corpus, tmp_path, [{}, {}], {**homes, "code": 0}, **same):
        assert resume_point(config, SourceSet(config)) is not None


def manifest(**progress: Any) -> dict[str, Any]:
    """Of a run of a, b and c, whose second round draws a and c, in its middle: c trains, a has trained."""
    values = {"round": 1, "sampled": ["a", "c"], "done": ["a"], "flights": {"c": Flight(1, 0)}}
    steps = {"a": 4, "b": 2, "c": 1, "gone": 2}
    return {"all_sources": ["a", "b", "c"], "progress": RunProgress(**values | {"steps": steps} | progress).dump()}


def test_who_has_trained_before_comes_back_and_who_has_not_joins():
    changes = SourceChanges.since(manifest(), ["a", "new", "gone"])
    assert (changes.joined, changes.left, changes.returned) == (("new",), ("b", "c"), ("gone",))
    assert not SourceChanges.since(manifest(), ["c", "a", "b"]), "their order means nothing"


@pytest.mark.parametrize(
    ("names", "flights", "dropped"),
    [(["a", "b"], [], ["c"]), (["b", "c"], ["c"], []), (["a", "c"], ["c"], []), (["a", "b", "c", "d"], ["c"], [])],
)
def test_who_leaves_in_its_turn_is_left_out_of_the_round(names, flights, dropped):
    """c, which is in its turn; not a, which has had it, nor b, which is not drawn, nor who joins."""
    progress = RunProgress.load(manifest()["progress"])
    SourceChanges.since(manifest(), names).apply(progress)
    assert list(progress.flights) == flights and progress.dropped == dropped
    assert progress.done == ["a", *dropped] and progress.sampled == ["a", "c"]


def test_who_leaves_after_too_many_bad_steps_is_left_out_once():
    """The round's mean divides by those drawn less those dropped: each of these counts once."""
    told = manifest(flights={"c": Flight(1, 9)}, dropped=["c"])
    progress = RunProgress.load(told["progress"])
    SourceChanges.since(told, ["a", "b"]).apply(progress)
    assert progress.dropped == ["c"] and progress.done == ["a", "c"] and not progress.flights
