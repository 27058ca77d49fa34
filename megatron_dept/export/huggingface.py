"""A directory that plain transformers loads: AutoModelForCausalLM and AutoTokenizer, no remote code, no network.

Shapes: b batch, s sequence, h hidden, v rows that exist, V ids of the tokenizer, L positions.

Before the directory takes its place it is loaded back and compared with our own model and tokenizer; one that differs
is never left behind.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from megatron_dept.common.errors import UserError
from megatron_dept.config.schema import ModelConfig
from megatron_dept.export.card import model_card
from megatron_dept.export.directory import atomic_directory
from megatron_dept.export.parity import largest_logit_difference, quiet_transformers
from megatron_dept.export.settings import generation_config, transformers_config
from megatron_dept.export.state import absent_ids, check_exportable, dense_table, to_transformers_state
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.to_huggingface import parity, to_huggingface

# fp32 logits of a few units carry rounding of about 1e-6 a layer; a wrong layout is wrong by whole units.
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class TrainedModel:
    """One body with one embedding, by name, in fp32: what an export is made of."""

    config: ModelConfig
    body: Mapping[str, Tensor]  # names of build_body(config).named_parameters()
    ids: np.ndarray  # int64 [v], ascending: the tokenizer's ids that have a row
    rows: Tensor  # [v, h]
    position: Tensor | None  # [L, h]
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.rows):
            raise ValueError(f"{len(self.ids)} ids have {len(self.rows)} rows")
        if len(self.ids) and self.ids[-1] >= self.tokenizer.vocab_size:
            raise UserError(
                f"the model has a row for id {self.ids[-1]}, but {self.tokenizer.path} has only "
                f"{self.tokenizer.vocab_size} ids; give the tokenizer it was trained with"
            )

    @property
    def absent(self) -> np.ndarray:
        """The tokenizer's ids without a row, ascending int64."""
        return absent_ids(self.ids, self.tokenizer.vocab_size)


@dataclass(frozen=True)
class ExportReport:
    """What an export found: the largest logit difference, over how many positions, and how many ids are suppressed."""

    logit_difference: float
    positions: int
    suppressed: int


def export_model(
    model: TrainedModel,
    directory: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    samples: Sequence[np.ndarray],
    texts: Sequence[str],
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> ExportReport:
    """Write `model` as `directory`, after checking it: logits on `samples` (ids that have rows), ids on `texts`.

    `facts` go into the model card. Weights above `max_shard_size` are split over several files with an index.
    Raises `UserError` for ALiBi, an existing directory, a full disk, and where the check fails; then nothing is left.
    """
    check_exportable(model.config)
    if not samples:
        raise ValueError("an export is checked on at least one sample")
    with quiet_transformers(), atomic_directory(directory, overwrite) as target:
        vocab_size, eod_id = model.tokenizer.vocab_size, model.tokenizer.eod_id
        config = transformers_config(model.config, vocab_size, eod_id)
        config.save_pretrained(target)
        generation_config(eod_id, model.absent).save_pretrained(target)
        table = dense_table(model.ids, model.rows, vocab_size)
        save_weights(to_transformers_state(model.config, model.body, table, model.position), target, max_shard_size)
        to_huggingface(model.tokenizer, target, model_max_length=model.config.seq_length)
        check_tokenizer(model.tokenizer, target, texts)
        difference = largest_logit_difference(
            model.config, model.body, model.ids, model.rows, model.position, target, samples
        )
        if not difference <= LOGIT_TOLERANCE:
            raise UserError(
                f"{directory} is not written: its logits differ from the training code's by {difference:.2e}, more "
                f"than {LOGIT_TOLERANCE:.0e}; please report this model's configuration"
            )
        positions = sum(len(sample) for sample in samples)
        card = model_card(title, config.architectures[0], facts, vocab_size, len(model.absent), difference, positions)
        (target / "README.md").write_text(card, encoding="utf-8")
    return ExportReport(difference, positions, len(model.absent))


def check_tokenizer(tokenizer: Tokenizer, directory: Path, texts: Sequence[str]) -> None:
    """Raise `UserError` showing the first of `texts` that the exported tokenizer reads or writes differently."""
    mismatch = parity(tokenizer, directory, texts)
    if mismatch is not None:
        raise UserError(
            f"{tokenizer.path}: transformers would treat the text {mismatch.text[:80]!r} differently (its "
            f"{mismatch.what} would be {str(mismatch.exported)[:80]}, not {str(mismatch.ours)[:80]}); "
            "train with another tokenizer"
        )


def save_weights(state: dict[str, Tensor], directory: Path, max_shard_size: int | str) -> None:
    """Write `state` as model.safetensors, or as model-00001-of-0000N.safetensors with an index where it is larger."""
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
