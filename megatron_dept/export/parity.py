"""Whether an exported directory computes what our model computes: logits compared on the same ids, in fp32.

Shapes: s sequence, v rows that exist, V ids of the tokenizer, h hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.build import body_from_state
from megatron_dept.models.embedding import SourceEmbedding


@torch.no_grad()
def largest_logit_difference(
    config: ModelConfig,
    body: Mapping[str, Tensor],
    ids: np.ndarray,
    rows: Tensor,
    position: Tensor | None,
    directory: str | Path,
    samples: Sequence[np.ndarray],
) -> float:
    """Largest |ours - theirs| over the logits of the ids that have rows, [s, v], of every sample.

    `samples`: int64 [s] each, ids of the tokenizer that have rows, s at most `config.seq_length`. NaN where either
    model gives one, so that no comparison passes it.
    """
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    ours = body_from_state(config, dict(body)).eval()
    embedding = SourceEmbedding(rows.float(), position, torch.float32, loss_chunk_tokens=1)
    columns = torch.from_numpy(ids)
    largest = 0.0
    for sample in samples:
        local = np.searchsorted(ids, sample)
        assert (ids[np.minimum(local, len(ids) - 1)] == sample).all(), "samples hold only ids that have rows"
        expected = embedding.logits(ours(embedding.embed(torch.from_numpy(local)[None])))[0]
        found = theirs(input_ids=torch.from_numpy(sample)[None], use_cache=False).logits[0][:, columns]
        largest = float(np.maximum(largest, (expected - found).abs().max().item()))  # keeps NaN, as max() may not
    return largest


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside; what was set before is set again after."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
