"""Builds a run from its configuration and runs it: world, sources, body, engine, outer exchange, trainer."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.checkpoint.store import SourceStore
from megatron_dept.common.cli import explain_refusal
from megatron_dept.common.errors import CheckpointError, ConfigError, FederationError, UserError
from megatron_dept.common.files import atomic_write, write_json
from megatron_dept.config.load import dump_config
from megatron_dept.config.schema import LoggingConfig, RunConfig
from megatron_dept.dept.outer import OuterRule
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World, start_world
from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.models.build import build_body
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout, accumulation_steps
from megatron_dept.training.embeddings import EmbeddingBroker
from megatron_dept.training.inner_state import InnerState
from megatron_dept.training.metrics import Metrics
from megatron_dept.training.plan import build_plan
from megatron_dept.training.progress_state import RunProgress
from megatron_dept.training.resume import fingerprint, resume_point
from megatron_dept.training.signals import FailureWatch, StopRequest
from megatron_dept.training.sources import SourceSet
from megatron_dept.training.state import RunState
from megatron_dept.training.trainer import Trainer


def run(config: RunConfig, launch: Launch) -> bool:
    """Train `config` on this launch, from its last checkpoint where it has one. False where it was asked to stop.

    Raises `UserError`s for what the user can mend, before anything is written where it can be known before.
    """
    layout = Layout.cut(config.parallel, launch.world_size)
    accumulation_steps(config.training.global_batch_size, config.training.micro_batch_size, layout.data)
    _check_monitors(config.logging)
    sources = SourceSet(config)
    resume_from = resume_point(config, sources)
    start_from = _adapt_start(config, sources) if resume_from is None else None
    plan = build_plan(config, launch.world_size, sources) if launch.rank == 0 else None
    set_threads(config, launch)
    world = start_world(launch, layout, config.training.timeout_seconds)
    watch = FailureWatch(world.store, launch.rank)
    try:
        with _failures_told(config, watch):
            trainer = build_trainer(config, world, sources, start_from, resume_from)
            if plan is not None:
                write_json(config.run_dir / "plan.json", plan)
            finished = trainer.run()
            world.barrier()
    finally:
        watch.close()
    # Only after success: to leave a group whose peers have failed can take as long as they.
    if dist.is_initialized():
        dist.destroy_process_group()
    return finished


@contextmanager
def _failures_told(config: RunConfig, watch: FailureWatch) -> Iterator[None]:
    """Tell the other ranks of a failure, and say what the libraries' errors mean."""
    try:
        try:
            yield
        except Exception as error:
            watch.tell(" ".join(str(error).split())[:300])
            raise
    except OSError as error:
        refusal = explain_refusal(error)
        if error.filename is not None or refusal is None:
            raise
        # A write to an open file that is refused knows no name: logs, then, all of which are in one place.
        raise UserError(f"cannot write in {config.run_dir}: {refusal}") from error
    except RuntimeError as error:
        # Our own collectives say so themselves; these are DeepSpeed's, at start-up and inside a silo.
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise FederationError(
            f"lost another rank ({str(error).strip().splitlines()[0]}); look at that rank's log, then start again: "
            "the run resumes from its last checkpoint"
        ) from error


def build_trainer(
    config: RunConfig,
    world: World,
    sources: SourceSet,
    start_from: Checkpoint | None = None,
    resume_from: Checkpoint | None = None,
) -> Trainer:
    """Everything a run consists of, as `resume_from` holds it or at its start; collective.

    `start_from`: the checkpoint whose body an adapt run begins with.
    """
    metrics = Metrics(config.run_dir, world.place.silo, world.leads_silo)
    body = build_body(config.model, config.seed, config.training.activation_checkpointing)
    if start_from is not None:
        _load_body(body, start_from)
    engine = SiloEngine(config, body, world)
    variant = VARIANTS[config.dept.variant]
    outer = config.dept.outer
    rule = OuterRule(outer.optimizer, outer.learning_rate, outer.momentum)
    exchange = BodyExchange(world.peers, engine.shards.read(), rule) if variant.averages_body else None
    store = SourceStore(config.run_dir / "store")
    broker = EmbeddingBroker(config, world, store, sources.vocab_size, rule)
    state = RunState(config, world, sources, engine, exchange, broker, store)
    progress = RunProgress()
    if resume_from is not None:
        progress = state.restore(resume_from)
        if broker.resident is not None:
            state.resume_flight(sources.trained[0], broker.resident)
        if world.is_writer:
            metrics.say(f"resuming from {resume_from.directory} at round {progress.round + 1}/{config.dept.rounds}")
    else:
        if world.is_writer:
            store.clear()
        world.barrier()
        if start_from is not None:
            _load_embedding(config, broker, start_from)
    if world.is_writer:
        with atomic_write(config.run_dir / "config.yaml", "w") as handle:
            handle.write(dump_config(config))
    return Trainer(
        config=config,
        world=world,
        sources=sources,
        engine=engine,
        exchange=exchange,
        broker=broker,
        inner=InnerState(config.dept, world, engine.shards, store),
        state=state,
        progress=progress,
        metrics=metrics,
        stop=StopRequest(world.store, polls=world.leads_silo),
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
        if trained_with != fingerprint(next(iter(sources.directories.values()))):
            raise ConfigError(
                f"adapt.embedding own: {checkpoint.directory} was trained under another tokenizer than this run's "
                "sources; use the same data, or set adapt.embedding: random"
            )
    return checkpoint


def _load_body(body: nn.Module, checkpoint: Checkpoint) -> None:
    """The checkpoint's body into a module of the same configuration."""
    body.load_state_dict(checkpoint.body())


def _load_embedding(config: RunConfig, broker: EmbeddingBroker, checkpoint: Checkpoint) -> None:
    assert config.adapt is not None
    if config.adapt.embedding == "own":
        broker.replace_resident(checkpoint.index.read("token"), checkpoint.position_table())
