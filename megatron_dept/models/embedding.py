"""A source's embedding: token table, position table and the tied head, apart from the body in everything.

Shapes: b batch, s sequence, h hidden, v the source's (local) vocabulary, L rows of the position table.

Both tables are fp32 masters. Rows are cast to the compute dtype after the look-up, never the whole table; the head
casts the table once a micro-batch, and its gradient arrives in fp32 on the master.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dept.models.loss import linear_cross_entropy, linear_cross_entropy_per_token
from megatron_dept.models.tags import tag


class SourceEmbedding(nn.Module):
    """Token table `token` [v, h] and, for learned positions, `position` [L, h]; ids are the source's local ids.

    It takes the tensors as they are, without copying them: `token` and `position` must be fp32 (`ValueError`).
    """

    def __init__(
        self, token: Tensor, position: Tensor | None, compute_dtype: torch.dtype, loss_chunk_tokens: int
    ) -> None:
        super().__init__()
        for name, table in (("token", token), ("position", position)):
            if table is not None and (table.dtype != torch.float32 or table.dim() != 2):
                raise ValueError(f"{name} is {table.dtype} {tuple(table.shape)}; an embedding master is fp32 [rows, h]")
        if position is not None and position.shape[1] != token.shape[1]:
            raise ValueError(f"position has rows of {position.shape[1]}, token of {token.shape[1]}")
        self.compute_dtype = compute_dtype
        self.loss_chunk_tokens = loss_chunk_tokens
        self.token = tag(nn.Parameter(token), "embedding")
        self.position: nn.Parameter | None = None
        if position is not None:
            self.position = tag(nn.Parameter(position), "embedding")

    def embed(self, local_ids: Tensor) -> Tensor:
        """Local ids [b, s] int64 -> [b, s, h] in the compute dtype, learned positions added.

        Raises `ValueError` for a sequence longer than the position table, `IndexError` for an id outside it.
        """
        rows = F.embedding(local_ids, self.token)
        if self.position is not None:
            length = local_ids.shape[1]
            if length > len(self.position):
                raise ValueError(f"a sequence of {length} tokens has only {len(self.position)} learned positions")
            rows = rows + self.position[:length]
        return rows.to(self.compute_dtype)

    forward = embed

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of hidden [b, s, h] against local ids [b, s]: fp32 scalar, softmax over v alone."""
        return linear_cross_entropy(hidden.flatten(0, 1), self.token, targets.flatten(), self.loss_chunk_tokens)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token, [b, s] fp32, without gradients; arguments as in `loss`."""
        losses = linear_cross_entropy_per_token(
            hidden.flatten(0, 1), self.token, targets.flatten(), self.loss_chunk_tokens
        )
        return losses.view(targets.shape)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """All logits [b, s, v] of hidden [b, s, h]: for the parity check of an export, on short text only."""
        return hidden @ self.token.to(hidden.dtype).t()
