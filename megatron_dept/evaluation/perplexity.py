"""Perplexity and bits per byte of a model on held-out text.

Perplexity is comparable only on the same tokenizer; across vocabularies compare bits per byte. Shapes: `b` sequences of
`s` tokens, `n` windows of the text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from megatron_dept.evaluation.heldout import HeldoutText

Forward = Callable[[Tensor, Tensor], Tensor]
"""Local ids inputs [b, s] and targets [b, s] (int64, CPU) -> loss of each target in nats [b, s], on any device."""


@dataclass(frozen=True)
class Score:
    """Sums over scored tokens; scores of parts of a text add up."""

    nats: float
    """Negative log-likelihood of all scored tokens."""
    tokens: int
    text_nats: float
    """The part of `nats` that tokens which stand for text have: special tokens such as eod are left out."""
    text_bytes: int
    """UTF-8 bytes that those tokens stand for."""

    def __add__(self, other: Self) -> "Score":
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.text_nats + other.text_nats,
            self.text_bytes + other.text_bytes,
        )

    @property
    def nats_per_token(self) -> float:
        """Mean loss over all scored tokens; NaN where there are none."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinity where that overflows."""
        mean = self.nats_per_token
        return math.exp(mean) if not mean > 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte of text costs; NaN where the scored tokens stand for no text."""
        return self.text_nats / (math.log(2) * self.text_bytes) if self.text_bytes else math.nan


def score(forward: Forward, text: HeldoutText, batch: int, advance: Callable[[int], None] | None = None) -> Score:
    """Score every window of `text`, `batch` windows at a time, without gradients.

    Losses are summed in float64. `advance` is told the windows done after each batch (for progress). `forward` is
    called ceil(n / batch) times, also where nothing of a batch is scored, so that ranks stay in step.
    """
    total = Score(0.0, 0, 0.0, 0)
    for start in range(0, len(text.windows), batch):
        windows = torch.from_numpy(text.windows[start : start + batch])
        inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        with torch.no_grad():
            losses = forward(inputs, targets)
        assert losses.shape == targets.shape, f"losses {tuple(losses.shape)} for targets {tuple(targets.shape)}"
        total += _sum_up(losses.double().cpu().numpy(), targets.numpy(), text, start)
        if advance is not None:
            advance(len(windows))
    return total


def module_forward(body: nn.Module, embedding: nn.Module, device: torch.device | str = "cpu") -> Forward:
    """A `Forward` of plain modules on `device`: embedding rows, body, losses against the tied head."""

    def forward(inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = body(embedding(inputs.to(device)))
        return embedding.token_losses(hidden, targets.to(device))  # type: ignore[operator]

    return forward


def _sum_up(losses: np.ndarray, targets: np.ndarray, text: HeldoutText, start: int) -> Score:
    """Score of one batch: losses float64 and targets int64, both [b, s], of the windows from `start` on."""
    scored = np.arange(targets.shape[1]) < text.scored[start : start + len(targets), None]
    bytes_of = np.where(scored, text.bytes_per_token[targets], 0)
    # where= and not a product with the mask: whatever stands at a position that is not scored, NaN too, has no part.
    return Score(
        nats=float(losses.sum(where=scored)),
        tokens=int(scored.sum()),
        text_nats=float(losses.sum(where=bytes_of > 0)),
        text_bytes=int(bytes_of.sum()),
    )
