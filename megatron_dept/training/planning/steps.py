"""Bytes that a rank sends inside its silo in an inner step, by kind, in closed form.

A ring over n ranks sends (n - 1) / n of the data from each rank for a reduce-scatter or an all-gather, twice that for
an all-reduce. Letters: P stages, D data ranks, T tensor ranks, m micro-batches, b s h a micro-batch's hidden state.
"""

from dataclasses import dataclass

from megatron_dept.common.sizes import FP32_BYTES
from megatron_dept.config.schema import ModelConfig
from megatron_dept.training.planning.cut import (
    Cut,
    copied_parameters,
    layers_of_stages,
    parameters_of_rank,
)


@dataclass(frozen=True)
class StageTraffic:
    """Bytes that one rank of a stage sends in one step, whatever the link."""

    tensor: float
    pipe: float
    ends: float
    gradient: float
    parameter: float


def data_passes(cut: Cut) -> tuple[int, int]:
    """How often a step moves the whole gradient, and the whole parameters, over the data ranks, in ring passes.

    ZeRO 0: an all-reduce's two passes. 1: so too, at the step's end, and the new parameters once. 2: after each
    micro-batch. (Rajbhandari et al. 2020 reduce to owners, one pass; DeepSpeed all-reduces and keeps the owner's part.)
    3: gradients to their owners after each micro-batch; parameters in its forward and its backward. Gradients are fp32.
    """
    m = cut.micro_batches
    return {0: (2, 0), 1: (2, 1), 2: (2 * m, 1), 3: (m, 2 * m)}[cut.zero_stage]


def stage_traffic(model: ModelConfig, cut: Cut, rows: int, stage: int, tensor_rank: int = 0) -> StageTraffic:
    """What one rank of a stage sends in a step.

    tensor, per micro-batch: four all-reduces of b s h a layer (two forward, two backward; with sequence parallelism as
    many bytes in gathers and scatters), six with checkpointing; one more for the head, one in fp32 for the look-up;
    three numbers a token for the loss; with sequence parallelism the gradients of what every rank holds.
    pipe: b s h to the next stage and its gradient to the previous one. ends: the tied table's gradient, once a step.
    """
    layers = layers_of_stages(model, cut, rows)[stage]
    first, last = stage == 0, stage == cut.pipe - 1
    tokens = cut.micro_batch * model.seq_length
    hidden = tokens * model.hidden_size * cut.width
    reduced = hidden * (layers * (6 if cut.activation_checkpointing else 4) + last)
    reduced += FP32_BYTES * tokens * (model.hidden_size * first + 3 * last)
    reduced += cut.width * copied_parameters(model, layers, last) * cut.sequence_parallel
    held = sum(parameters_of_rank(model, cut.tensor, layers, last))
    gradient, parameter = data_passes(cut)
    pass_share = (cut.data - 1) / cut.data
    table = table_elements(model, cut, rows, stage, tensor_rank)
    tied = table - _positions(model, stage, tensor_rank) if cut.pipe > 1 else 0
    between_stages = hidden / (cut.tensor if cut.sequence_parallel else 1)
    return StageTraffic(
        tensor=cut.micro_batches * reduced * 2 * (cut.tensor - 1) / cut.tensor,
        pipe=cut.micro_batches * between_stages * ((not last) + (not first)),
        ends=tied * FP32_BYTES,
        gradient=pass_share * (held * gradient + 2 * table) * FP32_BYTES,
        parameter=pass_share * held * parameter * cut.width,
    )


def table_elements(model: ModelConfig, cut: Cut, rows: int, stage: int, tensor_rank: int) -> int:
    """Elements of the embedding that a rank has: its rows on the first and last stage, and positions."""
    own = (rows + cut.tensor - 1 - tensor_rank) // cut.tensor if stage in (0, cut.pipe - 1) else 0
    return own * model.hidden_size + _positions(model, stage, tensor_rank)


def _positions(model: ModelConfig, stage: int, tensor_rank: int) -> int:
    """Elements of the position table, which tensor rank 0 of the first stage has."""
    here = model.has_position_table and stage == tensor_rank == 0
    return model.seq_length * model.hidden_size if here else 0


def bytes_of_step(model: ModelConfig, cut: Cut, rows: int) -> dict[str, int]:
    """What all ranks of a silo send one another in a step on a source of `rows` rows, by the ledger's kinds."""
    ranks = [stage_traffic(model, cut, rows, stage, rank) for stage in range(cut.pipe) for rank in range(cut.tensor)]
    return {
        "gradient": int(cut.data * sum(rank.gradient + rank.ends for rank in ranks)),
        "parameter": int(cut.data * sum(rank.parameter for rank in ranks)),
        "activation": int(cut.data * sum(rank.tensor + rank.pipe for rank in ranks)),
    }
