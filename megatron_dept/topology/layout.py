"""How a launch's ranks are cut into silos, and each silo into pipeline x data x tensor. Pure arithmetic.

Rank order, outermost first: silo, pipeline, data, tensor (inside a silo DeepSpeed's own order). Ranks of one
(pipeline, data, tensor) coordinate in all silos are *peers*: they hold the same part of the body.
"""

from dataclasses import dataclass

from megatron_dept.common.errors import ConfigError
from megatron_dept.config.schema import ParallelConfig


@dataclass(frozen=True)
class Coordinate:
    """A rank's place: which silo, and where in it."""

    silo: int
    pipe: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """A world of silos x pipe x data x tensor ranks."""

    silos: int
    pipe: int
    data: int
    tensor: int

    @classmethod
    def cut(cls, parallel: ParallelConfig, world_size: int) -> "Layout":
        """The layout of `world_size` ranks; the data dimension takes what the others leave.

        Raises `ConfigError` where the ranks do not divide, naming the numbers that would.
        """
        fixed = parallel.silos * parallel.pipeline_model_parallel_size * parallel.tensor_model_parallel_size
        if world_size % fixed:
            raise ConfigError(
                f"{world_size} ranks cannot be cut into parallel.silos {parallel.silos} x pipe "
                f"{parallel.pipeline_model_parallel_size} x tensor {parallel.tensor_model_parallel_size}; "
                f"launch a multiple of {fixed} ranks or set parallel.silos to a divisor of {world_size}"
            )
        return cls(
            silos=parallel.silos,
            pipe=parallel.pipeline_model_parallel_size,
            data=world_size // fixed,
            tensor=parallel.tensor_model_parallel_size,
        )

    @property
    def silo_size(self) -> int:
        return self.pipe * self.data * self.tensor

    @property
    def world_size(self) -> int:
        return self.silos * self.silo_size

    def coordinate(self, rank: int) -> Coordinate:
        """Where launch rank `rank` stands."""
        assert 0 <= rank < self.world_size
        silo, within = divmod(rank, self.silo_size)
        pipe, within = divmod(within, self.data * self.tensor)
        data, tensor = divmod(within, self.tensor)
        return Coordinate(silo, pipe, data, tensor)

    def rank(self, place: Coordinate) -> int:
        """The launch rank at a coordinate; the inverse of `coordinate`."""
        return ((place.silo * self.pipe + place.pipe) * self.data + place.data) * self.tensor + place.tensor

    def peers(self, rank: int) -> tuple[int, ...]:
        """The ranks of the same coordinate in every silo, in silo order, `rank` itself among them."""
        return tuple(silo * self.silo_size + rank % self.silo_size for silo in range(self.silos))


def accumulation_steps(global_batch_size: int, micro_batch_size: int, data: int) -> int:
    """Micro-batches a rank runs per step; `ConfigError` where the batch does not divide."""
    steps, rest = divmod(global_batch_size, micro_batch_size * data)
    if rest or not steps:
        raise ConfigError(
            f"training.global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
            f"x {data} data-parallel ranks; set it to a multiple of {micro_batch_size * data}"
        )
    return steps
