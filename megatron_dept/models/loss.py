"""Cross-entropy of the tied head without the logits of all tokens at once.

Shapes: n tokens, h hidden, v vocabulary, c tokens of a chunk, T tensor ranks.

Logits exist for one chunk of tokens at a time, [c, v], in one buffer that every chunk reuses. While a chunk's logits
are live, its share of both gradients is formed from them, so the backward has nothing to recompute and only scales.
The idea is that of Cut Cross-Entropy's and Liger's fused linear cross-entropy, here on plain GEMMs.

Over tensor ranks each has the logits of its own rows (Megatron-LM's parallel cross-entropy, Shoeybi et al., 2019): what
the ranks tell one another of a chunk is the largest logit, the sum of exponentials and the target's logit, [c] each.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dept.models.vocabulary_shard import VocabularyShard
from megatron_dept.tensor_parallel.mappings import enter_ranks

# Rows of the vocabulary whose low-precision gradient is formed at once before it is added to the fp32 one.
_GRADIENT_ROWS = 4096


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, shard: VocabularyShard | None = None
) -> Tensor:
    """Mean over tokens of -log softmax(hidden @ weight.T)[target]: an fp32 scalar (fp64 for an fp64 weight).

    hidden [.., h] in the compute dtype (bf16, fp32); weight [v, h], usually the fp32 master: it is cast to hidden's
    dtype once, and its gradient is accumulated and arrives in fp32. targets [..] int64, 0 <= target < v: no id is
    ignored, and one outside raises `IndexError`/`RuntimeError` from torch. Softmax is in fp32.

    With a `shard` of several tensor ranks, weight is this rank's rows of v; all ranks give the same tokens and get the
    same loss. hidden is the same on all of them, or [b, s/T, h] where the shard splits the sequence; its gradient is
    summed over them.

    The gradients are formed in the forward and handed out once: a second backward through it raises `RuntimeError`.
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return linear_cross_entropy_per_token(hidden, weight, targets, chunk_tokens, shard).mean()
    states = _states(hidden, shard)
    return _LinearCrossEntropy.apply(states, weight, targets.reshape(-1), chunk_tokens, shard)


@torch.no_grad()
def linear_cross_entropy_per_token(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, shard: VocabularyShard | None = None
) -> Tensor:
    """-log softmax(hidden @ weight.T)[target] of each token, [n] fp32, without gradients; arguments as above."""
    run = _Chunks(_states(hidden, shard), weight, targets.reshape(-1), chunk_tokens, shard)
    return torch.cat([run.losses(start)[0] for start in run.starts])


def _states(hidden: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Every rank's input of the head, [n, h]."""
    if shard is not None:
        hidden = enter_ranks(hidden, shard.tensor, shard.sequence_parallel)
    return hidden.reshape(-1, hidden.shape[-1])


class _Chunks:
    """Walks over chunks of tokens, with the one logits buffer they share; v is this rank's share of the vocabulary."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, shard: VocabularyShard | None
    ) -> None:
        tokens, size = hidden.shape
        assert tokens > 0, "the mean over no tokens is undefined"
        assert weight.shape[1] == size and targets.shape == (tokens,), "hidden [n, h], weight [v, h], targets [n]"
        self.hidden = hidden
        self.targets, self.elsewhere, self.ranks = targets, None, None
        if shard is not None and shard.tensor.size > 1:
            assert len(weight) == shard.stop - shard.start, "weight is this rank's rows of the vocabulary"
            self.targets, self.elsewhere = shard.local(targets)
            self.ranks = shard.tensor
        self.weight = weight.to(hidden.dtype)
        self.chunk = min(chunk_tokens, tokens)
        self.starts = range(0, tokens, self.chunk)
        self.accumulate = torch.promote_types(torch.promote_types(weight.dtype, hidden.dtype), torch.float32)
        self._product = hidden.new_empty(self.chunk, weight.shape[0])
        # Softmax needs fp32; where the products are fp32 already there is no second buffer.
        same = self.accumulate == hidden.dtype
        self._logits = self._product if same else self._product.new_empty(self._product.shape, dtype=self.accumulate)

    def losses(self, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [c]; exp(logits - max) [c, v], in the buffer, and its row sums [c, 1]: the softmax before division.

        Maximum and row sums are over the vocabulary of all ranks.
        """
        states = self.hidden[start : start + self.chunk]
        logits = self._logits[: len(states)]
        product = torch.mm(states, self.weight.t(), out=self._product[: len(states)])
        if product.data_ptr() != logits.data_ptr():
            logits.copy_(product)
        largest = logits.amax(dim=1, keepdim=True)
        if self.ranks is not None:
            self.ranks.all_reduce_max(largest, "activation")
        logits.sub_(largest)
        target_logits = logits.gather(1, self.targets[start : start + self.chunk, None])
        exponentials = logits.exp_()
        sums = exponentials.sum(dim=1, keepdim=True)
        if self.ranks is not None and self.elsewhere is not None:
            target_logits.masked_fill_(self.elsewhere[start : start + self.chunk, None], 0.0)
            both = torch.stack((sums, target_logits))
            self.ranks.all_reduce_sum(both, "activation")
            sums, target_logits = both
        return (sums.log() - target_logits).squeeze(1), exponentials, sums

    def logits_gradient(self, start: int, exponentials: Tensor, sums: Tensor) -> Tensor:
        """(softmax - one-hot) / n, [c, v] in the compute dtype, written over the logits."""
        share = 1.0 / len(self.hidden)
        chunk = slice(start, start + self.chunk)
        gradient = exponentials.mul_(share / sums)
        ones = torch.full_like(sums, -share)
        if self.elsewhere is not None:
            ones.masked_fill_(self.elsewhere[chunk, None], 0.0)
        gradient.scatter_add_(1, self.targets[chunk, None], ones)
        if gradient.dtype == self.hidden.dtype:
            return gradient
        return self._product[: len(gradient)].copy_(gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, shard: VocabularyShard | None
    ) -> Tensor:
        run = _Chunks(hidden, weight, targets, chunk_tokens, shard)
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
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy hands out its gradients once; call the forward again")
        hidden_gradient, weight_gradient = ctx.gradients
        # Released here, so that autograd holds the only reference and makes it .grad without a copy of V x h.
        ctx.gradients = None
        if hidden_gradient is not None:
            hidden_gradient.mul_(loss_gradient)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(loss_gradient).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None, None


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
