"""How a planned run is cut over ranks, and which elements of the body a rank then holds: closed form.

Letters: S silos, P stages, D data ranks, T tensor ranks; h hidden, f ffn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import ValidationError

from megatron_dept.common.errors import ConfigError
from megatron_dept.common.sizes import FP32_BYTES
from megatron_dept.config.schema import ModelConfig, ParallelConfig
from megatron_dept.federation.shares import Packing
from megatron_dept.models.flops import head_flops_per_token, layer_flops_per_token
from megatron_dept.models.pipeline import stage_layers
from megatron_dept.ops.wires import Wire

ALIGNMENT = 2
"""ZeRO 1 and 2 pad the flat body to this many elements a data rank (DeepSpeed's nccl_start_alignment_factor)."""


@dataclass(frozen=True)
class Cut:
    """S silos of P x D x T ranks, and what they compute at once. `precision`: fp32 or bf16."""

    silos: int
    pipe: int = 1
    data: int = 1
    tensor: int = 1
    zero_stage: int = 1
    precision: str = "bf16"
    sequence_parallel: bool = False
    activation_checkpointing: bool = False
    micro_batch: int = 1
    global_batch: int = 1
    loss_chunk_tokens: int = 256
    optimizer_moments: int = 2
    """Of the inner optimizer: AdamW's two, or none."""
    offload_optimizer: bool = False
    """Masters and moments are in host memory."""
    rows_on_disk: bool = False
    """Shared tables lie in mapped files, not in host memory."""
    separate: bool = False
    """Silos are launches of their own: each has all rows of shared tables and the whole outer momentum."""
    overlap: int = 0
    """Inner steps of the next round during which the body's outer exchange may still run."""
    wire: Wire = "fp32"
    """What travels in the outer exchange, in buckets of so many MB."""
    bucket_mb: float = Packing.bucket_mb
    turns: int = 1
    """Sources that a silo trains one after another in a round."""
    all_ranks: int | None = None
    """Of all silos, where they are cut differently; else S P D T."""
    all_embedding_ranks: int | None = None
    """Of all silos' first stages, where they are cut differently; else S D T."""

    @property
    def silo_size(self) -> int:
        return self.pipe * self.data * self.tensor

    @property
    def row_owners(self) -> int:
        """Ranks that a shared table's rows are spread over."""
        silos = 1 if self.separate else self.silos
        return self.all_embedding_ranks or silos * self.data * self.tensor

    @property
    def micro_batches(self) -> int:
        """Micro-batches a data rank runs per step."""
        return self.global_batch // (self.micro_batch * self.data)

    @property
    def width(self) -> int:
        """Bytes of a value in the compute precision."""
        return 2 if self.precision == "bf16" else FP32_BYTES


def check_cut(model: ModelConfig, cut: Cut) -> None:
    """`ConfigError` naming the numbers where a run could not be cut so, as its configuration would be refused."""
    try:
        parallel = ParallelConfig(
            silos=cut.silos,
            tensor_model_parallel_size=cut.tensor,
            pipeline_model_parallel_size=cut.pipe,
            sequence_parallel=cut.sequence_parallel,
            zero_stage=cut.zero_stage,
            offload_optimizer=cut.offload_optimizer,
        )
        parallel.check_model(model)
    except ValidationError as error:
        raise ConfigError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if cut.precision == "bf16" and cut.zero_stage == 0:
        raise ConfigError("precision bf16 with ZeRO stage 0 is refused; choose stage 1")
    if cut.global_batch % (cut.micro_batch * cut.data) or not cut.micro_batches:
        raise ConfigError(
            f"global batch {cut.global_batch} is not a multiple of micro-batch {cut.micro_batch} x {cut.data} data "
            f"ranks; set it to a multiple of {cut.micro_batch * cut.data}"
        )


def layers_of_stages(model: ModelConfig, cut: Cut, rows: int) -> list[int]:
    """Layers of each stage, balanced with a head of `rows` rows on the last."""
    return [len(layers) for layers in stage_layers(model, cut.pipe, rows)]


def flops_of_stages(model: ModelConfig, cut: Cut, rows: int) -> list[float]:
    """Operations of each stage for one token, of all its tensor ranks; checkpointing computes forwards again.

    `models.flops`' count (PaLM's): forward 1 part in 3, so recomputation adds a third.
    """
    again = 4 / 3 if cut.activation_checkpointing else 1.0
    stages = [layers * layer_flops_per_token(model) * again for layers in layers_of_stages(model, cut, rows)]
    stages[-1] += head_flops_per_token(model, rows)
    return stages


def parameters_of_rank(model: ModelConfig, tensor: int, layers: int, final_norm: bool) -> list[int]:
    """Elements of each parameter that one of `tensor` ranks holds of `layers` layers (and of the final norm).

    Matrices are cut by heads and by rows of the MLP; norms and the biases of row-parallel matrices stand on every
    rank, and where there are fewer key-value heads than ranks, so do copies of those.
    """
    h, f = model.hidden_size, model.ffn_size // tensor
    heads = model.num_attention_heads // tensor
    attended = heads * model.head_size
    qkv = (heads + 2 * max(1, model.kv_heads // tensor)) * model.head_size
    if model.family == "llama":
        layer = [h, qkv * h, attended * h, h, f * h, f * h, f * h]
        norm = [h]
    else:
        layer = [h, h, qkv * h, qkv, attended * h, h, h, h, f * h, f, f * h, h]
        norm = [h, h]
    return layer * layers + (norm if final_norm else [])


def copied_parameters(model: ModelConfig, layers: int, final_norm: bool) -> int:
    """Elements that every tensor rank holds whole: norms, and the biases of row-parallel matrices."""
    each, last = (2, 1) if model.family == "llama" else (6, 2)
    return model.hidden_size * (each * layers + last * final_norm)


class OverData(Protocol):
    """What says how ZeRO cuts a body: a `Cut`, or a silo's shape."""

    @property
    def data(self) -> int: ...

    @property
    def zero_stage(self) -> int: ...


def partition(sizes: Sequence[int], cut: OverData) -> int:
    """Elements of one data rank's fp32 partition of parameters of these sizes, padding included.

    ZeRO 3 cuts each parameter by itself, the others all of them laid end to end.
    """
    if cut.zero_stage == 3:
        return sum(-(-size // cut.data) for size in sizes)
    step = cut.data * (ALIGNMENT if cut.zero_stage else 1)
    return -(-sum(sizes) // step) * step // cut.data


def partition_ranges(sizes: Sequence[int], cut: OverData, rank: int) -> list[range]:
    """Which elements of each parameter lie in the partition of data rank `rank`."""
    part, begin, found = partition(sizes, cut), 0, []
    for size in sizes:
        low, high = rank * part - begin, (rank + 1) * part - begin
        if cut.zero_stage == 3:
            each = -(-size // cut.data)
            low, high = rank * each, (rank + 1) * each
        start = min(max(low, 0), size)
        found.append(range(start, max(start, min(high, size))))
        begin += size
    return found


def share(elements: int, silos: int) -> int:
    """Elements of a partition that each silo owns in the outer exchange, padded to divide."""
    return -(-elements // silos)
