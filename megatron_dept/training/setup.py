"""Builds a run from its configuration and runs it: world, sources, body, engine, outer exchange, trainer."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.checkpoint.store import SourceStore
from megatron_dept.checkpoint.writer import remove_newer
from megatron_dept.common.cli import explain_refusal
from megatron_dept.common.errors import (
    CheckpointError,
    ConfigError,
    FederationError,
    LostPeerError,
    UserError,
    first_line,
)
from megatron_dept.common.files import atomic_write, write_json
from megatron_dept.config.load import dump_config
from megatron_dept.config.schema import LoggingConfig, RunConfig
from megatron_dept.dept.outer import OuterRule
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.engine.build import build_engine
from megatron_dept.engine.world import World, start_world, torchrun_serves
from megatron_dept.federation.exchange import Exchange
from megatron_dept.federation.shares import Packing
from megatron_dept.models.build import build_body
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout, accumulation_steps
from megatron_dept.training.elastic import Elastic, own_exchange
from megatron_dept.training.embeddings import EmbeddingBroker
from megatron_dept.training.inner_state import InnerState
from megatron_dept.training.joining import ElasticJoin, join_elastic, join_federation, serves_meeting
from megatron_dept.training.metrics import Metrics
from megatron_dept.training.parts import body_part, build_exchange
from megatron_dept.training.plan import build_plan
from megatron_dept.training.progress_state import RunProgress
from megatron_dept.training.resume import changes_line, resume_point
from megatron_dept.training.signals import StopRequest
from megatron_dept.training.source_switch import SourceSwitch
from megatron_dept.training.sources import SourceSet
from megatron_dept.training.state import RunState
from megatron_dept.training.trainer import Trainer
from megatron_dept.training.watch import FailureWatch, Roster


def run(config: RunConfig, launch: Launch) -> bool:
    """Train `config` on this launch, from its last checkpoint where it has one. False where it was asked to stop.

    Raises `UserError`s for what the user can mend, before anything is written where it can be known before.
    """
    own = Layout.cut(config.parallel, launch.world_size)
    for shape in own.shapes:
        accumulation_steps(config.training.global_batch_size, config.training.micro_batch_size, shape.data)
    _check_monitors(config.logging)
    sources = SourceSet(config)
    resume_from = resume_point(config, sources)
    start_from = _adapt_start(config, sources) if resume_from is None else None
    plan = build_plan(config, launch.world_size, sources) if launch.rank == 0 else None
    set_threads(config, launch)
    joined: ElasticJoin | None = None
    overlaps = config.dept.outer.overlap > 0
    if config.federation.on_silo_loss == "continue":
        round = resume_from.manifest["progress"]["round"] if resume_from is not None else 0
        joined = join_elastic(config, launch, own.shapes[0], sources, round)
        world = start_world(launch, own, config.training.timeout_seconds)
        world = replace(world, meeting=joined.store)
    elif config.federation.separate:
        layout, meeting, common = join_federation(config, launch, own.shapes[0], sources)
        resume_from = resume_point(config, sources, common) if common is not None else None
        world = start_world(launch, layout, config.training.timeout_seconds, meeting, overlaps=overlaps)
    else:
        backend = config.federation.backend
        world = start_world(launch, own, config.training.timeout_seconds, backend=backend, overlaps=overlaps)
    watch = FailureWatch(world.shared_store, _roster(config, world, joined))
    with _failures_told(config, watch):
        trainer = build_trainer(config, world, sources, start_from, resume_from, joined, watch)
        if plan is not None:
            write_json(config.run_dir / "plan.json", plan)
        finished = trainer.run()
        world.barrier()
        trainer.leave(finished)
    watch.close()
    world.close()
    return finished


@contextmanager
def _failures_told(config: RunConfig, watch: FailureWatch) -> Iterator[None]:
    """Tell the other ranks of a failure, learn which rank it was of theirs, and say what the libraries' errors mean."""
    try:
        try:
            yield
        except Exception as error:
            noticed = _lost_peer(error)
            if noticed is None:
                watch.tell(" ".join(str(error).split())[:300])
                raise
            raise FederationError(watch.explain(noticed)) from error
    except OSError as error:
        refusal = explain_refusal(error)
        if error.filename is not None or refusal is None:
            raise
        # A write to an open file that is refused knows no name: logs, then, all of which are in one place.
        raise UserError(f"cannot write in {config.run_dir}: {refusal}") from error


def _lost_peer(error: Exception) -> str | None:
    """How a peer's loss was noticed, where the error is one; None where it is this rank's own failure."""
    if isinstance(error, LostPeerError):
        return error.what
    # Our own collectives say so themselves; these are DeepSpeed's, at start-up and inside a silo.
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
        return f"lost another rank ({first_line(error)})"
    return None


def _roster(config: RunConfig, world: World, joined: ElasticJoin | None) -> Roster:
    """All ranks that share `world.shared_store`, each called as in its own launch's logs."""
    layout, names = world.layout, []
    for rank in range(layout.world_size):
        silo = layout.coordinate(rank).silo
        own = rank - layout.offset(silo) if world.separate else rank
        names.append(f"silo {silo if joined is None else joined.silo}, rank {own}")
    if world.shared_store is world.store:
        keeper = None if torchrun_serves() else 0
        keeps = world.rank == keeper
    else:
        keeper, keeps = None, serves_meeting(config, world.launch)
    # Launchers count node by node; where one does not, nobody is found to have ended who has not.
    first = world.rank - world.launch.local_rank
    machine = range(max(0, first), first + world.launch.local_world_size)
    return Roster(world.rank, tuple(names), keeps, keeper, config.run_dir / "phase", machine)


def build_trainer(
    config: RunConfig,
    world: World,
    sources: SourceSet,
    start_from: Checkpoint | None = None,
    resume_from: Checkpoint | None = None,
    joined: ElasticJoin | None = None,
    watch: FailureWatch | None = None,
) -> Trainer:
    """Everything a run consists of, as `resume_from` holds it or at its start; collective.

    `start_from`: the checkpoint whose body an adapt run begins with. `joined`: where the silo goes on without others.
    `watch`: is told the run's phases; default: nobody is.
    """
    metrics = Metrics(config.run_dir, joined.silo if joined is not None else world.place.silo, world.leads_silo)
    part = body_part(config, world, sources.largest_vocabulary)
    body = build_body(config.model, config.seed, config.training.activation_checkpointing, part)
    engine = build_engine(config, body, world)
    shards = engine.shards
    if start_from is not None:
        shards.write(start_from.index.fill(torch.zeros(shards.numel), "body", shards.segments))
    variant = VARIANTS[config.dept.variant]
    outer = config.dept.outer
    rule = OuterRule(outer.optimizer, outer.learning_rate, outer.momentum)
    packing = Packing(outer.wire, outer.bucket_mb)
    exchange: Exchange | None = None
    if joined is not None:
        exchange = own_exchange(world, joined, engine, rule, packing)
    elif variant.averages_body:
        exchange = build_exchange(world, engine, rule, packing, overlaps=outer.overlap > 0)
    store = SourceStore(config.run_dir / "store", int(config.embedding.cache_gb * 1e9), world.device.type == "cuda")
    broker = EmbeddingBroker(config, world, store, sources.vocab_size, rule)
    state = RunState(config, world, sources, engine, exchange, broker, store)
    progress = RunProgress()
    if resume_from is not None:
        progress = state.restore(resume_from)
        if exchange is None:
            state.resume_flight(sources.trained[0], broker.resident)
        if world.is_writer:
            metrics.say(f"resuming from {resume_from.directory} at round {progress.round + 1}/{config.dept.rounds}")
            if told := changes_line(resume_from, sources):
                metrics.say(told)
            # Every silo has loaded its own by now: `restore` ends with all.
            if orphans := remove_newer(resume_from.directory):
                names = ", ".join(path.name for path in orphans)
                metrics.warn(f"removed {names} in {resume_from.directory.parent}: other silos do not have that save")
    else:
        if world.is_writer:
            store.clear()
        world.barrier()
        if start_from is not None:
            _load_embedding(config, broker, start_from)
    if world.is_writer:
        state.keep_vocabularies()
        with atomic_write(config.run_dir / "config.yaml", "w") as handle:
            handle.write(dump_config(config))
    stop = StopRequest(world.shared_store, polls=world.leads_silo)
    elastic: Elastic | None = None
    if joined is not None:
        elastic = Elastic(config, world, joined, engine, exchange, broker.tables, metrics, stop)  # type: ignore[arg-type]
    return Trainer(
        config=config,
        world=world,
        sources=sources,
        engine=engine,
        exchange=exchange,
        broker=broker,
        switch=SourceSwitch(sources, store, broker, InnerState(config.dept, world, engine.shards, store)),
        state=state,
        progress=progress,
        metrics=metrics,
        stop=stop,
        watch=watch or FailureWatch(None, Roster(0, ("the only rank",), keeps_store=False)),
        elastic=elastic,
    )


def set_threads(config: RunConfig, launch: Launch) -> None:
    """CPU threads of this rank: as configured, else its fair part of the machine's cores."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.training.threads_per_rank or max(1, cores // launch.local_world_size))


def _check_monitors(logging: LoggingConfig) -> None:
    """DeepSpeed's monitors need packages that an installation may lack."""
    for package, wanted in (("tensorboard", logging.tensorboard), ("wandb", logging.wandb)):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logging.{package} needs the package {package}, which is not installed; "
                f"pip install {package}, or set logging.{package}: false"
            )


def _adapt_start(config: RunConfig, sources: SourceSet) -> Checkpoint | None:
    """The checkpoint whose body an adapt run takes, checked against the configuration."""
    if config.adapt is None:
        return None
    checkpoint = Checkpoint.open(config.adapt.checkpoint)
    then, now = checkpoint.manifest["model"], config.model.model_dump()
    for field, value in now.items():
        if then.get(field) != value:
            raise CheckpointError(
                f"adapt.checkpoint {checkpoint.directory} has model.{field} {then.get(field)}, this run has {value}; "
                f"set model.{field}: {then.get(field)}"
            )
    rounds, done = checkpoint.manifest["trained_with"]["dept"]["rounds"], checkpoint.manifest["round"]
    if done < rounds and checkpoint.directory != config.adapt.checkpoint:
        raise CheckpointError(
            f"adapt.checkpoint {config.adapt.checkpoint} is a run at round {done} of {rounds}; finish it, or name the "
            f"checkpoint itself: {checkpoint.directory}"
        )
    if config.adapt.embedding == "own":
        if "token" not in checkpoint.index:
            raise ConfigError(
                f"adapt.embedding own: {checkpoint.directory} is of variant {checkpoint.manifest['variant']}, which "
                "has no global embedding to keep; set adapt.embedding: random"
            )
        trained_with = next(iter(checkpoint.manifest["sources"].values()))["tokenizer_fingerprint"]
        if trained_with != next(iter(sources.cards.values())).tokenizer_fingerprint:
            raise ConfigError(
                f"adapt.embedding own: {checkpoint.directory} was trained under another tokenizer than this run's "
                "sources; use the same data, or set adapt.embedding: random"
            )
    return checkpoint


def _load_embedding(config: RunConfig, broker: EmbeddingBroker, checkpoint: Checkpoint) -> None:
    assert config.adapt is not None
    if config.adapt.embedding == "own":
        broker.replace_resident(checkpoint.index)
