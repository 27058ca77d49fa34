"""How a launch that is one silo joins the others: what must be equal, and what they must know of each other."""

from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from megatron_dept import __version__
from megatron_dept.checkpoint.reader import MANIFEST, committed
from megatron_dept.common.errors import CheckpointError, ConfigError, FederationError
from megatron_dept.common.files import read_json
from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.world import Meeting
from megatron_dept.federation.membership import Membership, NextRound
from megatron_dept.federation.rendezvous import Rendezvous
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout, SiloShape
from megatron_dept.training.resume import SHARED, SHARED_DEPT, SHARED_EMBEDDING, SHARED_TRAINING
from megatron_dept.training.sources import SourceCard, SourceSet

LONGEST_SILENCE_SECONDS = 30.0
"""A silo whose sign of life, due every second, stays out so long is lost, however long its rounds are."""
SHARED_FEDERATION = ("silos", "on_silo_loss", "straggler_factor", "straggler_minimum_seconds")
SHARED_CHECKPOINT = ("save_interval", "save_interval_unit")
SHARED_STEPS = ("on_bad_steps", "max_bad_steps")
"""Beside what a resumed run must share with its checkpoint: what decides which collectives come when."""


def join_federation(
    config: RunConfig, launch: Launch, shape: SiloShape, sources: SourceSet
) -> tuple[Layout, Meeting, str | None]:
    """Meet the other launches: the federation's layout, the store for its groups, the checkpoint to go on from.

    That is this silo's of the newest save that all have; None where nobody has any.

    Every rank joins by itself, and so finds by itself what must be refused. `sources` learns of the others'. Raises
    `ConfigError` naming the field in which this silo differs from the first, `FederationError` where others do not
    come.
    """
    saved = _saves(config)
    silo, meeting = _meet(config, launch)
    card = {
        "shape": asdict(shape),
        "sources": {name: asdict(card) for name, card in sources.cards.items()},
        "checkpoints": saved,
    }
    cards = meeting.exchange_cards(card) if launch.rank == 0 else meeting.read_cards()
    layout = _learn(cards, sources)
    return layout, Meeting(meeting.store, silo), _common_checkpoint([each["checkpoints"] for each in cards], silo)


@dataclass(frozen=True)
class ElasticJoin:
    """How a silo that goes on without others that are lost stands among them: what `training.elastic` begins with."""

    layout: Layout
    """The whole federation's, lost silos included."""
    silo: int
    store: dist.Store
    membership: Membership
    start: NextRound | None
    """How the federation began, as its silos agreed; known to the silo's first rank."""
    serves: bool
    """Whether this process keeps the store."""


def join_elastic(config: RunConfig, launch: Launch, shape: SiloShape, sources: SourceSet, round: int) -> ElasticJoin:
    """`join_federation` where silos may come again: a lost one finds its place free and takes it once more.

    `round`: how far this silo's newest checkpoint is. Raises as `join_federation` does, and `FederationError` where
    this silo is in training already, or comes with another shape than before.
    """
    federation = config.federation
    assert federation.silos is not None
    silo, meeting = _meet(config, launch)
    silence = min(LONGEST_SILENCE_SECONDS, federation.straggler_minimum_seconds)
    membership = Membership(meeting.store, silo, federation.silos, silence)
    if launch.rank == 0:
        if membership.is_taken():
            raise FederationError(
                f"silo {silo} is in the federation already; start each launch with a federation.silo of its own"
            )
        membership.enter()
        card: dict[str, Any] = {"shape": asdict(shape), "round": round, "generation": membership.generation}
        meeting.replace_card(card | {"sources": {name: asdict(own) for name, own in sources.cards.items()}})
    cards = meeting.read_cards()
    layout = _learn(cards, sources)
    start = None
    if launch.rank == 0:
        rounds = {silo: each["round"] for silo, each in enumerate(cards)}
        start = membership.start(rounds, {silo: each["generation"] for silo, each in enumerate(cards)})
    return ElasticJoin(layout, silo, meeting.store, membership, start, serves_meeting(config, launch))


def _meet(config: RunConfig, launch: Launch) -> tuple[int, Rendezvous]:
    """Which silo this is, and the store where it has found the others to be of the same run."""
    federation = config.federation
    assert federation.address is not None and federation.silo is not None and federation.silos is not None
    meeting = Rendezvous.meet(
        federation.address,
        serves_meeting(config, launch),
        federation.silo,
        federation.silos,
        _secret(config),
        federation.join_timeout_seconds,
    )
    meeting.sign(_charter(config))
    return federation.silo, meeting


def serves_meeting(config: RunConfig, launch: Launch) -> bool:
    """Whether this process keeps the store at federation.address."""
    federation = config.federation
    return (federation.silo == 0 if federation.serve is None else federation.serve) and launch.rank == 0


def _learn(cards: list[dict[str, Any]], sources: SourceSet) -> Layout:
    """Tell `sources` of the other silos'; the layout of all."""
    sources.learn({name: SourceCard(**of) for each in cards for name, of in each["sources"].items()})
    return Layout(tuple(SiloShape(**each["shape"]) for each in cards))


def _saves(config: RunConfig) -> list[tuple[str, str]]:
    """(name, save id) of this silo's committed checkpoints, oldest first: names grow with the steps trained."""
    paths = committed(config.run_dir / "checkpoints")
    return [(path.name, str(read_json(path / MANIFEST).get("save_id", path.name))) for path in paths]


def _common_checkpoint(saved: list[list[tuple[str, str]]], silo: int) -> str | None:
    """`silo`'s name for the newest save of which every silo has its checkpoint; None where none has any.

    By the saves' ids: a silo may have one more than the others where the run ended between the manifests of one save,
    and what was trained anew from an earlier one has the names of what was lost. "Newest" is in the first silo's order,
    so that all come to the same; where the ids are equal, the orders of all silos are.
    """
    # Of copies under further names, which sort anywhere, the first counts.
    named = [{save_id: name for name, save_id in reversed(of_silo)} for of_silo in saved]
    ids = dict.fromkeys(save_id for _, save_id in saved[0])
    common = [save_id for save_id in ids if all(save_id in of_silo for of_silo in named)]
    if common:
        return named[silo][common[-1]]
    having = [str(each) for each, names in enumerate(saved) if names]
    if having:
        raise CheckpointError(
            f"silos {', '.join(having)} have checkpoints, but none of a save that all {len(saved)} silos have; give "
            "each its own run_dir of the same run, or new ones to all (under federation.on_silo_loss continue each "
            "silo saves by itself: go on with that)"
        )
    return None


def _secret(config: RunConfig) -> str:
    path = config.federation.token_file
    assert path is not None
    try:
        secret = path.read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"federation.token_file {path}: {error.strerror}; write the federation's secret there"
        ) from error
    if len(secret) < 16:
        raise ConfigError(
            f"federation.token_file {path} holds {len(secret)} characters; write at least 16, e.g. with "
            "'openssl rand -hex 32', and give all silos the same"
        )
    return secret


def _charter(config: RunConfig) -> dict[str, Any]:
    """What all silos must have alike, by field; paths are each site's own."""
    values = config.model_dump(mode="json")
    charter: dict[str, Any] = {"version": __version__}
    for section, fields in (
        ("", SHARED),
        ("dept", SHARED_DEPT),
        ("training", SHARED_TRAINING),
        ("embedding", SHARED_EMBEDDING),
        ("federation", SHARED_FEDERATION),
        ("checkpoint", SHARED_CHECKPOINT),
        ("dept", SHARED_STEPS),
    ):
        of = values[section] if section else values
        charter |= {f"{section}.{field}" if section else field: of[field] for field in fields}
    charter["evaluation.interval_rounds"] = values["evaluation"]["interval_rounds"]
    charter["sources"] = {source.name: f"home {source.home}" for source in config.sources}
    return charter
