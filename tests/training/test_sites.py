"""Silos that are launches of their own, joined at host:port: the same results as silos of one launch."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dept.checkpoint.reader import committed
from megatron_dept.common.errors import CheckpointError, FederationError, UserError
from megatron_dept.config.load import validate_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.federation.rendezvous import open_store
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import SiloShape
from megatron_dept.training import joining
from megatron_dept.training.joining import join_federation
from megatron_dept.training.sources import SourceSet
from tests.support.corpus import Corpus
from tests.support.distributed import free_port
from tests.support.runs import final_state, largest_difference, losses, small_config, train_sites
from tests.training.conftest import Finished
from tests.training.silo_faults import dies_committing, run_silos
from tests.training.test_identities import SMOOTH, TOLERANCE

HOMES = {"latin": 0, "greek": 1, "code": 0}
EACH_ITS_OWN = {"latin": 0, "greek": 1, "code": 2}


def sources(corpus: Corpus, silo: int | None = None, homes: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """All sources with their homes; with `silo`, paths to those at home there alone."""
    entries = []
    for name, home in (homes or HOMES).items():
        entry: dict[str, Any] = {"name": name, "home": home}
        if silo in (None, home):
            entry |= {"data": str(corpus.data[name]), "own_data": str(corpus.own_data[name])}
        entries.append(entry)
    return entries


def site_configs(
    corpus: Corpus, root: Path, parallel: list[dict[str, Any]], homes: dict[str, int] | None = None, **sections: Any
) -> list[RunConfig]:
    """One configuration a site, that differ in what each site has of its own."""
    token = root / "token"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.write_text("a secret that all silos share\n")
    address = f"127.0.0.1:{free_port()}"
    configs = []
    for silo, of_site in enumerate(parallel):
        federation = {"address": address, "silo": silo, "silos": len(parallel), "token_file": str(token)}
        federation |= {"join_timeout_seconds": 60} | sections.get("federation", {})
        rest = {key: value for key, value in sections.items() if key != "federation"}
        configs.append(
            small_config(
                corpus,
                root / f"site{silo}",
                **rest,
                sources=sources(corpus, silo, homes),
                parallel=of_site,
                federation=federation,
            )
        )
    return configs


@pytest.mark.parametrize("variant", ["glob", "trim", "spec_opt"])
def test_two_launches_are_two_silos_of_one(finished: Finished, corpus: Corpus, tmp_path: Path, variant: str) -> None:
    """Within tolerance: a silo's two sources are summed before the other silo's is added."""
    same = {
        "dept": {"variant": variant, "outer": {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}},
        "optimizer": SMOOTH,
        "evaluation": {"interval_rounds": 1, "max_tokens": 200},
    }
    one = finished(2, **same, sources=sources(corpus), parallel={"silos": 2})
    configs = site_configs(corpus, tmp_path, [{}, {}], **same)
    assert train_sites(configs, [1, 1]) == [True, True]
    state, expected = {}, final_state(one)
    for config in configs:
        found = final_state(config.run_dir)
        shared = [name for name in found if not name.startswith("source/")]
        assert {name: found[name] for name in shared}.keys() == {n for n in expected if not n.startswith("source/")}
        state |= found
    assert largest_difference(state, expected) < TOLERANCE
    both = losses(configs[0].run_dir) | losses(configs[1].run_dir)
    assert both == pytest.approx(losses(one), rel=TOLERANCE)


def shared_state(configs: list[RunConfig]) -> list[dict[str, torch.Tensor]]:
    """Of each site's checkpoint what all sites have."""
    states = [final_state(config.run_dir) for config in configs]
    return [{name: of[name] for name in of if not name.startswith("source/")} for of in states]


def test_launches_of_different_shapes_are_silos_of_one(finished: Finished, corpus: Corpus, tmp_path: Path) -> None:
    """Two tensor ranks beside two data ranks: the outer exchange goes by names, and both end with the same bits."""
    same = {
        "dept": {"variant": "trim", "outer": {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}},
        "optimizer": SMOOTH,
    }
    one = finished(2, **same, sources=sources(corpus), parallel={"silos": 2})
    configs = site_configs(corpus, tmp_path, [{"tensor_model_parallel_size": 2}, {}], **same)
    assert train_sites(configs, [2, 2]) == [True] * 4
    first, second = shared_state(configs)
    assert largest_difference(first, second) == 0
    expected = final_state(one)
    assert largest_difference(first, {name: expected[name] for name in first}) < TOLERANCE
    both = losses(configs[0].run_dir) | losses(configs[1].run_dir)
    assert both == pytest.approx(losses(one), rel=TOLERANCE)


def on_another_port(configs: list[RunConfig]) -> list[RunConfig]:
    """The same launches at an address of which nothing is left from an earlier time."""
    address = f"127.0.0.1:{free_port()}"
    return [
        config.model_copy(update={"federation": config.federation.model_copy(update={"address": address})})
        for config in configs
    ]


def test_launches_go_on_from_the_checkpoint_they_all_have(finished: Finished, corpus: Corpus, tmp_path: Path) -> None:
    """Silo 1 is killed between writing its part of the second checkpoint and its manifest: silo 0 has one more.

    It is no save that they could go on from, and none is paired with what is trained anew under its name.
    """
    same = {"dept": {"variant": "spec_opt", "rounds": 3}, "optimizer": SMOOTH}
    configs = site_configs(corpus, tmp_path, [{}, {}], **same)
    ended, killed = run_silos(configs, [1, 1], {1: dies_committing(1)}, dying=(1,))
    assert killed is None and ended.startswith(("FederationError", "CheckpointError")), ended
    saved = [[path.name for path in committed(config.run_dir / "checkpoints")] for config in configs]
    assert [len(names) for names in saved] == [2, 1] and saved[0][0] == saved[1][0]
    orphan = saves(configs[0])[-1]
    assert train_sites(on_another_port(configs), [1, 1]) == [True, True]
    kept = saves(configs[0])
    assert kept == saves(configs[1]) and [name for name, _ in kept] == ["step-00000018", "step-00000027"]
    assert orphan[0] == kept[0][0] and orphan not in kept
    one = finished(2, **same, sources=sources(corpus), parallel={"silos": 2})
    both = losses(configs[0].run_dir) | losses(configs[1].run_dir)
    assert both == pytest.approx(losses(one), rel=TOLERANCE)
    first, second = shared_state(configs)
    assert largest_difference(first, second) == 0
    expected = final_state(one)
    assert largest_difference(first, {name: expected[name] for name in first}) < TOLERANCE


def saves(config: RunConfig) -> list[tuple[str, str]]:
    """Names and save ids of a site's checkpoints."""
    return joining._saves(config)


def test_what_is_gone_on_from_is_a_save_not_a_name() -> None:
    """Of [(name, save id)] a silo, oldest first; each is told its own name of the newest save that all have."""
    common = joining._common_checkpoint
    # The same name of an attempt given up and of what was trained anew: not the same save.
    lists = [[("step-06", "a"), ("step-12", "b")], [("step-06", "a"), ("step-12", "c")]]
    assert [common(lists, silo) for silo in (0, 1)] == ["step-06", "step-06"]
    # One save under two names.
    lists = [[("step-06", "a"), ("step-12", "b"), ("step-12-01", "c")], [("step-06", "a"), ("step-12", "c")]]
    assert [common(lists, silo) for silo in (0, 1)] == ["step-12-01", "step-12"]
    # A user's copy is no newer save.
    lists = [[("step-06", "a"), ("step-12", "b"), ("the-first", "a")], [("step-06", "a"), ("step-12", "b")]]
    assert [common(lists, silo) for silo in (0, 1)] == ["step-12", "step-12"]
    assert common([[], []], 1) is None
    with pytest.raises(CheckpointError, match="silos 0, 1 have checkpoints, but none of a save that all 2 silos have"):
        common([[("step-06", "a")], [("step-06", "b")]], 0)


def join(config: RunConfig) -> Any:
    """`config`'s launch, of one rank, joins the others."""
    launch = Launch(0, 1, 0, 1, "127.0.0.1", 0)
    return join_federation(config, launch, SiloShape(1, 1, 1), SourceSet(config))


def changed(config: RunConfig, **sections: Any) -> RunConfig:
    """With some fields of some sections set otherwise: `changed(c, model={"num_layers": 3})`."""
    values = config.model_dump(mode="json")
    for section, fields in sections.items():
        values[section] = {**values[section], **fields} if isinstance(fields, dict) else fields
    return validate_config(values, "test")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": {"num_layers": 3}}, "silo 1 has model.num_layers 3, silo 0, which was first, has 2"),
    "optimizer": ({"optimizer": {"learning_rate": 0.5}}, "silo 1 has optimizer.learning_rate 0.5, silo 0"),
    "seed": ({"seed": 7}, "silo 1 has seed 7, silo 0, which was first, has 1234"),
    "variant": ({"dept": {"variant": "glob"}}, "silo 1 has dept.variant glob, silo 0, which was first, has trim"),
    "outer": ({"dept": {"outer": {"learning_rate": 0.5}}}, "silo 1 has dept.outer.learning_rate 0.5, silo 0"),
    "batch": ({"training": {"global_batch_size": 8}}, "silo 1 has training.global_batch_size 8, silo 0"),
    "silos": ({"federation": {"silos": 3}}, "silo 1 has federation.silos 3, silo 0, which was first, has 2"),
    "loss": ({"federation": {"on_silo_loss": "continue"}}, "silo 1 has federation.on_silo_loss continue, silo 0"),
    "validation": ({"evaluation": {"interval_rounds": 2}}, "silo 1 has evaluation.interval_rounds 2, silo 0"),
}


@contextlib.contextmanager
def waiting(*configs: RunConfig) -> Iterator[None]:
    """Threads in which `configs` (the first serves the store) have joined, and wait for the others.

    At the end the missing cards are laid, so that no thread is left to fail during a later test.
    """
    joined: list[Any] = []

    def wait(config: RunConfig) -> None:
        # A silo that is refused may have laid the card with which the first finds the fault too.
        with contextlib.suppress(UserError):
            joined.append(join(config))

    threads = []
    for config in configs:
        threads.append(threading.Thread(target=wait, args=(config,), daemon=True))
        threads[-1].start()
        assert config.federation.address is not None and config.federation.silos is not None
        store = open_store(config.federation.address, False, 20)
        card = json.loads(store.get(f"card-{config.federation.silo}"))
    # With all sources at home, so that whoever waits finds no fault, and keeps the store until the others have read.
    card["sources"] = {source.name: next(iter(card["sources"].values())) for source in config.sources}
    try:
        yield
    finally:
        for silo in range(config.federation.silos):
            store.compare_set(f"card-{silo}", "", json.dumps(card))
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)


def refusal(first: RunConfig, second: RunConfig) -> str:
    """What the launch of `second` is told where `first`'s, which serves the store, has joined before."""
    with waiting(first), pytest.raises(UserError) as error:
        join(second)
    return str(error.value)


@pytest.mark.parametrize("what", REFUSED)
def test_a_launch_that_differs_is_refused_with_the_field(corpus: Corpus, tmp_path: Path, what: str) -> None:
    first, second = site_configs(corpus, tmp_path, [{}, {}], dept={"variant": "trim"})
    sections, told = REFUSED[what]
    assert refusal(first, changed(second, **sections)).startswith(told)


def test_a_launch_of_other_sources_secret_tokenizer_or_version_is_refused(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = site_configs(corpus, tmp_path / "sources", [{}, {}], dept={"variant": "trim"})
    fewer = [source.model_dump(mode="json") for source in second.sources if source.name != "code"]
    assert refusal(first, changed(second, sources=fewer)).startswith("silo 1 has sources.code None, silo 0")
    first, second = site_configs(corpus, tmp_path / "secret", [{}, {}], dept={"variant": "trim"})
    other = tmp_path / "other"
    other.write_text("a secret of another federation")
    told = refusal(first, changed(second, federation={"token_file": str(other)}))
    assert told.startswith("silo 1 has another secret in federation.token_file than silo 0")
    first, second = site_configs(corpus, tmp_path / "version", [{}, {}], dept={"variant": "trim"})
    with monkeypatch.context() as patched:
        patched.setattr(joining, "_charter", versions(joining._charter))
        assert refusal(first, second).startswith("silo 1 has version 99, silo 0, which was first, has ")
    # A tokenizer of one's own in the place of the global one: told by the dataset's card, as charters know none.
    first, second = site_configs(corpus, tmp_path / "tokenizer", [{}, {}], dept={"variant": "trim"})
    own = [source.model_dump(mode="json") | {"data": None} for source in second.sources]
    own[1]["data"] = str(corpus.own_data["greek"])
    told = refusal(first, changed(second, sources=own, tokenizer=None))
    assert "is under tokenizer" in told and told.endswith("preprocess both with the same")


def versions(charter: Callable[[RunConfig], dict[str, Any]]) -> Callable[[RunConfig], dict[str, Any]]:
    """Silo 1 runs another version of the program."""
    return lambda config: charter(config) | ({"version": "99"} if config.federation.silo == 1 else {})


def test_a_launch_that_never_comes_and_one_that_comes_twice_are_told(corpus: Corpus, tmp_path: Path) -> None:
    never, _ = site_configs(corpus, tmp_path / "never", [{}, {}], federation={"join_timeout_seconds": 1})
    with pytest.raises(FederationError, match="silo 0 waited for silos 1, which did not come in time"):
        join(never)
    first, second, _ = site_configs(corpus, tmp_path / "twice", [{}, {}, {}], homes=EACH_ITS_OWN)
    with waiting(first, second), pytest.raises(FederationError, match="silo 1 is in the federation already"):
        join(second.model_copy(update={"run_dir": tmp_path / "elsewhere"}))
