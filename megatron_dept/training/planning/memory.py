"""Memory of one rank by part, in bytes. Shapes: b micro-batch, s sequence, h hidden, f ffn, v rows of a source."""

from dataclasses import asdict, dataclass

from megatron_dept.config.schema import ModelConfig, Variant
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.training.planning.cut import FP32_BYTES, Cut, layers_of_stages, parameters_of_rank, partition, share

PERSISTED_ELEMENTS = 100_000
"""Parameters of so many elements at most stay whole under ZeRO 3 (DeepSpeed's stage3_param_persistence_threshold)."""
LARGEST_BUCKET = 50_000_000
"""Elements of a reduction bucket at most: `engine.silo_engine` asks for no larger one."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `row_table` is host memory; everything else is the device's."""

    weights: int
    gradients: int
    buckets: int
    masters: int
    moments: int
    outer: int
    embedding: int
    activations: int
    logits: int
    row_table: int

    @property
    def device(self) -> int:
        return sum(asdict(self).values()) - self.row_table


def memory_of_rank(
    model: ModelConfig, cut: Cut, variant: Variant, rows: int, vocabulary: int, stage: int, momentum: bool = False
) -> Memory:
    """Memory of a rank of pipeline stage `stage`, tensor rank 0, that trains a source of `rows` embedding rows.

    `vocabulary`: rows of the global table; `momentum`: whether the outer optimizer has one.

    - weights: width x held (ZeRO 0 to 2) or x partition (3), where small parameters stay whole too. buckets: ZeRO 3's
      reduction buffer, fp32 and as large as the body up to a limit. gradients: fp32, in which micro-batches are summed,
      x held (0, 1) or x partition (2, 3). masters: 4 x partition under ZeRO. moments: 8 x partition (x held under ZeRO
      0) with AdamW.
    - outer: the round's start, the summed delta and the momentum of this silo's share, in fp32.
    - embedding: fp32 table, gradient, moments, the round's start where rows are shared, and the copy in compute
      precision; first and last stage have it, the position table is the first stage's.
    """
    layers = layers_of_stages(model, cut, rows)
    first, last = stage == 0, stage == cut.pipe - 1
    sizes = parameters_of_rank(model, cut.tensor, layers[stage], last)
    held, part = sum(sizes), partition(sizes, cut)
    rule = VARIANTS[variant]
    shared = rule.token_rows == "shared"
    own_share = share(part, cut.silos)
    outer = part + cut.silos * own_share + (own_share if momentum else 0) if rule.averages_body else 0
    positions = model.seq_length if model.has_position_table else 0
    table = (-(-rows // cut.tensor) * (first or last) + positions * first) * model.hidden_size
    copy = cut.width if cut.width < FP32_BYTES else 0
    owners = cut.silos * cut.data * cut.tensor
    owned = (-(-vocabulary // owners) + -(-positions // owners)) * first * model.hidden_size
    sharded = cut.zero_stage == 3
    small = sum(size for size in sizes if size <= PERSISTED_ELEMENTS) if sharded else 0
    return Memory(
        weights=cut.width * (part + small if sharded else held),
        gradients=FP32_BYTES * (part if cut.zero_stage >= 2 else held),
        buckets=FP32_BYTES * min(held, LARGEST_BUCKET) if sharded else 0,
        masters=FP32_BYTES * part if cut.zero_stage else 0,
        moments=cut.optimizer_moments * FP32_BYTES * (part if cut.zero_stage else held),
        outer=FP32_BYTES * outer,
        embedding=table * (FP32_BYTES * (2 + cut.optimizer_moments + shared) + copy),
        activations=activation_bytes(model, cut, layers[stage], stage),
        logits=FP32_BYTES * min(cut.loss_chunk_tokens, cut.micro_batch * model.seq_length) * -(-rows // cut.tensor)
        if last
        else 0,
        row_table=FP32_BYTES * owned * (3 if momentum else 2) if shared else 0,
    )


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
