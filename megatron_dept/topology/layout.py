"""How a federation's ranks are cut into silos, and each silo into pipeline x data x tensor. Pure arithmetic.

Rank order, outermost first: silo, pipeline, data, tensor (inside a silo DeepSpeed's own order). Where all silos have
one shape, the ranks of one (pipeline, data, tensor) coordinate are *peers*: they hold the same part of the body.
"""

import itertools
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
class SiloShape:
    """A silo of pipe x data x tensor ranks; `zero_stage` cuts its body over the data ranks."""

    pipe: int
    data: int
    tensor: int
    zero_stage: int = 1

    @property
    def size(self) -> int:
        return self.pipe * self.data * self.tensor

    @property
    def embedding_ranks(self) -> int:
        """Ranks of the first stage: those that fetch and own embedding rows."""
        return self.data * self.tensor

    def rank(self, pipe: int, data: int, tensor: int) -> int:
        """The rank within the silo at a coordinate."""
        return (pipe * self.data + data) * self.tensor + tensor

    def coordinate(self, rank: int) -> tuple[int, int, int]:
        """(pipe, data, tensor) of a rank within the silo; the inverse of `rank`."""
        assert 0 <= rank < self.size
        pipe, within = divmod(rank, self.data * self.tensor)
        data, tensor = divmod(within, self.tensor)
        return pipe, data, tensor

    def __str__(self) -> str:
        return f"pipe {self.pipe} x data {self.data} x tensor {self.tensor}, ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class Layout:
    """A federation of silos; `shapes[s]` is silo s's."""

    shapes: tuple[SiloShape, ...]

    @classmethod
    def of_equal(cls, silos: int, pipe: int, data: int, tensor: int, zero_stage: int = 1) -> "Layout":
        """`silos` silos of one shape."""
        return cls((SiloShape(pipe, data, tensor, zero_stage),) * silos)

    @classmethod
    def cut(cls, parallel: ParallelConfig, world_size: int) -> "Layout":
        """The layout of `world_size` ranks of one launch; the data dimension takes what the others leave.

        Raises `ConfigError` where the ranks do not divide, naming the numbers that would.
        """
        if parallel.shapes is not None:
            shapes = tuple(
                SiloShape(
                    shape.pipeline_model_parallel_size,
                    shape.data_parallel_size,
                    shape.tensor_model_parallel_size,
                    parallel.zero_stage,
                )
                for shape in parallel.shapes
            )
            wanted = sum(shape.size for shape in shapes)
            if wanted != world_size:
                listed = ", ".join(str(shape.size) for shape in shapes)
                raise ConfigError(
                    f"parallel.shapes are silos of {listed} ranks, {wanted} in all, but {world_size} were launched; "
                    f"launch {wanted}, or change the shapes"
                )
            return cls(shapes)
        fixed = parallel.silos * parallel.pipeline_model_parallel_size * parallel.tensor_model_parallel_size
        if world_size % fixed:
            raise ConfigError(
                f"{world_size} ranks cannot be cut into parallel.silos {parallel.silos} x pipe "
                f"{parallel.pipeline_model_parallel_size} x tensor {parallel.tensor_model_parallel_size}; "
                f"launch a multiple of {fixed} ranks or set parallel.silos to a divisor of {world_size}"
            )
        return cls.of_equal(
            parallel.silos,
            parallel.pipeline_model_parallel_size,
            world_size // fixed,
            parallel.tensor_model_parallel_size,
            parallel.zero_stage,
        )

    @property
    def silos(self) -> int:
        return len(self.shapes)

    @property
    def equal(self) -> bool:
        """Whether all silos cut the body alike, so that every rank has a peer in every silo."""
        return len(set(self.shapes)) == 1

    @property
    def world_size(self) -> int:
        return sum(shape.size for shape in self.shapes)

    def offset(self, silo: int) -> int:
        """The federation rank of a silo's first rank."""
        return sum(shape.size for shape in self.shapes[:silo])

    def members(self, silo: int) -> tuple[int, ...]:
        """The federation ranks of a silo."""
        first = self.offset(silo)
        return tuple(range(first, first + self.shapes[silo].size))

    def coordinate(self, rank: int) -> Coordinate:
        """Where federation rank `rank` stands."""
        assert 0 <= rank < self.world_size
        for silo, shape in enumerate(self.shapes):
            if rank < shape.size:
                return Coordinate(silo, *shape.coordinate(rank))
            rank -= shape.size
        raise AssertionError("ranks are counted")

    def rank(self, place: Coordinate) -> int:
        """The federation rank at a coordinate; the inverse of `coordinate`."""
        return self.offset(place.silo) + self.shapes[place.silo].rank(place.pipe, place.data, place.tensor)

    def peers(self, place: Coordinate) -> tuple[int, ...]:
        """The ranks of the same coordinate in every silo, in silo order; silos must be equal."""
        assert self.equal
        return tuple(self.rank(Coordinate(silo, place.pipe, place.data, place.tensor)) for silo in range(self.silos))

    def embedding_ranks(self) -> tuple[int, ...]:
        """The first stages' ranks of all silos, silo by silo."""
        each = ((self.offset(silo), shape.embedding_ranks) for silo, shape in enumerate(self.shapes))
        return tuple(itertools.chain.from_iterable(range(first, first + count) for first, count in each))


def accumulation_steps(global_batch_size: int, micro_batch_size: int, data: int) -> int:
    """Micro-batches a rank runs per step; `ConfigError` where the batch does not divide."""
    steps, rest = divmod(global_batch_size, micro_batch_size * data)
    if rest or not steps:
        raise ConfigError(
            f"training.global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
            f"x {data} data-parallel ranks; set it to a multiple of {micro_batch_size * data}"
        )
    return steps
