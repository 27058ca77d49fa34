"""The bodies: causal, aware of positions, the same under recomputation, nothing that ZeRO trips on."""

import copy

import pytest
import torch

from megatron_dept.models.attention import split_qkv
from megatron_dept.models.build import body_from_state, build_body
from megatron_dept.models.tags import check_tagged


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_every_parameter_is_the_bodys_and_there_is_no_buffer(config):
    body = build_body(config, seed=1)
    check_tagged(body, "body")
    assert list(body.buffers()) == []
    assert all(parameter.dtype == torch.float32 and parameter.is_leaf for parameter in body.parameters())
    # Each parameter stands in a leaf module, where ZeRO-3's hooks gather it.
    assert all(not list(m.parameters(recurse=False)) or not list(m.children()) for m in body.modules())


def test_a_later_token_never_changes_an_earlier_hidden_state(config, randomised):
    body = randomised(config)
    hidden = torch.randn(2, 9, config.hidden_size)
    changed = hidden.clone()
    changed[:, 6:] = torch.randn(2, 3, config.hidden_size)
    before, after = body(hidden), body(changed)
    # The first rows do not depend on the later ones, but other kernel blocks may round them otherwise.
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-5)
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["gpt-alibi", "llama"])
def test_alibi_and_rope_see_the_order_of_earlier_tokens(kind, make_config, randomised):
    config = make_config(kind)
    body = randomised(config)
    hidden = torch.randn(1, 4, config.hidden_size)
    swapped = hidden[:, [1, 0, 2, 3]]
    assert (body(hidden)[:, 3] - body(swapped)[:, 3]).abs().max() > 1e-3


def test_gpt_without_its_table_does_not(make_config, randomised):
    config = make_config("gpt", num_layers=1)
    body = randomised(config)
    hidden = torch.randn(1, 4, config.hidden_size)
    # One layer's attention over a set is a sum in another order: rounding only.
    torch.testing.assert_close(body(hidden)[:, 3], body(hidden[:, [1, 0, 2, 3]])[:, 3], rtol=0, atol=1e-5)


def test_alibi_equals_attention_written_out(make_config, randomised):
    """One layer's attention against softmax(q k / sqrt(d) - slope (i - j)) v in plain loops over heads."""
    config = make_config("gpt-alibi")
    body = randomised(config)
    attention = body.layers["0"].attention
    hidden = torch.randn(1, 7, config.hidden_size)
    query, key, value = (
        torch.nn.functional.linear(hidden[0], weight, bias).view(7, config.num_attention_heads, -1)
        for weight, bias in zip(
            split_qkv(attention.qkv.weight, config), split_qkv(attention.qkv.bias, config), strict=True
        )
    )
    # Six heads: the four slopes of 4 heads, then every second of the eight of 8 heads.
    slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    heads = []
    steps = torch.arange(7)
    for head, slope in enumerate(slopes):
        scores = query[:, head] @ key[:, head].T / config.head_size**0.5
        scores = scores - slope * (steps[:, None] - steps[None, :])
        scores = scores.masked_fill(steps[None, :] > steps[:, None], float("-inf"))
        heads.append(scores.softmax(-1) @ value[:, head])
    expected = attention.projection(torch.cat(heads, dim=-1))
    found = attention(hidden, body._positions(hidden))[0]
    # fp32 sums over 48 terms in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_recomputing_activations_changes_nothing(config):
    hidden = torch.randn(2, 8, config.hidden_size)
    results = []
    for recompute in (False, True):
        body = build_body(config, seed=3, activation_checkpointing=recompute)
        given = hidden.clone().requires_grad_()
        output = body(given)
        output.square().sum().backward()
        results.append([output, given.grad, *(parameter.grad for parameter in body.parameters())])
    # The same kernels on the same numbers: bitwise.
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


def test_recomputing_keeps_fewer_activations(make_config):
    config = make_config("gpt", num_layers=6)
    kept = []
    for recompute in (False, True):
        body = build_body(config, seed=3, activation_checkpointing=recompute)
        parameters = {parameter.data_ptr() for parameter in body.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor, sizes=sizes, parameters=parameters):
            if tensor.data_ptr() not in parameters:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            body(torch.randn(2, 16, config.hidden_size, requires_grad=True))
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 4


def test_bf16_follows_fp32(config):
    body = build_body(config, seed=3)
    hidden = torch.randn(2, 16, config.hidden_size)
    expected = body(hidden)
    found = copy.deepcopy(body).to(torch.bfloat16)(hidden.bfloat16())
    assert found.dtype == torch.bfloat16
    # bf16 keeps 8 bits, so 4e-3 a rounding, over a few dozen roundings in two layers; outputs are of size 1.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=6e-2)


def test_one_body_serves_every_length_in_turn(config, randomised):
    body = randomised(config)
    hidden = torch.randn(1, 16, config.hidden_size)
    whole = body(hidden)
    for length in (1, 5, 16, 3):
        # Causal: a prefix alone gives the prefix's states; kernels may round blocks of other sizes otherwise.
        torch.testing.assert_close(body(hidden[:, :length]), whole[:, :length], rtol=0, atol=1e-5)


def test_body_from_state_is_that_body(config, randomised):
    body = randomised(config)
    again = body_from_state(config, dict(body.named_parameters()))
    check_tagged(again, "body")
    hidden = torch.randn(1, 5, config.hidden_size)
    assert torch.equal(body(hidden), again(hidden))


def test_body_from_state_of_another_model_is_refused(make_config):
    state = dict(build_body(make_config("gpt"), seed=1).named_parameters())
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up\.weight: \(80, 48\), not \(96, 48\)"):
        body_from_state(make_config("gpt", ffn_hidden_size=96), state)
    with pytest.raises(ValueError, match="absent"):
        body_from_state(make_config("gpt", num_layers=3), state)
