"""A source's embedding: token table, position table and the tied head, apart from the body in everything.

Shapes: b batch, s sequence, h hidden, v the source's (local) vocabulary, L rows of the position table, T tensor ranks.

Both tables are fp32 masters. Rows are cast to the compute dtype after the look-up, never the whole table; the head
casts the table once a micro-batch, and its gradient arrives in fp32 on the master.

Over tensor ranks the token table is cut by rows (Megatron-LM's vocabulary parallelism, Shoeybi et al., 2019), and the
position table is on the first of them.
"""

import torch
from torch import Tensor, nn

from megatron_dept.models.loss import linear_cross_entropy, linear_cross_entropy_per_token
from megatron_dept.models.tags import tag
from megatron_dept.models.vocabulary_shard import VocabularyShard
from megatron_dept.ops.remap import remap_lookup, remap_lookup_adding_gradient
from megatron_dept.tensor_parallel.group import ALONE
from megatron_dept.tensor_parallel.mappings import leave_ranks
from megatron_dept.tensor_parallel.shards import Rows, cut_by_rows, mark


class SourceEmbedding(nn.Module):
    """Token table `token` [v, h] and, for learned positions, `position` [L, h]; ids are the source's local ids.

    With a `shard` of several tensor ranks `token` is this rank's rows of it, `position` None on all but the first.
    After a backward of `loss` the gradients of both are complete: nothing is left to reduce over the tensor ranks.

    It takes the tensors as they are, without copying them: `token` and `position` must be fp32 (`ValueError`).
    """

    def __init__(
        self,
        token: Tensor,
        position: Tensor | None,
        compute_dtype: torch.dtype,
        loss_chunk_tokens: int,
        shard: VocabularyShard | None = None,
    ) -> None:
        super().__init__()
        for name, table in (("token", token), ("position", position)):
            if table is not None and (table.dtype != torch.float32 or table.dim() != 2):
                raise ValueError(f"{name} is {table.dtype} {tuple(table.shape)}; an embedding master is fp32 [rows, h]")
        if position is not None and position.shape[1] != token.shape[1]:
            raise ValueError(f"position has rows of {position.shape[1]}, token of {token.shape[1]}")
        self.shard = VocabularyShard(ALONE, len(token)) if shard is None else shard
        if len(token) != self.shard.stop - self.shard.start:
            raise ValueError(f"token has {len(token)} rows; this rank holds {self.shard.start}..{self.shard.stop - 1}")
        if position is not None and self.shard.tensor.rank:
            raise ValueError("position belongs to the first tensor rank; give None elsewhere")
        self.compute_dtype = compute_dtype
        self.loss_chunk_tokens = loss_chunk_tokens
        rows = Rows(self.shard.start, self.shard.stop)
        self.token = tag(nn.Parameter(token), "embedding")
        mark(self.token, cut_by_rows((self.shard.total, token.shape[1]), (rows,)))
        self.position: nn.Parameter | None = None
        if position is not None:
            self.position = tag(nn.Parameter(position), "embedding")

    def embed(self, local_ids: Tensor, hooked: bool = False) -> Tensor:
        """Local ids [b, s] int64 -> [b, s, h] in the compute dtype, learned positions added.

        [b, s/T, h] where the shard splits the sequence. Raises `ValueError` for a sequence longer than the position
        table, `IndexError` for an id outside the vocabulary (on a GPU a failed assertion there, as nothing is read).

        The backward adds the rows that were looked up to `token.grad`, beside the head's gradient, itself: it makes no
        second [v, h]. Who depends on autograd's hooks on `token` (a DeepSpeed engine that owns it) says `hooked`.
        """
        length = local_ids.shape[1]
        if self.position is not None and length > len(self.position):
            raise ValueError(f"a sequence of {length} tokens has only {len(self.position)} learned positions")
        self._refuse_foreign(local_ids)
        look_up = remap_lookup if hooked else remap_lookup_adding_gradient
        ids = local_ids.contiguous()
        if self.shard.tensor.size == 1:
            return look_up(ids, None, self.token, self.position, self.compute_dtype)
        rows = look_up(ids, None, self.token, self.position, torch.float32, self.shard.start)
        # Summed in fp32, so that row and position are rounded once, as on one rank.
        return leave_ranks(rows, self.shard.tensor, self.shard.sequence_parallel).to(self.compute_dtype)

    forward = embed

    def _refuse_foreign(self, ids: Tensor) -> None:
        """Another shard's row counts as zeros in the look-up, so an id that is no shard's must not come there."""
        total = self.shard.total
        if ids.device.type != "cpu":
            torch._assert_async(((ids >= 0) & (ids < total)).all(), f"an id is outside the vocabulary of {total}")
        elif ids.numel():
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= total:
                raise IndexError(f"id {low if low < 0 else high} is out of range: the vocabulary has {total}")

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of hidden [b, s, h] against local ids [b, s]: fp32 scalar, softmax over v alone.

        Equal on all tensor ranks; hidden is [b, s/T, h] where the shard splits the sequence.
        """
        return linear_cross_entropy(hidden, self.token, targets, self.loss_chunk_tokens, self.shard)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token, [b, s] fp32, without gradients; arguments as in `loss`."""
        losses = linear_cross_entropy_per_token(hidden, self.token, targets, self.loss_chunk_tokens, self.shard)
        return losses.view(targets.shape)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """All logits [b, s, v] of hidden [b, s, h]: for an export's parity check, on short text, on one rank."""
        assert self.shard.tensor.size == 1, "the logits of all tensor ranks are gathered nowhere"
        return hidden @ self.token.to(hidden.dtype).t()
