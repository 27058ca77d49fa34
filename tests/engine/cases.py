"""The silos without pipeline that are held against plain torch, as tables: how each is cut and what it trains."""

from dataclasses import dataclass
from typing import Any

from megatron_dept.config.load import validate_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.layout import Layout, SiloShape
from tests.support.pairs import Row, covering_pairs, every_combination

SEQUENCE = 8
BATCH = 12
"""Sequences of a step: divides into micro-batches of 2 on 1, 2 and 3 data ranks, several a rank in each case."""


@dataclass(frozen=True)
class Case:
    """`subgroup`: ZeRO-3's sub_group_size, small to have several; `hidden` 168 has parameters that ZeRO-3 really cuts.

    Two heads 10 wide: neither the body nor most of its parameters divide by 3 ranks, so partitions are padded. `wide`
    has four heads for up to 4 tensor ranks, of which llama's pair share a key and a value.
    """

    tensor: int = 1
    data: int = 1
    stage: int = 1
    precision: str = "fp32"
    family: str = "gpt"
    sequence_parallel: bool = False
    offload: bool = False
    vocabulary: int = 13
    hidden: int = 10
    subgroup: int | None = None

    def __str__(self) -> str:
        names = {"sequence": self.sequence_parallel, "offload": self.offload, "subgroups": self.subgroup}
        extras = "".join(f"-{name}" for name, on in names.items() if on)
        return (
            f"t{self.tensor}d{self.data}-zero{self.stage}-{self.precision}-{self.family}-h{self.hidden}"
            f"-v{self.vocabulary}{extras}"
        )

    @property
    def shape(self) -> SiloShape:
        return SiloShape(1, self.data, self.tensor, self.stage)

    @property
    def layout(self) -> Layout:
        return Layout((self.shape,))

    def config(self, **optimizer: Any) -> RunConfig:
        wide = self.hidden > 100
        return validate_config(
            {
                "run_dir": "unused",
                "model": {
                    "family": self.family,
                    "num_layers": 1 if wide else 2,
                    "hidden_size": self.hidden,
                    "num_attention_heads": 2 if self.hidden == 10 else 4,
                    **({"num_key_value_heads": 2, "ffn_hidden_size": 20} if self.family == "llama" else {}),
                    "seq_length": SEQUENCE,
                    "init_std": 0.04 if wide else 0.2,
                },
                "sources": [{"name": "none", "data": "unused"}],
                "parallel": {
                    "zero_stage": self.stage,
                    "tensor_model_parallel_size": self.tensor,
                    "sequence_parallel": self.sequence_parallel,
                    "offload_optimizer": self.offload,
                },
                "optimizer": {"clip_grad": 0.0, **optimizer},
                "training": {"micro_batch_size": 2, "global_batch_size": BATCH, "precision": self.precision},
            },
            "test",
        )


THOROUGH = (
    Case(stage=0),
    Case(stage=1, precision="bf16"),
    Case(data=2, stage=1),
    Case(data=2, stage=1, precision="bf16"),
    Case(data=2, stage=3, precision="bf16"),
    Case(data=2, stage=3, hidden=168),
    Case(data=2, stage=2, precision="bf16", offload=True),
    Case(data=2, stage=3, offload=True),
    Case(data=3, stage=2),
    Case(data=3, stage=3, subgroup=1000),
    Case(tensor=2, data=2, stage=0, hidden=12),
    Case(tensor=2, data=2, stage=1, hidden=12, precision="bf16", sequence_parallel=True),
    Case(tensor=2, data=2, stage=3, hidden=16, family="llama"),
)
"""What reads, writes, clips, skips, saves and loads: each of the adapters, padded, cut, offloaded, tensor-parallel."""
FURTHER = (
    Case(stage=3),
    Case(data=2, stage=2, precision="bf16"),
    Case(data=2, stage=1, offload=True),
    Case(data=3, stage=0),
    Case(tensor=2, data=2, stage=2, hidden=12, sequence_parallel=True, offload=True),
)
"""As thorough, of adapters that others show: for make test-long."""

_CHOICES = {
    "tensor": (1, 2, 4),
    "data": (1, 2),
    "stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16"),
    "family": ("gpt", "llama"),
    "sequence_parallel": (False, True),
    "offload": (False, True),
    "vocabulary": (13, 97),
}


def _legal(row: Row) -> bool:
    return (
        (row["tensor"] > 1 or not row["sequence_parallel"])
        and (row["stage"] > 0 or row["precision"] == "fp32")
        and (row["stage"] > 0 or not row["offload"])
    )


def _cases(rows: list[Row]) -> tuple[Case, ...]:
    return tuple(Case(**row, hidden=12 if row["family"] == "gpt" else 16) for row in rows)


_REPLICATED_HEADS = {"tensor": 4, "data": 2, "precision": "fp32", "family": "llama", "offload": False, "vocabulary": 97}
PAIRS = _cases(
    [
        *covering_pairs(_CHOICES, _legal),
        {**_REPLICATED_HEADS, "stage": 1, "sequence_parallel": False},
        {**_REPLICATED_HEADS, "stage": 3, "sequence_parallel": True},
    ]
)
"""Every two choices side by side at least once; and key-value heads on two ranks each in fp32, where errors show."""
EVERYTHING = _cases(every_combination(_CHOICES, _legal))
