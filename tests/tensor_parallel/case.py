"""One model, small, computed on any number of tensor ranks: what it is, and everything that is compared of it.

Shapes: b sequences, s tokens, h hidden, v vocabulary, T tensor ranks.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.build import build_body
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.initialise import init_rows
from megatron_dept.models.parts import BodyPart
from megatron_dept.models.vocabulary_shard import VocabularyShard
from megatron_dept.tensor_parallel.group import TensorGroup
from megatron_dept.tensor_parallel.shards import Run, shard_of, take

BATCH, LENGTH, CHUNK = 2, 8, 5
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"family": "gpt"},
    # Twelve heads: slopes of no power of two, so that each rank's are others.
    "gpt-alibi": {"family": "gpt", "position_embedding": "alibi", "num_attention_heads": 12},
    "gpt-kv1": {"family": "gpt"},
    "llama": {"family": "llama"},
    "llama-kv2": {"family": "llama", "num_key_value_heads": 2},
    "llama-kv1": {"family": "llama", "num_key_value_heads": 1},
}


@dataclass(frozen=True)
class Case:
    """What is computed; `sequence_parallel` alone does not change the function."""

    family: str
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    vocabulary: int = 97
    recompute: bool = False

    def __str__(self) -> str:
        flags = ["sequence"] * self.sequence_parallel + ["recompute"] * self.recompute
        return "-".join([self.family, str(self.dtype).removeprefix("torch."), f"v{self.vocabulary}", *flags])

    @property
    def config(self) -> ModelConfig:
        sizes = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "seq_length": LENGTH}
        config = ModelConfig.model_validate({**sizes, "ffn_hidden_size": 80, **FAMILIES[self.family]})
        # No configuration asks for it, but the layers can: copied rows with a bias.
        return config.model_copy(update={"num_key_value_heads": 1}) if self.family == "gpt-kv1" else config

    @property
    def function(self) -> "Case":
        """The case whose result on one rank this one's must equal."""
        return Case(self.family, False, self.dtype, self.vocabulary)


CASES = [
    *(Case(family, sequence) for family in FAMILIES for sequence in (False, True)),
    *(Case(family, sequence, torch.bfloat16, 13) for family in ("gpt-kv1", "llama-kv2") for sequence in (False, True)),
    *(Case(family, sequence, vocabulary=13) for family in ("gpt", "llama-kv1") for sequence in (False, True)),
    *(Case(family, sequence, recompute=True) for family in ("gpt-kv1", "llama-kv2") for sequence in (False, True)),
]


@dataclass(frozen=True)
class Result:
    """What one rank computed. Parameters and gradients are this rank's, flat, in the body's or fp32 dtype."""

    loss: float
    token_losses: Tensor  # [b, s]
    embedded: Tensor  # [b, s, h] or the rank's [b, s/T, h], and so are the next two
    hidden: Tensor
    embedded_gradient: Tensor
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    runs: dict[str, tuple[Run, ...]]
    shapes: dict[str, tuple[int, ...]]


def compute(case: Case, tensor: TensorGroup) -> Result:
    """Forward and backward of the whole model on this rank of `tensor`."""
    config = case.config
    part = BodyPart(tensor, case.sequence_parallel)
    body = build_body(config, seed=3, activation_checkpointing=case.recompute, part=part)
    initial = {name: parameter.detach().clone().view(-1) for name, parameter in body.named_parameters()}
    _add_noise(body)
    body.to(case.dtype)
    embedding = _embedding(case, config, tensor)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(case.vocabulary, (BATCH, LENGTH + 1), generator=generator)
    embedded = embedding.embed(ids[:, :-1])
    embedded.retain_grad()
    hidden = body(embedded)
    loss = embedding.loss(hidden, ids[:, 1:])
    loss.backward()
    parameters = dict(body.named_parameters()) | dict(embedding.named_parameters())
    assert embedded.grad is not None
    return Result(
        loss=loss.item(),
        token_losses=embedding.token_losses(hidden, ids[:, 1:]),
        embedded=embedded.detach(),
        hidden=hidden.detach(),
        embedded_gradient=embedded.grad,
        initial=initial,
        gradients={name: parameter.grad.view(-1) for name, parameter in parameters.items()},
        runs={name: shard_of(parameter).runs for name, parameter in parameters.items()},
        shapes={name: shard_of(parameter).shape for name, parameter in parameters.items()},
    )


def _add_noise(body: nn.Module) -> None:
    """Random biases and norms too, so that none is forgotten unseen; a pure function of the parameter's name."""
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            shard = shard_of(parameter)
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())
            noise = torch.randn(shard.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(0.1 * take(noise, shard))


def _embedding(case: Case, config: ModelConfig, tensor: TensorGroup) -> SourceEmbedding:
    shard = VocabularyShard(tensor, case.vocabulary, case.sequence_parallel)
    token = init_rows(shard.start, shard.stop, config.hidden_size, 0.5, "token")
    position = None
    if config.has_position_table and tensor.rank == 0:
        position = init_rows(0, LENGTH + 2, config.hidden_size, 0.5, "position")
    return SourceEmbedding(token, position, case.dtype, CHUNK, shard)


def join(results: list[Result], of: str, name: str) -> Tensor:
    """The whole parameter's values, flat, put together from the ranks' by their primary runs."""
    shape = next(result.shapes[name] for result in results if name in result.shapes)
    first = next(getattr(result, of)[name] for result in results if name in result.shapes)
    whole = torch.full((torch.Size(shape).numel(),), torch.nan, dtype=first.dtype)
    for result in results:
        for run in result.runs.get(name, ()):
            if run.primary:
                whole[run.start : run.start + run.count] = getattr(result, of)[name][run.local : run.local + run.count]
    return whole


def whole_sequence(case: Case, results: list[Result], of: str) -> list[Tensor]:
    """[b, s, h] as each rank has it, or, where the sequence is split, once, put together from all."""
    parts = [getattr(result, of) for result in results]
    return [torch.cat(parts, dim=1)] if case.sequence_parallel else parts
