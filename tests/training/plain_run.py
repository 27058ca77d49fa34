"""A run's batches and first tables, for the plain torch trainings that whole runs are held against."""

import torch
from torch import Tensor

from megatron_dept.config.schema import RunConfig
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.data.sampler import SampleStream
from megatron_dept.models.initialise import init_rows
from tests.engine.plain import Plain


def source_batch(config: RunConfig, name: str, step: int) -> Tensor:
    """The batch of a source's `step`-th step (counted from 0) in its tokenizer's ids, int64 [B, L + 1]."""
    source = next(source for source in config.sources if source.name == name)
    data = DatasetDirectory.open(getattr(source, config.data_field))
    stream = SampleStream(data.indexed("train"), config.model.seq_length, config.seed, name)
    size = config.training.global_batch_size
    return torch.from_numpy(stream.batch(step * size, size))


def union_batch(config: RunConfig, step: int) -> Tensor:
    """Every source's batch of its `step`-th step, one after another."""
    return torch.cat([source_batch(config, source.name, step) for source in config.sources])


def first_tables(config: RunConfig, rows: int, *meaning: str | int) -> tuple[Tensor, Tensor]:
    """Token and position tables as a run draws them for `meaning`."""
    model = config.model
    return (
        init_rows(0, rows, model.hidden_size, model.init_std, config.seed, "token", *meaning),
        init_rows(0, model.seq_length, model.hidden_size, model.init_std, config.seed, "position", *meaning),
    )


def plain_run(config: RunConfig, vocabulary: int) -> Plain:
    """A plain training of `config`'s model and optimizer over a global vocabulary."""
    return Plain(config, *first_tables(config, vocabulary))


def by_checkpoint_name(plain: Plain) -> dict[str, Tensor]:
    """The plain training's state under the names of `tests.support.runs.final_state`."""
    tables = ("token", "position")
    return {name if name in tables else f"body/{name}": value for name, value in plain.state().items()}


def vocabulary_size(config: RunConfig) -> int:
    """Ids of the global tokenizer."""
    data = config.sources[0].data
    assert data is not None
    return int(DatasetDirectory.open(data).card["tokenizer"]["vocab_size"])
