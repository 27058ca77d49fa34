"""Cross-entropy of the tied head without the logits of all tokens at once.

Shapes: n tokens, h hidden, v vocabulary, c tokens of a chunk.

Logits exist for one chunk of tokens at a time, [c, v], in one buffer that every chunk reuses. While a chunk's logits
are live, its share of both gradients is formed from them, so the backward has nothing to recompute and only scales.
The idea is that of Cut Cross-Entropy's and Liger's fused linear cross-entropy, here on plain GEMMs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of the vocabulary whose low-precision gradient is formed at once before it is added to the fp32 one.
_GRADIENT_ROWS = 4096


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """Mean over tokens of -log softmax(hidden @ weight.T)[target]: an fp32 scalar (fp64 for an fp64 weight).

    hidden [n, h] in the compute dtype (bf16, fp32); weight [v, h], usually the fp32 master: it is cast to hidden's
    dtype once, and its gradient is accumulated and arrives in fp32. targets [n] int64, 0 <= target < v: no id is
    ignored, and one outside raises `IndexError`/`RuntimeError` from torch. Softmax is in fp32.

    The gradients are formed in the forward and handed out once: a second backward through it raises `RuntimeError`.
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return linear_cross_entropy_per_token(hidden, weight, targets, chunk_tokens).mean()
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk_tokens)


@torch.no_grad()
def linear_cross_entropy_per_token(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """-log softmax(hidden @ weight.T)[target] of each token, [n] fp32, without gradients; arguments as above."""
    run = _Chunks(hidden, weight, targets, chunk_tokens)
    return torch.cat([run.losses(start)[0] for start in run.starts])


class _Chunks:
    """Walks over chunks of tokens, with the one logits buffer they share."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> None:
        tokens, size = hidden.shape
        assert tokens > 0, "the mean over no tokens is undefined"
        assert weight.shape[1] == size and targets.shape == (tokens,), "hidden [n, h], weight [v, h], targets [n]"
        self.hidden, self.targets = hidden, targets
        self.weight = weight.to(hidden.dtype)
        self.chunk = min(chunk_tokens, tokens)
        self.starts = range(0, tokens, self.chunk)
        self.accumulate = torch.promote_types(torch.promote_types(weight.dtype, hidden.dtype), torch.float32)
        self._product = hidden.new_empty(self.chunk, weight.shape[0])
        # Softmax needs fp32; where the products are fp32 already there is no second buffer.
        same = self.accumulate == hidden.dtype
        self._logits = self._product if same else self._product.new_empty(self._product.shape, dtype=self.accumulate)

    def losses(self, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [c]; exp(logits - max) [c, v], in the buffer, and its row sums [c, 1]: the softmax before division."""
        states = self.hidden[start : start + self.chunk]
        logits = self._logits[: len(states)]
        product = torch.mm(states, self.weight.t(), out=self._product[: len(states)])
        if product.data_ptr() != logits.data_ptr():
            logits.copy_(product)
        logits.sub_(logits.amax(dim=1, keepdim=True))
        target_logits = logits.gather(1, self.targets[start : start + self.chunk, None])
        exponentials = logits.exp_()
        sums = exponentials.sum(dim=1, keepdim=True)
        return (sums.log() - target_logits).squeeze(1), exponentials, sums

    def logits_gradient(self, start: int, exponentials: Tensor, sums: Tensor) -> Tensor:
        """(softmax - one-hot) / n, [c, v] in the compute dtype, written over the logits."""
        share = 1.0 / len(self.hidden)
        targets = self.targets[start : start + self.chunk, None]
        gradient = exponentials.mul_(share / sums)
        gradient.scatter_add_(1, targets, torch.full_like(sums, -share))
        if gradient.dtype == self.hidden.dtype:
            return gradient
        return self._product[: len(gradient)].copy_(gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        run = _Chunks(hidden, weight, targets, chunk_tokens)
        losses = hidden.new_empty(len(hidden), dtype=run.accumulate)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.empty_like(weight, dtype=run.accumulate) if ctx.needs_input_grad[1] else None
        for start in run.starts:
            chunk = slice(start, start + run.chunk)
            losses[chunk], exponentials, sums = run.losses(start)
            gradient = run.logits_gradient(start, exponentials, sums)
            if hidden_gradient is not None:
                torch.mm(gradient, run.weight, out=hidden_gradient[chunk])
            if weight_gradient is not None:
                _add_outer(weight_gradient, gradient, hidden[chunk], first=start == 0)
        ctx.gradients = (hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy hands out its gradients once; call the forward again")
        hidden_gradient, weight_gradient = ctx.gradients
        # Released here, so that autograd holds the only reference and makes it .grad without a copy of V x h.
        ctx.gradients = None
        if hidden_gradient is not None:
            hidden_gradient.mul_(loss_gradient)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(loss_gradient).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None


def _add_outer(total: Tensor, gradient: Tensor, states: Tensor, first: bool) -> None:
    """total [v, h] (fp32) += gradient [c, v].T @ states [c, h]; `first`: total holds nothing yet.

    In low precision the product is formed for a block of vocabulary rows at a time, never a second [v, h].
    """
    if total.dtype == states.dtype:
        total.addmm_(gradient.t(), states, beta=0 if first else 1)
        return
    if first:
        total.zero_()
    for row in range(0, len(total), _GRADIENT_ROWS):
        rows = slice(row, row + _GRADIENT_ROWS)
        total[rows] += gradient[:, rows].t() @ states
