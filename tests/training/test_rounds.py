"""The outer loop in whole programs: Nesterov, inner state kept or reset, equal bodies, when embeddings are held."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.common.errors import FederationError
from megatron_dept.common.segments import Segment
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch
from megatron_dept.training.body_hash import hash_partition, join_hashes
from tests.support.corpus import Corpus
from tests.support.distributed import run_ranks
from tests.support.runs import final_state, largest_difference, losses, metrics, small_config, train_rank
from tests.training.conftest import Finished
from tests.training.test_identities import TOLERANCE, VARIANTS

NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}


def whole_hash(body: dict[str, torch.Tensor]) -> str:
    """The hash of a body in one piece."""
    flat = torch.cat([tensor.flatten() for tensor in body.values()])
    segments, at = [], 0
    for name, tensor in body.items():
        segments.append(Segment(name, 0, tensor.numel(), at))
        at += tensor.numel()
    return join_hashes([hash_partition(flat, segments, {name: tensor.shape for name, tensor in body.items()})])


@pytest.mark.parametrize(("silos", "data", "stage"), [(2, 1, 1), (2, 2, 2), (2, 2, 0), (1, 2, 3)])
def test_all_silos_end_every_round_with_one_body(finished: Finished, silos: int, data: int, stage: int) -> None:
    """What each silo logs after the outer step: the hash of the saved body; and it does change from round to round."""
    run_dir = finished(silos * data, dept={"n_local": 1}, parallel={"silos": silos, "zero_stage": stage})
    hashes = {(line["round"], line["silo"]): line["body_hash"] for line in metrics(run_dir, "round")}
    assert len(hashes) == 2 * silos
    assert all(hashes[round, silo] == hashes[round, 0] for round, silo in hashes)
    assert hashes[0, 0] != hashes[1, 0]
    assert hashes[1, 0] == whole_hash(Checkpoint.open(run_dir).body()), "whatever ranks held it"


def _flip_a_bit(launch: Launch, config: RunConfig) -> str:
    from megatron_dept.federation.body_exchange import BodyExchange

    whole = BodyExchange.finish

    def finish(self: BodyExchange, sources: int) -> None:
        whole(self, sources)
        if launch.rank == 1:
            self.value[0] = -self.value[0]

    BodyExchange.finish = finish  # type: ignore[method-assign]
    try:
        train_rank(launch, config)
    except FederationError as error:
        return str(error)
    return "no error"


def test_bodies_that_differ_end_the_run(corpus: Corpus, tmp_path: Path) -> None:
    """A fault of memory or network in one silo is found before anything is built on it."""
    told = run_ranks(2, _flip_a_bit, small_config(corpus, tmp_path / "run", parallel={"silos": 2}))
    assert all("silos hold different bodies after round 1" in message for message in told), told


Rounds = list[dict[str, Any]]


def _recorded(launch: Launch, config: RunConfig) -> Rounds:
    """A run, and what its body exchange and token table saw: per round the body before and after, each local body,
    and this silo's gathered and trained tables."""
    from megatron_dept.engine.silo_engine import SiloEngine
    from megatron_dept.federation.body_exchange import BodyExchange

    rounds: Rounds = []
    add, finish = BodyExchange.add, BodyExchange.finish
    current: dict[str, Any] = {"locals": []}

    def recording_add(self: BodyExchange, local: torch.Tensor) -> None:
        current["locals"].append(local.numpy().copy())
        add(self, local)

    def recording_finish(self: BodyExchange, sources: int) -> None:
        before = self.value.numpy().copy()
        finish(self, sources)
        rounds.append({"before": before, "after": self.value.numpy().copy(), **current})
        current["locals"] = []

    BodyExchange.add, BodyExchange.finish = recording_add, recording_finish  # type: ignore[method-assign]
    begin = SiloEngine.train_step

    def recording_step(self: SiloEngine, *args: Any, **kwargs: Any) -> Any:
        # What the first step of a local phase starts from.
        current.setdefault("starts", []).append(self.shards.read().numpy().copy())
        return begin(self, *args, **kwargs)

    SiloEngine.train_step = recording_step  # type: ignore[method-assign]
    assert train_rank(launch, config)
    return rounds


@pytest.mark.parametrize(("silos", "data", "stage"), [(2, 1, 1), (1, 1, 3), (2, 2, 2)])
def test_nesterov_is_numpys_on_the_rounds_bodies(
    corpus: Corpus, tmp_path: Path, silos: int, data: int, stage: int
) -> None:
    """DiLoCo's outer optimizer over three rounds, momentum carried; 3 sources on each rank's partition of the body.

    1e-6 of the norm: the reference is fp64, the exchange rounds some ten fp32 operations.
    """
    sections: dict[str, Any] = {
        "dept": {"n_local": 1, "rounds": 3, "outer": NESTEROV},
        "parallel": {"silos": silos, "zero_stage": stage},
    }
    ranks = run_ranks(silos * data, _recorded, small_config(corpus, tmp_path / "run", **sections))
    for coordinate in range(data):
        peers = [ranks[silo * data + coordinate] for silo in range(silos)]
        momentum = np.zeros_like(peers[0][0]["before"], np.float64)
        for number in range(3):
            seen = [peer[number] for peer in peers]
            value = seen[0]["before"].astype(np.float64)
            locals_ = [local for silo in seen for local in silo["locals"]]
            assert len(locals_) == 3
            delta = np.mean([value - local for local in locals_], axis=0)
            momentum = 0.9 * momentum + delta
            expected = value - 0.7 * (delta + 0.9 * momentum)
            for silo in seen:
                assert np.linalg.norm(silo["after"] - expected) < 1e-6 * np.linalg.norm(expected)
                assert np.linalg.norm(silo["after"] - value) > 1e-4 * np.linalg.norm(expected)
            if number:
                assert (seen[0]["before"] == peers[0][number - 1]["after"]).all()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")])
def test_every_local_phase_starts_from_the_averaged_body(
    corpus: Corpus, tmp_path: Path, stage: int, precision: str
) -> None:
    """The masters with which the next inner step begins are the outer step's result, to the bit; so on both silos."""
    sections: dict[str, Any] = {
        "dept": {"n_local": 1, "rounds": 2},
        "parallel": {"silos": 2, "zero_stage": stage},
        "training": {"precision": precision},
    }
    ranks = run_ranks(2, _recorded, small_config(corpus, tmp_path / "run", **sections))
    for rank in ranks:
        # One step a phase: rank 0 has two phases a round, rank 1 one.
        starts = rank[-1]["starts"]
        assert len(starts) == sum(len(entry["locals"]) for entry in rank)
        expected = [entry["before"] for entry in rank for _ in entry["locals"]]
        assert all((start == value).all() for start, value in zip(starts, expected, strict=True))
        assert (rank[1]["before"] == ranks[0][0]["after"]).all()


@pytest.mark.parametrize("stage", [1, 3])
def test_kept_inner_state_waits_for_its_source(finished: Finished, stage: int) -> None:
    """DiLoCo's: silos and turns give the same bits, and other ones than a reset does."""
    names = ["latin", "greek"]
    dept = {"variant": "trim", "inner_state": "keep", "outer": NESTEROV}
    one = finished(source_names=names, dept=dept, parallel={"zero_stage": stage})
    two = finished(2, source_names=names, dept=dept, parallel={"silos": 2, "zero_stage": stage})
    reset = finished(source_names=names, dept={**dept, "inner_state": "reset"}, parallel={"zero_stage": stage})
    assert largest_difference(final_state(one), final_state(two)) == 0
    first, second = losses(one), losses(reset)
    assert all(first[name, step] == second[name, step] for name in names for step in range(3))
    assert largest_difference(final_state(one), final_state(reset)) > 100 * TOLERANCE


def test_kept_inner_state_of_data_ranks_is_that_of_one(finished: Finished) -> None:
    """Each data rank stores its partition's moments; put together they are the same."""
    dept = {"inner_state": "keep"}
    same = {"source_names": ["latin", "greek"], "dept": dept, "optimizer": {"epsilon": 1e-3}}
    one, two = finished(**same), finished(2, **same, parallel={"zero_stage": 2})
    assert largest_difference(final_state(two), final_state(one)) < TOLERANCE
    left, right = (Checkpoint.open(run_dir).index for run_dir in (one, two))
    moments = [path for path in left.paths("") if "/inner/" in path]
    assert len(moments) > 20
    for path in moments:
        expected = left.read(path)
        # Twice the tolerance: squares double a relative error.
        assert torch.linalg.vector_norm(right.read(path) - expected) <= 2 * TOLERANCE * torch.linalg.vector_norm(
            expected
        )


def _alive(launch: Launch, config: RunConfig) -> dict[str, int]:
    """A run, and the most embeddings, owners and their optimizers that were in memory at once, collected or not."""
    import gc

    from megatron_dept.engine.embedding_owner import EmbeddingOwner
    from megatron_dept.models.embedding import SourceEmbedding

    most: dict[str, int] = {}
    made: dict[str, int] = {}

    def watch(kind: type, attribute: str | None = None) -> None:
        living: weakref.WeakSet[Any] = weakref.WeakSet()
        whole = kind.__init__

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            whole(self, *args, **kwargs)
            living.add(self if attribute is None else getattr(self, attribute))
            most[kind.__name__] = max(most.get(kind.__name__, 0), len(living))
            made[kind.__name__] = made.get(kind.__name__, 0) + 1

        kind.__init__ = init  # type: ignore[misc]

    watch(EmbeddingOwner, "_optimizer")
    watch(SourceEmbedding)
    # What only the cycle collector would free has stayed in memory.
    gc.disable()
    assert train_rank(launch, config)
    assert made["EmbeddingOwner"] >= 2 * config.dept.rounds and made["SourceEmbedding"] > made["EmbeddingOwner"]
    return most


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", [1, 3])
def test_an_embedding_is_in_memory_only_while_its_source_trains(
    corpus: Corpus, tmp_path: Path, variant: str, stage: int
) -> None:
    """Never two tables, nor two of their optimizers, on a silo of three sources; validation's included."""
    config = small_config(
        corpus,
        tmp_path / "run",
        dept={"variant": variant, "n_local": 2},
        parallel={"zero_stage": stage},
        evaluation={"interval_rounds": 1, "max_tokens": 200},
    )
    assert run_ranks(1, _alive, config) == [{"EmbeddingOwner": 1, "SourceEmbedding": 1}]
