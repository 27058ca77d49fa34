"""What a run is: every field of the configuration, its type, its default and its meaning.

Fields keep Megatron's names for Megatron's things. Unknown fields are errors. Nothing here reads files, ranks or
torch: `config.load` reads, `topology` places, `training.setup` builds.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_dept.config.model import ModelConfig, Section
from megatron_dept.config.parallel import FederationConfig, ParallelConfig

Variant = Literal["glob", "trim", "spec", "spec_opt", "std", "act"]


class SourceConfig(Section):
    """One data source: a language or a domain."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="used in file names and logs")
    data: Path | None = Field(None, description="dataset directory under the global tokenizer")
    own_data: Path | None = Field(None, description="dataset directory under the source's own tokenizer (spec_opt)")
    home: int | None = Field(
        None, ge=0, description="silo that alone trains it; where silos are separate launches its data is there only"
    )


class OuterConfig(Section):
    """The outer optimizer, which turns the averaged delta into the next global body."""

    optimizer: Literal["fedavg", "nesterov"] = "fedavg"
    learning_rate: float = Field(1.0, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="nesterov only; DiLoCo uses 0.9 with learning_rate 0.7")
    overlap: int = Field(
        0, ge=0, description="inner steps of the next round during which the exchange may still run; 0: none"
    )
    wire: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="what the body's deltas and updates travel as between silos; int8 with error feedback"
    )
    bucket_mb: float = Field(
        32.0,
        gt=0,
        description="MB of fp32 deltas packed, sent and unpacked at once, beside others; no number depends on it",
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.optimizer == "fedavg" and self.momentum:
            raise ValueError(
                f"outer.momentum {self.momentum} needs outer.optimizer nesterov; set it, or remove the momentum"
            )
        return self


class DeptConfig(Section):
    """Which variant trains, and the shape of its rounds (DEPT paper, algorithm 1)."""

    variant: Variant = "glob"
    rounds: int = Field(2, gt=0, description="T in the paper; for std and act: cycles of n_local steps")
    n_local: int = Field(10, gt=0, description="inner steps a source trains in a round (N_local)")
    sources_per_round: int | None = Field(None, gt=0, description="sources sampled a round; default: all")
    inner_state: Literal["reset", "keep"] = Field("reset", description="inner optimizer state at a round's start")
    outer: OuterConfig = OuterConfig()
    std_tau: float = Field(1.0, ge=0, description="std, act: a source is drawn with probability ~ tokens ** tau")
    on_bad_steps: Literal["stop", "drop"] = Field(
        "stop", description="past max_bad_steps in a round: stop the run, or leave that source's delta out of the round"
    )
    max_bad_steps: int = Field(5, ge=0, description="skipped steps (non-finite gradient) of a source in a round")

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        overlap = self.outer.overlap
        if overlap and self.synchronous:
            raise ValueError(
                f"outer.overlap {overlap}: variant {self.variant} is synchronous and has no exchange between rounds; "
                "set outer.overlap: 0"
            )
        if overlap > self.n_local:
            raise ValueError(
                f"outer.overlap {overlap} exceeds the n_local {self.n_local} steps of a round, within which an "
                f"exchange must end; set it to at most {self.n_local}"
            )
        return self

    @property
    def synchronous(self) -> bool:
        """std and act train one blended stream on one silo and have no outer exchange."""
        return self.variant in ("std", "act")


class OptimizerConfig(Section):
    """Inner AdamW of body and embedding, and the one continuous schedule (warm-up once, cosine over all steps)."""

    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd: plain, for exact comparisons")
    learning_rate: float = Field(6e-4, gt=0, description="eta_max")
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="one norm over body and embedding; 0: no clipping")


class TrainingConfig(Section):
    """Batch, precision and what is done beside the steps."""

    micro_batch_size: int = Field(4, gt=0, description="sequences a rank computes at once")
    global_batch_size: int = Field(8, gt=0, description="sequences a silo trains a step")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    loss_chunk_tokens: int = Field(256, gt=0, description="tokens whose logits exist at once in the loss")
    threads_per_rank: int | None = Field(None, gt=0, description="CPU threads; default: cores / local ranks")
    timeout_seconds: float = Field(
        3600.0, gt=0, description="a collective waiting longer ends the run; silos wait for the slowest of them"
    )

    @field_validator("precision")
    @classmethod
    def _no_fp16(cls, value: str) -> str:
        if value == "fp16":
            raise ValueError(
                "precision fp16 is refused (its loss scaling is not averaged over silos); choose bf16 or fp32"
            )
        return value


class AdaptConfig(Section):
    """Continued pre-training of a body with one global vocabulary (DEPT paper: both its protocols)."""

    checkpoint: Path = Field(description="run or checkpoint directory whose body is taken")
    embedding: Literal["random", "own"] = Field(
        "random", description="random: new table, full learning rate; own: the checkpoint's global table, half of it"
    )


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    save_interval: int = Field(1, ge=0, description="0: only at the end and on SIGTERM")
    save_interval_unit: Literal["rounds", "steps"] = "rounds"
    keep_last: int = Field(2, gt=0)


class EmbeddingConfig(Section):
    """Where embeddings are kept that are not in training, and how shared rows travel."""

    row_table: Literal["host", "disk"] = Field(
        "host", description="a rank's share of the shared tables: in memory (pinned beside a GPU), or in mapped files"
    )
    directory: Path | None = Field(
        None, description="row_table disk: where the mapped files lie, best a node's own disk; default: run_dir/tables"
    )
    wire: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of shared rows and their deltas on their way; tables, sums and steps stay fp32"
    )
    cache_gb: float = Field(
        0.0, ge=0, description="host memory of a rank for sources' own tables written or read last; 0: always from disk"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.directory is not None and self.row_table != "disk":
            raise ValueError(
                f"embedding.directory {self.directory} needs embedding.row_table disk; set it, or remove the directory"
            )
        return self


class EvaluationConfig(Section):
    """Validation during training, on every source's held-out split."""

    interval_rounds: int = Field(1, ge=0, description="0: never")
    max_tokens: int = Field(20_000, gt=0, description="held-out tokens a source is scored on")


class LoggingConfig(Section):
    """Logs and DeepSpeed's monitors."""

    interval_steps: int = Field(1, gt=0)
    norm_interval_steps: int = Field(10, gt=0, description="activation and parameter norms every so many steps")
    tensorboard: bool = False
    wandb: bool = False
    csv: bool = False
    peak_tflops: float | None = Field(None, gt=0, description="per device, for MFU; default: datasheet or measured")


class RunConfig(Section):
    """One run of `pretrain_dept.py`."""

    run_dir: Path
    seed: int = 1234
    phase: Literal["pretrain", "adapt"] = "pretrain"
    model: ModelConfig = ModelConfig()
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    tokenizer: Path | None = Field(None, description="the global tokenizer; checked against every source's data")
    dept: DeptConfig = DeptConfig()
    parallel: ParallelConfig = ParallelConfig()
    federation: FederationConfig = FederationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    adapt: AdaptConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources: names {names} are not distinct; give each source a name of its own")
        field = self.data_field
        for source in self.sources:
            if getattr(source, field) is None and self.is_at_home(source):
                raise ValueError(
                    f"sources: {source.name} has no {field}, which variant {self.dept.variant} trains on; "
                    "set it to the source's dataset directory"
                )
        if self.phase == "adapt" and self.adapt is None:
            raise ValueError("phase adapt needs the section adapt with the checkpoint to start from")
        if self.phase == "pretrain" and self.adapt is not None:
            raise ValueError("the section adapt needs phase: adapt; set it, or remove the section")
        if self.phase == "adapt" and self.dept.variant != "std":
            raise ValueError(
                f"phase adapt trains one global vocabulary: dept.variant must be std, not {self.dept.variant}"
            )
        if self.dept.synchronous and self.parallel.silos != 1:
            raise ValueError(
                f"variant {self.dept.variant} is synchronous: parallel.silos must be 1, not {self.parallel.silos}"
            )
        if self.dept.synchronous and self.dept.on_bad_steps == "drop":
            raise ValueError(
                f"dept.on_bad_steps drop leaves a source's delta out of a round, and variant {self.dept.variant} has "
                "none; set dept.on_bad_steps: stop"
            )
        sampled = self.dept.sources_per_round
        if sampled is not None and sampled > len(self.sources):
            raise ValueError(
                f"dept.sources_per_round {sampled} exceeds the {len(self.sources)} sources; set it to at most that"
            )
        self._check_overlap()
        self._check_wire()
        self._check_homes()
        self.parallel.check_model(self.model)
        if self.training.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError("precision bf16 with parallel.zero_stage 0 is refused; set parallel.zero_stage: 1")
        if self.training.global_batch_size % self.training.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size {self.training.global_batch_size} is not divisible by "
                f"training.micro_batch_size {self.training.micro_batch_size}; set it to a multiple"
            )
        return self

    def _check_overlap(self) -> None:
        overlap, federation = self.dept.outer.overlap, self.federation
        if overlap and federation.on_silo_loss == "continue":
            raise ValueError(
                f"dept.outer.overlap {overlap} with federation.on_silo_loss continue: the silos vote on a round's step "
                "before anyone trains on; set dept.outer.overlap: 0, or federation.on_silo_loss: stop"
            )
        if overlap and federation.backend == "mpi":
            raise ValueError(
                f"dept.outer.overlap {overlap} with federation.backend mpi: an MPI library may not let two threads "
                "communicate at once; set federation.backend: gloo, or dept.outer.overlap: 0"
            )

    def _check_wire(self) -> None:
        wire, shapes = self.dept.outer.wire, self.parallel.shapes
        if self.dept.synchronous or wire == "fp32":
            return
        if shapes is not None and len(set(shapes)) > 1:
            raise ValueError(
                f"dept.outer.wire {wire} with silos of different parallel.shapes: elements that go by their names "
                "travel as fp32; set dept.outer.wire: fp32, or give all silos one shape"
            )
        if wire == "int8" and self.parallel.most_tensor_ranks > 1:
            raise ValueError(
                "dept.outer.wire int8 with tensor_model_parallel_size "
                f"{self.parallel.most_tensor_ranks}: tensor ranks hold copies of norms and biases, which would lie in "
                "different blocks and drift apart; set dept.outer.wire: bf16"
            )

    def _check_homes(self) -> None:
        federation = self.federation
        if federation.on_silo_loss == "continue" and self.checkpoint.save_interval_unit == "steps":
            raise ValueError(
                "checkpoint.save_interval_unit steps with federation.on_silo_loss continue: silos that train without "
                "one another share no step to save at; set checkpoint.save_interval_unit: rounds"
            )
        if federation.separate and self.checkpoint.keep_last == 1:
            raise ValueError(
                "checkpoint.keep_last 1 with federation.address: silos that end within a save have only the one before "
                "in common; set checkpoint.keep_last: 2, or more"
            )
        silos = federation.silos or self.parallel.silos
        homes = [source.home for source in self.sources]
        if federation.separate:
            if self.parallel.shapes is not None:
                raise ValueError(
                    "parallel.shapes are silos of one launch: with federation.address every launch is one silo; set "
                    "this launch's sizes instead"
                )
            if self.parallel.silos != 1:
                raise ValueError(
                    f"parallel.silos {self.parallel.silos}: with federation.address every launch is one silo; remove it"
                )
            if self.dept.synchronous:
                raise ValueError(f"variant {self.dept.variant} trains one silo; remove federation.address")
            if federation.silo not in homes:
                raise ValueError(
                    f"no source has home {federation.silo}, the silo that this launch is; give each silo a source"
                )
        if None in homes and (federation.separate or set(homes) != {None}):
            nameless = [source.name for source in self.sources if source.home is None]
            raise ValueError(
                f"sources: {', '.join(nameless)} have no home, the others have; give each the silo it is in"
            )
        for source in self.sources:
            if source.home is not None and source.home >= silos:
                raise ValueError(f"sources: {source.name} has home {source.home}, but there are {silos} silos")

    def is_at_home(self, source: SourceConfig) -> bool:
        """Whether this launch has a source's data: every source's but where silos are separate launches."""
        return not self.federation.separate or source.home == self.federation.silo

    @property
    def homes(self) -> dict[str, int] | None:
        """The silo of each source, or None where a source may train on any."""
        if self.sources[0].home is None:
            return None
        return {source.name: source.home for source in self.sources if source.home is not None}

    @property
    def data_field(self) -> Literal["data", "own_data"]:
        """Which dataset of a source this run trains on."""
        return "own_data" if self.dept.variant == "spec_opt" else "data"

    @property
    def total_steps(self) -> int:
        """Sequential inner steps of the run."""
        return self.dept.rounds * self.dept.n_local
