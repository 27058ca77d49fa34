"""ALiBi's bias and RoPE's rotation against their papers' formulas."""

import math

import pytest
import torch

from megatron_dept.models.positions import PositionCache, Positions, alibi_bias, alibi_slopes, rope_rotation, rotate

CPU = torch.device("cpu")


def test_slopes_of_a_power_of_two_are_a_geometric_row():
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(1) == [2**-8]


def press_slopes(heads: int) -> list[float]:
    """The function of the ALiBi authors' repository, as printed there."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_two(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return power_of_two(closest) + press_slopes(2 * closest)[0::2][: heads - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 12, 16, 20, 40])
def test_slopes_are_those_of_the_authors_for_any_head_count(heads):
    # Both are powers of two with rational exponents in double precision; only the last bits may differ.
    assert alibi_slopes(heads) == pytest.approx(press_slopes(heads), rel=1e-12)


def test_bias_is_slope_times_distance_and_hides_the_future():
    bias = alibi_bias(alibi_slopes(4), 5, CPU, torch.float32)
    assert bias.shape == (1, 4, 5, 5)
    for head, slope in enumerate(alibi_slopes(4)):
        for i in range(5):
            for j in range(5):
                assert bias[0, head, i, j] == (-slope * (i - j) if j <= i else -math.inf)


def test_bias_in_bf16_is_exact_for_near_keys_far_into_a_sequence():
    bias = alibi_bias(alibi_slopes(2), 1000, CPU, torch.bfloat16)
    # Slopes are powers of two, so distances up to 2^8 are exact in bf16's eight bits wherever the query is.
    expected = -alibi_slopes(2)[0] * torch.arange(200, -1, -1).float()
    assert torch.equal(bias[0, 0, 999, 799:].float(), expected)


def test_rope_turns_each_pair_by_its_own_angle():
    size, theta, length = 8, 100.0, 7
    cosine, sine = rope_rotation(size, theta, length, CPU)
    states = torch.randn(2, 3, length, size, dtype=torch.float64)
    turned = rotate(states, cosine, sine)
    half = size // 2
    for i in range(half):
        angle = torch.arange(length, dtype=torch.float64) * theta ** (-2 * i / size)
        pair = torch.complex(states[..., i], states[..., i + half]) * torch.polar(torch.ones_like(angle), angle)
        # fp32 angles up to 7 carry 6e-8 of relative error.
        torch.testing.assert_close(turned[..., i], pair.real, rtol=0, atol=2e-6)
        torch.testing.assert_close(turned[..., i + half], pair.imag, rtol=0, atol=2e-6)


def test_rotation_keeps_the_dtype():
    cosine, sine = rope_rotation(4, 10000.0, 3, CPU)
    assert rotate(torch.randn(1, 1, 3, 4, dtype=torch.bfloat16), cosine, sine).dtype == torch.bfloat16


def test_cache_makes_again_only_for_another_length_or_dtype():
    made = []

    def make(*key):
        made.append(key)
        return Positions(bias=torch.zeros(1))

    cache = PositionCache(make)
    short, long = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    for hidden in (short, short, long, long.bfloat16(), short):
        cache(hidden)
    assert [key[0] for key in made] == [3, 5, 5, 3]
    assert made[2][2] == torch.bfloat16


def test_cache_filled_in_inference_mode_serves_training():
    cache = PositionCache(lambda length, device, dtype: Positions(bias=torch.ones(length)))
    with torch.inference_mode():
        cache(torch.zeros(1, 3, 4))
    hidden = torch.zeros(1, 3, 4, requires_grad=True)
    bias = cache(hidden).bias
    assert bias is not None
    (hidden.sum(-1) * bias).sum().backward()  # raises if the bias is an inference tensor
    assert hidden.grad is not None
