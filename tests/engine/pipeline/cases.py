"""Silos with a pipeline to hold against plain torch: how they are cut, what they train, and on which batches."""

from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_dept.common.seeding import generator_for
from megatron_dept.config.load import validate_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.models.initialise import init_rows
from megatron_dept.topology.layout import Layout

SEQUENCE = 8
BATCH = 12
"""Sequences of a step: 6 micro-batches of 2 on one data rank, 3 on two; both more than some pipelines have stages."""
VOCABULARIES = {"large": 97, "small": 13}
"""Rows of two sources' tables; prime, so that tensor ranks hold different numbers of them."""

Cut = Literal["even", "uneven", "bare"]
"""How layers are spread: equally; more of them on the first stage; none on the last, which is left norm and head."""
LAYERS: dict[tuple[int, Cut], tuple[int, ...]] = {
    (2, "even"): (1, 1),
    (2, "uneven"): (2, 1),
    (2, "bare"): (2, 0),
    (4, "even"): (1, 1, 1, 1),
    (4, "uneven"): (2, 1, 1, 1),
    (4, "bare"): (1, 1, 1, 0),
}


@dataclass(frozen=True)
class Case:
    """One silo; `mode`: precision and ZeRO stage."""

    pipe: int
    tensor: int
    data: int
    family: Literal["gpt", "llama"]
    mode: Literal["fp32-zero0", "fp32-zero1", "bf16-zero1"]
    cut: Cut
    checkpointing: bool
    sequence_parallel: bool

    def __str__(self) -> str:
        extras = "-recompute" * self.checkpointing + "-sequence" * self.sequence_parallel
        return f"p{self.pipe}t{self.tensor}d{self.data}-{self.family}-{self.mode}-{self.cut}{extras}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.pipe, self.data, self.tensor

    @property
    def ranks(self) -> int:
        return prod(self.shape)

    @property
    def precision(self) -> str:
        return self.mode[:4]

    @property
    def stage(self) -> int:
        """ZeRO's."""
        return int(self.mode[-1])

    @property
    def layout(self) -> Layout:
        return Layout.of_equal(1, *self.shape, self.stage)

    def layers(self, stage: int) -> range:
        """Global indices of a pipeline stage's layers."""
        counts = LAYERS[self.pipe, self.cut]
        stops = list(accumulate(counts))
        return range(stops[stage] - counts[stage], stops[stage])

    def config(self, **optimizer: Any) -> RunConfig:
        """12 wide in two heads. Llama's have one key-value head, of which every tensor rank then holds a copy."""
        llama = {"num_key_value_heads": 1, "ffn_hidden_size": 20} if self.family == "llama" else {}
        return validate_config(
            {
                "run_dir": "unused",
                "model": {
                    "family": self.family,
                    "num_layers": sum(LAYERS[self.pipe, self.cut]),
                    "hidden_size": 12,
                    "num_attention_heads": 2,
                    "seq_length": SEQUENCE,
                    "init_std": 0.2,
                    **llama,
                },
                "sources": [{"name": "none", "data": "unused"}],
                "parallel": {
                    "pipeline_model_parallel_size": self.pipe,
                    "tensor_model_parallel_size": self.tensor,
                    "sequence_parallel": self.sequence_parallel,
                    "zero_stage": self.stage,
                },
                "optimizer": {"clip_grad": 0.0, **optimizer},
                "training": {"micro_batch_size": 2, "global_batch_size": BATCH, "precision": self.precision},
            },
            "test",
        )


def tables(config: RunConfig, source: str) -> tuple[Tensor, Tensor | None]:
    """A source's whole token table, and its position table where the family has one."""
    hidden = config.model.hidden_size
    token = init_rows(0, VOCABULARIES[source], hidden, 0.5, "token", source)
    position = init_rows(0, SEQUENCE, hidden, 0.5, "position", source) if config.model.has_position_table else None
    return token, position


def batch(source: str, step: int, sequences: int = BATCH) -> Tensor:
    """Sequences of a source, int64 [sequences, SEQUENCE + 1]."""
    ids = generator_for("batch", source, step).integers(0, VOCABULARIES[source], (sequences, SEQUENCE + 1))
    return torch.from_numpy(ids)


CASES = (
    Case(2, 1, 1, "gpt", "fp32-zero0", "bare", True, False),
    Case(2, 1, 1, "gpt", "fp32-zero1", "even", False, False),
    Case(2, 1, 2, "gpt", "bf16-zero1", "uneven", True, False),
    Case(2, 1, 2, "llama", "fp32-zero1", "bare", False, False),
    Case(2, 2, 1, "gpt", "bf16-zero1", "even", False, False),
    Case(2, 2, 1, "gpt", "fp32-zero1", "uneven", False, True),
    Case(4, 1, 1, "gpt", "fp32-zero1", "even", True, False),
    Case(4, 1, 1, "llama", "fp32-zero0", "uneven", False, False),
    Case(2, 2, 2, "llama", "fp32-zero0", "even", True, True),
    Case(4, 2, 1, "llama", "bf16-zero1", "bare", True, True),
)
"""Every two choices side by side in one of them, but for four stages with two data ranks: 8 processes a third time."""

ALL_CASES = tuple(
    Case(pipe, tensor, data, family, mode, cut, checkpointing, sequence_parallel)
    for pipe, tensor, data, family, mode, cut, checkpointing, sequence_parallel in product(
        (2, 4),
        (1, 2),
        (1, 2),
        ("gpt", "llama"),
        ("fp32-zero0", "fp32-zero1", "bf16-zero1"),
        ("even", "uneven", "bare"),
        (False, True),
        (False, True),
    )
    if pipe * tensor * data <= 8 and (tensor == 2 or not sequence_parallel)
)
