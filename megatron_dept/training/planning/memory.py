"""Memory of one rank by part, in bytes. Shapes: b micro-batch, s sequence, h hidden, f ffn, v rows of a source."""

from dataclasses import asdict, dataclass

from megatron_dept.common.sizes import FP32_BYTES, LARGEST_BUCKET, PENDING_ON_DISK
from megatron_dept.config.schema import ModelConfig, Variant
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.federation.shares import Shares, ring_bytes
from megatron_dept.models.flops import body_parameters
from megatron_dept.training.planning.cut import (
    Cut,
    layers_of_stages,
    parameters_of_rank,
    partition,
    partition_ranges,
    share,
)

PERSISTED_ELEMENTS = 100_000
"""Parameters of so many elements at most stay whole under ZeRO 3 (DeepSpeed's stage3_param_persistence_threshold)."""


COUNT_BYTES = 4
"""How many sources hold a row: int32."""
ROWS = ("row_table", "row_deltas", "row_files")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    `host` (an offloaded optimizer), `row_table` and `row_deltas` are host memory, `row_files` disk space, the rest is
    the device's.
    """

    weights: int
    gathered: int
    gradients: int
    buckets: int
    masters: int
    moments: int
    outer: int
    embedding: int
    activations: int
    logits: int
    host: int
    row_table: int
    row_deltas: int
    row_files: int

    @property
    def device(self) -> int:
        return sum(asdict(self).values()) - self.host - self.row_table - self.row_deltas - self.row_files


def memory_of_rank(
    model: ModelConfig, cut: Cut, variant: Variant, rows: int, vocabulary: int, stage: int, momentum: bool = False
) -> Memory:
    """Memory of a rank of pipeline stage `stage`, tensor rank 0, that trains a source of `rows` embedding rows.

    `vocabulary`: rows of the global table; `momentum`: whether the outer optimizer has one.

    - weights: width x held (ZeRO 0 to 2) or x partition (3), where small parameters stay whole too; gathered: the
      two layers and a parameter there that are used or fetched ahead (`engine.silo_engine` asks for two). buckets: its
      reduction buffer, fp32 and as large as the body up to a limit. gradients: fp32, in which micro-batches are summed,
      x held (0, 1) or x partition (2, 3). masters: 4 x partition under ZeRO. moments: 8 x partition (x held under ZeRO
      0) with AdamW. host: these where the optimizer is offloaded (`_optimizer`).
    - outer: see `outer_bytes`. row_table, row_deltas, row_files: see `_rows`.
    - embedding: fp32 table, gradient, moments, the round's start where rows are shared, and the copy in compute
      precision; first and last stage have it, the position table is the first stage's.
    """
    layers = layers_of_stages(model, cut, rows)
    first, last = stage == 0, stage == cut.pipe - 1
    sizes = parameters_of_rank(model, cut.tensor, layers[stage], last)
    held, part = sum(sizes), partition(sizes, cut)
    rule = VARIANTS[variant]
    shared = rule.token_rows == "shared"
    outer = outer_bytes(model, cut, part, momentum) if rule.averages_body else 0
    positions = model.seq_length if model.has_position_table else 0
    table = (-(-rows // cut.tensor) * (first or last) + positions * first) * model.hidden_size
    copy = cut.width if cut.width < FP32_BYTES else 0
    owned = (-(-vocabulary // cut.row_owners) + -(-positions // cut.row_owners)) * first
    sharded = cut.zero_stage == 3
    small = sum(size for size in sizes if size <= PERSISTED_ELEMENTS) if sharded else 0
    return Memory(
        weights=cut.width * (part + small if sharded else held),
        gathered=cut.width * min(held, 2 * -(-held // model.num_layers) + max(sizes)) if sharded else 0,
        **_optimizer(cut, sizes),
        outer=outer,
        embedding=table * (FP32_BYTES * (2 + cut.optimizer_moments + shared) + copy),
        activations=activation_bytes(model, cut, layers[stage], stage),
        logits=FP32_BYTES * min(cut.loss_chunk_tokens, cut.micro_batch * model.seq_length) * -(-rows // cut.tensor)
        if last
        else 0,
        **(_rows(cut, owned, model.hidden_size, momentum) if shared else dict.fromkeys(ROWS, 0)),
    )


def _rows(cut: Cut, owned: int, hidden: int, momentum: bool) -> dict[str, int]:
    """What a rank that owns `owned` rows of shared tables keeps of them.

    Values and outer momentum, and how many sources have held each row. Of the deltas of the round under way what has
    come waits as it came while it is less than a table of sums, and is added up in one before it is more; on disk such
    a table's room is part of the files', and a limited part waits in memory.
    """
    table = FP32_BYTES * owned * hidden
    kept, counts = table * (1 + momentum), COUNT_BYTES * owned
    if cut.rows_on_disk:
        return {
            "row_table": counts,
            "row_deltas": min(table, PENDING_ON_DISK),
            "row_files": kept + table,
        }
    return {"row_table": kept + counts, "row_deltas": table, "row_files": 0}


def outer_bytes(model: ModelConfig, cut: Cut, part: int, momentum: bool) -> int:
    """Bytes that the outer exchange of a partition of `part` elements keeps while a rank trains.

    The round's start, this silo's share of the momentum (all of it where silos are launches of their own), the buffers
    that buckets travel in, and, where a silo trains several sources in turn, the sum of their deltas. int8 keeps what
    it owes: of the partition, and of the share. An exchange that overlaps has both the body that it began with, where
    the next round starts, and the delta under way. Silos that are launches of their own make buffers for each exchange.
    Silos cut differently exchange by names: a rank owns an equal part of the whole body instead, values and momentum,
    whatever its partition is.
    """
    overlaps = cut.overlap > 0
    if cut.all_ranks is not None:
        return FP32_BYTES * ((2 + overlaps) * part + share(body_parameters(model), cut.all_ranks) * (1 + momentum))
    own, int8 = share(part, cut.silos), cut.wire == "int8" and (cut.separate or cut.silos > 1)
    kept = part * (1 + (cut.turns > 1 or overlaps) + overlaps + int8) + (part if cut.separate else own) * momentum
    if cut.separate:
        return FP32_BYTES * kept
    buffers = ring_bytes(Shares.cut(part, cut.silos, cut.bucket_mb), cut.wire if cut.silos > 1 else "fp32")
    return FP32_BYTES * (kept + own * int8) + buffers


def _optimizer(cut: Cut, sizes: list[int]) -> dict[str, int]:
    """Bytes of gradients, buckets, masters and moments of parameters of these sizes, and what of them is on the host.

    Offloaded, masters, moments and the gradient they are stepped with are host memory. Beside them, under ZeRO 3 the
    buffer that gradients are summed in; else the new weights on their way back and a buffer as large as the largest
    parameter, which the device has too. Where micro-batches' gradients are of fp32 themselves, ZeRO 1 sums them on the
    device, ZeRO 2 on the host, each parameter whole that lies in the partition. Of a bf16 body the device keeps the
    partition's fp32 gradient, under ZeRO 1 the reduction buffer of several data ranks too.
    """
    held, part, fp32 = sum(sizes), partition(sizes, cut), cut.width == FP32_BYTES
    bucket = FP32_BYTES * min(held, LARGEST_BUCKET)
    if not cut.offload_optimizer:
        stepped = part if cut.zero_stage else held
        return {
            "gradients": FP32_BYTES * (part if cut.zero_stage >= 2 else held),
            "buckets": bucket if cut.zero_stage == 3 else 0,
            "masters": FP32_BYTES * part if cut.zero_stage else 0,
            "moments": cut.optimizer_moments * FP32_BYTES * stepped,
            "host": 0,
        }
    host = FP32_BYTES * part * (2 + cut.optimizer_moments)
    if cut.zero_stage == 3:
        return {"gradients": 0, "buckets": bucket, "masters": 0, "moments": 0, "host": host + FP32_BYTES * part}
    largest = cut.width * max(sizes, default=0)
    host += cut.width * part + largest
    if fp32 and cut.zero_stage == 2 and cut.micro_batches > 1:
        own = zip(sizes, partition_ranges(sizes, cut, 0), strict=True)
        host += FP32_BYTES * sum(size for size, elements in own if elements)
    return {
        "gradients": FP32_BYTES * (part if not fp32 else held if cut.zero_stage == 1 else 0),
        "buckets": largest + (bucket if cut.zero_stage == 1 and cut.data > 1 and not fp32 else 0),
        "masters": 0,
        "moments": 0,
        "host": host,
    }


def activation_bytes(model: ModelConfig, cut: Cut, layers: int, stage: int) -> int:
    """What a stage of `layers` layers keeps for its backward passes.

    Korthikanti et al. 2022 (arXiv 2205.05198, table 2), per layer and micro-batch s b h (10 + 24 / T) bytes in 16 bit
    (GELU, f = 4h), without its two dropout masks (there is no dropout here: 8 + 24 / T) and without 5 a s / h of
    attention scores (fused attention keeps none). By value: two norm inputs and two inputs of column-parallel matrices
    stand on every rank; query, key, value, attention's output and the MLP's inner values are split over T. With
    sequence parallelism the norm inputs are split too; the matrices' inputs are gathered and kept, where the paper
    gathers them again. With checkpointing a layer keeps its input alone, and one layer at a time is whole.
    1F1B keeps min(m, P - stage) micro-batches.
    """
    tokens = cut.micro_batch * model.seq_length
    h = model.hidden_size
    keys_and_values = 2 * max(1, model.kv_heads // cut.tensor) * model.head_size
    inner = (4 if model.family == "llama" else 2) * model.ffn_size // cut.tensor
    norms = 2 * h // (cut.tensor if cut.sequence_parallel else 1)
    layer = norms + 2 * h + 2 * h // cut.tensor + keys_and_values + inner
    in_flight = min(cut.micro_batches, cut.pipe - stage)
    if cut.activation_checkpointing:
        return cut.width * tokens * (norms // 2 * layers * in_flight + layer * bool(layers))
    return cut.width * tokens * layer * layers * in_flight
