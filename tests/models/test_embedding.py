"""The source's embedding: look-up, positions, tied head, gradients on the fp32 masters."""

import pytest
import torch
import torch.nn.functional as F

from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.initialise import init_rows
from megatron_dept.models.tags import check_tagged

V, H, L = 31, 12, 8


def make(position: bool = True, dtype: torch.dtype = torch.float32) -> SourceEmbedding:
    table = init_rows(0, L, H, 0.5, 1, "position") if position else None
    return SourceEmbedding(init_rows(0, V, H, 0.5, 1, "token"), table, dtype, loss_chunk_tokens=3)


IDS = torch.tensor([[3, 0, 3, 30, 7], [1, 1, 2, 3, 4]])


def test_both_tables_are_tagged():
    embedding = make()
    check_tagged(embedding, "embedding")
    assert [name for name, _ in embedding.named_parameters()] == ["token", "position"]
    assert [name for name, _ in make(position=False).named_parameters()] == ["token"]


def test_embed_is_row_plus_position():
    embedding = make()
    assert torch.equal(embedding(IDS), embedding.token[IDS] + embedding.position[:5])
    without = make(position=False)
    assert torch.equal(without.embed(IDS), without.token[IDS])


def test_bf16_rounds_the_sum_once():
    embedding = make(dtype=torch.bfloat16)
    found = embedding.embed(IDS)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (embedding.token[IDS] + embedding.position[:5]).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_arrive_in_fp32_on_the_masters(dtype):
    embedding = make(dtype=dtype)
    hidden = embedding.embed(IDS)
    embedding.loss(hidden, IDS.roll(-1, 1)).backward()
    token, position = (parameter.detach().double().requires_grad_() for parameter in embedding.parameters())
    states = token[IDS] + position[:5]
    F.cross_entropy((states @ token.T).flatten(0, 1), IDS.roll(-1, 1).flatten()).backward()
    # bf16: 2^-9 relative a rounding, a few of them on the way; fp32: its rounding over sums of 31.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    for ours, theirs in ((embedding.token, token), (embedding.position, position)):
        assert ours.grad is not None and ours.grad.dtype == torch.float32
        assert (ours.grad.double() - theirs.grad).norm() < tolerance * theirs.grad.norm()
    assert not embedding.position.grad[5:].any()


def test_token_losses_have_the_loss_as_their_mean():
    embedding = make()
    hidden = torch.randn(2, 5, H)
    losses = embedding.token_losses(hidden, IDS)
    assert losses.shape == (2, 5) and losses.dtype == torch.float32 and not losses.requires_grad
    expected = F.cross_entropy(embedding.logits(hidden).flatten(0, 1), IDS.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), expected, rtol=1e-6, atol=1e-6)  # fp32 logsumexp, two orders
    assert losses.mean().item() == pytest.approx(embedding.loss(hidden, IDS).item(), rel=1e-6)


def test_tables_are_taken_as_they_are():
    token = init_rows(0, V, H, 0.5, 1, "token")
    assert SourceEmbedding(token, None, torch.float32, 8).token.data_ptr() == token.data_ptr()


def test_a_sequence_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="9 tokens has only 8 learned positions"):
        make().embed(torch.zeros(1, 9, dtype=torch.int64))


def test_masters_must_be_fp32_and_of_one_width():
    with pytest.raises(ValueError, match="token is torch.bfloat16"):
        SourceEmbedding(torch.zeros(V, H, dtype=torch.bfloat16), None, torch.bfloat16, 8)
    with pytest.raises(ValueError, match="position has rows of 4"):
        SourceEmbedding(torch.zeros(V, H), torch.zeros(L, 4), torch.float32, 8)
