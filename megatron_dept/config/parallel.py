"""The configuration of ranks: how a launch is cut, and how silos that are launches of their own meet."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_dept.config.model import ModelConfig, Section

FederationBackend = Literal["gloo", "mpi"]


class SiloShapeConfig(Section):
    """One silo of `parallel.shapes`: how many ranks of each kind it has."""

    tensor_model_parallel_size: int = Field(1, gt=0)
    pipeline_model_parallel_size: int = Field(1, gt=0)
    data_parallel_size: int = Field(1, gt=0)


class ParallelConfig(Section):
    """How the launch's ranks are cut: silos x pipeline x data x tensor."""

    silos: int = Field(1, gt=0)
    tensor_model_parallel_size: int = Field(1, gt=0)
    pipeline_model_parallel_size: int = Field(1, gt=0)
    sequence_parallel: bool = Field(False, description="Megatron's: norms and residuals cut along the sequence too")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="with a pipeline: 0 or 1")
    offload_optimizer: bool = Field(False, description="fp32 masters and moments of the body in host memory")
    shapes: tuple[SiloShapeConfig, ...] | None = Field(
        None, min_length=2, description="silos of different shapes, one entry each; instead of the sizes above"
    )

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.shapes is not None:
            if self.silos not in (1, len(self.shapes)):
                raise ValueError(
                    f"silos {self.silos} and {len(self.shapes)} shapes contradict each other; remove silos"
                )
            for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
                if getattr(self, name) != 1:
                    raise ValueError(f"{name} {getattr(self, name)} beside shapes; set it in each entry of shapes")
            object.__setattr__(self, "silos", len(self.shapes))
        for shape in self._all_shapes():
            if shape.pipeline_model_parallel_size > 1 and self.zero_stage > 1:
                raise ValueError(
                    f"zero_stage {self.zero_stage} with pipeline_model_parallel_size "
                    f"{shape.pipeline_model_parallel_size}: DeepSpeed's pipelines work with ZeRO 0 and 1; "
                    "set zero_stage: 1, or pipeline_model_parallel_size: 1"
                )
        if self.sequence_parallel and all(shape.tensor_model_parallel_size == 1 for shape in self._all_shapes()):
            raise ValueError(
                "sequence_parallel cuts the sequence over tensor ranks; set tensor_model_parallel_size above 1"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs ZeRO; set zero_stage: 1, 2 or 3")
        if self.offload_optimizer and any(shape.pipeline_model_parallel_size > 1 for shape in self._all_shapes()):
            raise ValueError("offload_optimizer does not work with a pipeline; set pipeline_model_parallel_size: 1")
        return self

    def _all_shapes(self) -> tuple[SiloShapeConfig, ...]:
        if self.shapes is not None:
            return self.shapes
        return (
            SiloShapeConfig(
                tensor_model_parallel_size=self.tensor_model_parallel_size,
                pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            ),
        )

    @property
    def most_tensor_ranks(self) -> int:
        """Of any silo of this launch."""
        return max(shape.tensor_model_parallel_size for shape in self._all_shapes())

    def check_model(self, model: ModelConfig) -> None:
        """`ValueError` naming the numbers where the body of `model` cannot be cut this way."""
        for shape in self._all_shapes():
            tensor, pipe = shape.tensor_model_parallel_size, shape.pipeline_model_parallel_size
            heads, groups = model.num_attention_heads, model.kv_heads
            for name, value in (("num_attention_heads", heads), ("ffn_hidden_size", model.ffn_size)):
                if value % tensor:
                    raise ValueError(
                        f"model.{name} {value} is not divisible by tensor_model_parallel_size {tensor}; "
                        "set one to a divisor or multiple of the other"
                    )
            if groups % tensor and tensor % groups:
                raise ValueError(
                    f"model.num_key_value_heads {groups} and tensor_model_parallel_size {tensor}: neither divides the "
                    "other; set num_key_value_heads to a divisor or a multiple"
                )
            if self.sequence_parallel and model.seq_length % tensor:
                raise ValueError(
                    f"model.seq_length {model.seq_length} is not divisible by tensor_model_parallel_size {tensor}, "
                    "which sequence_parallel cuts it over; set seq_length to a multiple"
                )
            if model.num_layers < max(1, pipe - 1):
                raise ValueError(
                    f"model.num_layers {model.num_layers} cannot fill pipeline_model_parallel_size {pipe} (every stage "
                    f"but the last needs one); set it to at most {model.num_layers + 1}"
                )


class FederationConfig(Section):
    """How silos talk to one another, and where, if each of them is a launch of its own."""

    backend: FederationBackend = Field("gloo", description="transport between silos; mpi: mpi4py, under mpirun")
    address: str | None = Field(
        None, pattern=r"^[^:\s]+:\d+$", description="host:port where silos that are separate launches meet"
    )
    silo: int | None = Field(None, ge=0, description="which silo this launch is")
    silos: int | None = Field(None, gt=1, description="how many launches there are")
    serve: bool | None = Field(
        None, description="whether this launch's first rank listens at address; default: silo 0 does"
    )
    token_file: Path | None = Field(None, description="file with the secret that all silos share")
    join_timeout_seconds: float = Field(600.0, gt=0, description="how long silos wait for one another at the start")
    on_silo_loss: Literal["stop", "continue"] = Field(
        "stop",
        description="continue: the other silos go on, and the lost one may join again; what is asked to stop (SIGTERM) "
        "leaves without saving the round in progress",
    )
    straggler_factor: float = Field(
        3.0, ge=1, description="continue: a silo is waited for up to so many times the measured length of a round"
    )
    straggler_minimum_seconds: float = Field(
        60.0, gt=0, description="continue: ... but at least so long; before a round was measured, join_timeout_seconds"
    )

    @property
    def separate(self) -> bool:
        """Whether each silo is a launch of its own."""
        return self.address is not None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not self.separate:
            for name in ("silo", "silos", "serve", "token_file"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for silos that are separate launches; set address too, or remove it")
            if self.on_silo_loss == "continue":
                raise ValueError(
                    "on_silo_loss continue needs silos that are separate launches: ranks of one launch end together; "
                    "set address, silo and silos, or on_silo_loss: stop"
                )
            return self
        for name in ("silo", "silos", "token_file"):
            if getattr(self, name) is None:
                raise ValueError(f"address is set, so {name} must be too")
        assert self.silo is not None and self.silos is not None
        if self.silo >= self.silos:
            raise ValueError(f"silo {self.silo} is not below silos {self.silos}; count from 0")
        if self.backend == "mpi":
            raise ValueError("backend mpi joins the silos of one mpirun; separate launches need backend: gloo")
        return self
