"""Perplexity and bits per byte of a bigram model, against the stream's sums in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron_dept.evaluation.heldout import heldout_windows
from megatron_dept.evaluation.perplexity import Score, module_forward, score

streams = st.lists(st.sampled_from([1, 50, 258, 259, 260, 262]), min_size=2, max_size=70)


def bigram(vocab_size, seed=3):
    """A forward whose loss of a target depends on its input alone, and the table of its losses, fp32 [v, v]."""
    table = np.random.default_rng(seed).uniform(0.1, 9, (vocab_size, vocab_size)).astype(np.float32)
    return lambda inputs, targets: torch.from_numpy(table)[inputs, targets], table


@given(streams, st.integers(1, 12), st.integers(1, 5))
def test_scores_are_the_sums_over_the_stream(dataset, tokenizer, stream, seq_length, batch):
    forward, table = bigram(tokenizer.vocab_size)
    found = score(forward, heldout_windows(dataset([stream]), seq_length), batch)
    losses = table[stream[:-1], stream[1:]].astype(np.float64)
    sizes = np.array([len(tokenizer.token_bytes()[token]) for token in stream[1:]])
    # fp32 losses summed in float64 on both sides: only the order of at most 70 additions differs.
    assert found.nats == pytest.approx(losses.sum(), rel=1e-13)
    assert found.text_nats == pytest.approx(losses[sizes > 0].sum(), rel=1e-13)
    assert (found.tokens, found.text_bytes) == (len(stream) - 1, sizes.sum())
    assert found.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-12)
    if sizes.sum():
        bits = -np.log2(np.exp(-losses[sizes > 0])).sum() / sizes.sum()
        assert found.bits_per_byte == pytest.approx(bits, rel=1e-12)


def test_a_uniform_model_by_hand(dataset, tokenizer):
    text = heldout_windows(dataset([[258, 259, 1, 260, 1]]), 3)  # targets: zwölf (6 bytes), eod, 日本 (6 bytes), eod
    found = score(lambda inputs, targets: torch.full(targets.shape, math.log(8)), text, 2)
    assert found.perplexity == pytest.approx(8, rel=1e-6)  # the losses are fp32: log 8 is wrong by 2^-24
    assert found.bits_per_byte == pytest.approx(2 * 3 / 12, rel=1e-6)  # 3 bits for each of the two words
    assert found.nats_per_token == pytest.approx(math.log(8), rel=1e-6)


def test_what_stands_behind_the_end_has_no_part(dataset, tokenizer):
    text = heldout_windows(dataset([[258, 259, 260]]), 8)

    def forward(inputs, targets):
        losses = torch.full(targets.shape, math.nan)
        losses[0, :2] = 1.0
        return losses

    assert score(forward, text, 1) == Score(2.0, 2, 2.0, 12)


def test_a_nan_that_is_scored_is_not_hidden(dataset):
    text = heldout_windows(dataset([[258, 259, 260]]), 2)
    found = score(lambda inputs, targets: torch.full(targets.shape, math.nan), text, 1)
    assert math.isnan(found.perplexity) and math.isnan(found.bits_per_byte)


@given(streams, st.integers(1, 4))
def test_shares_add_up_to_the_whole(dataset, tokenizer, stream, ranks):
    forward, _ = bigram(tokenizer.vocab_size)
    text = heldout_windows(dataset([stream]), 3)
    calls, parts = [], []
    for rank in range(ranks):
        parts.append(score(forward, text.share(rank, ranks), 2, calls.append))
    whole, total = score(forward, text, 2), sum(parts, Score(0.0, 0, 0.0, 0))
    assert (total.tokens, total.text_bytes) == (whole.tokens, whole.text_bytes)
    assert total.nats == pytest.approx(whole.nats, rel=1e-13)  # float64, another order of addition
    assert sum(calls) == ranks * -(-len(text.windows) // ranks)


def test_scores_without_text_or_tokens_are_nan_and_an_overflow_is_infinite():
    assert math.isnan(Score(1.0, 1, 0.0, 0).bits_per_byte)
    assert math.isnan(Score(0.0, 0, 0.0, 0).perplexity)
    assert Score(5000.0, 1, 5000.0, 1).perplexity == math.inf


def test_plain_modules_are_scored_without_gradients():
    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))

        def forward(self, ids):
            return self.token[ids]

        def token_losses(self, hidden, targets):
            assert not hidden.requires_grad
            logits = hidden @ self.token.T
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
                targets
            )

    class Text:
        windows = np.array([[0, 1, 2, 3], [3, 4, 0, 0]])
        scored = np.array([3, 1])
        bytes_per_token = np.array([0, 1, 1, 2, 3])

    embedding = Embedding()
    found = score(module_forward(nn.Identity(), embedding), Text, 2)
    table = embedding.token.detach().double().numpy()
    logits = table[[0, 1, 2, 3]] @ table.T
    losses = np.log(np.exp(logits).sum(1)) - logits[range(4), [1, 2, 3, 4]]
    assert found.nats == pytest.approx(losses.sum(), rel=1e-5)  # fp32 logits of size ~5: 1e-6 each
    assert (found.tokens, found.text_bytes) == (4, 7)
