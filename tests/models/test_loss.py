"""The chunked loss against plain torch: values, both gradients, precision, scaling, and how much memory it takes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dept.models.loss import linear_cross_entropy, linear_cross_entropy_per_token


def inputs(n: int, h: int, v: int, seed: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=dtype)
    weight = torch.randn(v, h, generator=generator, dtype=dtype)
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def reference(hidden, weight, targets, scale=1.0):
    """(loss, dhidden, dweight) of scale * mean cross-entropy, by plain torch."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.T, targets)
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    h=st.integers(1, 17),
    v=st.integers(1, 60),
    chunk=st.integers(1, 50),
    scale=st.sampled_from([1.0, 0.25, -3.0]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_equal_plain_torch(n, h, v, chunk, scale, seed):
    hidden, weight, targets = inputs(n, h, v, seed)
    expected = reference(hidden, weight, targets, scale)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, chunk)
    (loss * scale).backward()
    for found, wanted in zip((loss.detach(), hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)  # fp64, sums in another order


def test_gradients_add_up_over_micro_batches():
    hidden, weight, targets = inputs(24, 8, 30, seed=1)
    expected = reference(hidden, weight, targets)
    weight.requires_grad_()
    parts = []
    for rows in hidden.chunk(3):
        part = rows.clone().requires_grad_()
        start = 8 * len(parts)
        (linear_cross_entropy(part, weight, targets[start : start + 8], chunk_tokens=5) / 3).backward()
        parts.append(part.grad)
    torch.testing.assert_close(weight.grad, expected[2], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat(parts), expected[1], rtol=1e-10, atol=1e-12)


def test_a_table_used_twice_gets_both_gradients():
    """Look-up and head are tied: the gradients of both uses meet on one parameter."""
    _, weight, targets = inputs(10, 6, 20, seed=2)
    tied = weight.clone().requires_grad_()
    linear_cross_entropy(F.embedding(targets, tied), tied, targets.roll(1), chunk_tokens=4).backward()
    wanted = weight.clone().requires_grad_()
    F.cross_entropy(F.embedding(targets, wanted) @ wanted.T, targets.roll(1)).backward()
    torch.testing.assert_close(tied.grad, wanted.grad, rtol=1e-10, atol=1e-12)


def test_bf16_states_on_an_fp32_master():
    hidden, weight, targets = inputs(50, 32, 70, seed=3, dtype=torch.float32)
    hidden = hidden.bfloat16().requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=16)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    expected = reference(hidden.detach().double(), weight.detach().bfloat16().double(), targets)
    # Logits of size 10 rounded to bf16's 8 bits (2^-9 relative) shift each loss by up to 0.02.
    assert loss.item() == pytest.approx(expected[0].item(), abs=0.02)
    for found, wanted in ((hidden.grad, expected[1]), (weight.grad, expected[2])):
        assert (found.double() - wanted).norm() < 0.02 * wanted.norm()


def test_the_weight_gradient_is_summed_in_fp32_over_chunks():
    """4,096 equal chunks: a bf16 sum would stand still after 256 of them."""
    n, h, v = 4096, 4, 3
    hidden = torch.ones(n, h, dtype=torch.bfloat16)
    weight = torch.zeros(v, h, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, targets, chunk_tokens=1).backward()
    expected = torch.tensor([-2 / 3, 1 / 3, 1 / 3])[:, None].expand(v, h)
    torch.testing.assert_close(weight.grad, expected, rtol=4e-3, atol=0)  # a third rounded to bf16 in each chunk


def test_many_rows_in_bf16_are_formed_in_blocks():
    hidden, weight, targets = inputs(6, 4, 9000, seed=4, dtype=torch.float32)
    weight.requires_grad_()
    linear_cross_entropy(hidden.bfloat16(), weight, targets, chunk_tokens=4).backward()
    wanted = reference(hidden.bfloat16().double(), weight.detach().bfloat16().double(), targets)[2]
    assert (weight.grad.double() - wanted).norm() < 0.02 * wanted.norm()  # bf16 rounding, as above


def test_large_logits_do_not_overflow():
    hidden, weight, targets = inputs(5, 4, 9, seed=5, dtype=torch.float32)
    expected = reference(1e4 * hidden, weight, targets)
    given = (1e4 * hidden).requires_grad_()
    loss = linear_cross_entropy(given, weight, targets, chunk_tokens=2)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(given.grad, expected[1], rtol=1e-5, atol=1e-7)  # fp32 softmax, near one-hot


@pytest.mark.parametrize(("hidden_needs", "weight_needs"), [(True, False), (False, True)])
def test_only_the_gradient_asked_for_is_given(hidden_needs, weight_needs):
    hidden, weight, targets = inputs(7, 4, 9, seed=6)
    expected = reference(hidden, weight, targets)
    hidden.requires_grad_(hidden_needs)
    weight.requires_grad_(weight_needs)
    linear_cross_entropy(hidden, weight, targets, chunk_tokens=3).backward()
    assert (hidden.grad is not None, weight.grad is not None) == (hidden_needs, weight_needs)
    found, wanted = (hidden.grad, expected[1]) if hidden_needs else (weight.grad, expected[2])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_per_token_losses():
    hidden, weight, targets = inputs(11, 4, 9, seed=7)
    weight.requires_grad_()
    found = linear_cross_entropy_per_token(hidden, weight, targets, chunk_tokens=4)
    assert not found.requires_grad
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, targets, reduction="none").detach())
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, 4).item() == pytest.approx(found.mean().item(), rel=1e-12)


def test_a_second_backward_is_refused():
    hidden, weight, targets = inputs(4, 3, 5, seed=8)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, 2)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("target", [-1, -100, 9])
def test_no_target_is_ignored_or_wrapped(target):
    hidden, weight, targets = inputs(4, 3, 9, seed=9)
    targets[2] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden.requires_grad_(), weight, targets, 2)


class Allocations(TorchDispatchMode):
    """Elements of every tensor that an operation allocates: its storage is none of the operation's inputs'."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
        result = function(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(result) if is_tensor(tensor)]
        self.sizes += [tensor.numel() for tensor in made if tensor.untyped_storage().data_ptr() not in given]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_never_exist(dtype):
    n, h, v, chunk = 96, 4, 5000, 16
    hidden, weight, targets = inputs(n, h, v, seed=10, dtype=torch.float32)
    hidden = hidden.to(dtype).requires_grad_()
    weight.requires_grad_()
    with Allocations() as seen:
        linear_cross_entropy(hidden, weight, targets, chunk).backward()
    sizes = seen.sizes
    assert max(sizes) == chunk * v
    # One buffer for the logits (and one for their bf16 form), whatever the number of chunks.
    assert sizes.count(chunk * v) == (1 if dtype == torch.float32 else 2)
    # One gradient [v, h], which becomes .grad without a copy; in bf16 also one cast of the weight.
    assert sizes.count(v * h) == (1 if dtype == torch.float32 else 2)
    # All else is of the size of the states, or of one block of rows.
    assert all(size in (chunk * v, v * h) or size <= 4096 * h for size in sizes)


def test_the_counter_would_see_plain_logits():
    hidden, weight, targets = inputs(96, 4, 5000, seed=10, dtype=torch.float32)
    with Allocations() as seen:
        F.cross_entropy(hidden @ weight.T, targets)
    assert seen.sizes.count(96 * 5000) >= 1
