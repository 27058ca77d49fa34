"""What attention knows of positions: the ALiBi bias and the RoPE rotation, made for the length actually seen.

Shapes: b batch, s sequence, a attention heads, d head size. Learned positions are not here: their table is the
embedding's. Nothing is a buffer: ZeRO-3 trips on buffers, and a bf16 cast of a module would round them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """Per-forward tensors every layer's attention reads; all None for learned positions."""

    bias: Tensor | None = None  # [1, a, s, s], compute dtype: ALiBi and causal mask in one
    cosine: Tensor | None = None  # [s, d], fp32
    sine: Tensor | None = None  # [s, d], fp32


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head (Press et al., 2022, and their code for head counts that are no power of two).

    n a power of two: 2^(-8/n), 2^(-16/n), ...; else those of the power of two below, then every second slope of the
    power of two above, as many as are missing.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / below) for head in range(below)]
    return slopes + [2.0 ** (-4.0 * (2 * head + 1) / below) for head in range(heads - below)]


def alibi_bias(slopes: list[float], length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Bias [1, a, s, s] to add to the attention scores: -slope * (i - j) for keys j <= query i, -inf for later keys.

    `slopes` of the a heads that are here.
    Made in fp32 from the distance, not from the key's index alone: that would round the near distances, the ones that
    count, in bf16.
    """
    steps = torch.arange(length, device=device, dtype=torch.float32)
    distance = steps[:, None] - steps[None, :]
    factors = torch.tensor(slopes, device=device, dtype=torch.float32)
    bias = distance * -factors[:, None, None]
    return bias.masked_fill_(distance < 0, -math.inf).to(dtype)[None]


def rope_rotation(head_size: int, theta: float, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [s, d] fp32 of RoPE (Su et al., 2021) in Hugging Face's layout: the two halves of a head pair up.

    Pair i (dimensions i and i + d/2) turns by position * theta ** (-2i / d).
    """
    exponents = torch.arange(0, head_size, 2, device=device, dtype=torch.int64).float() / head_size
    frequencies = 1.0 / theta**exponents
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn queries or keys [b, a, s, d] by their position; computed in fp32, returned in their own dtype."""
    first, second = states.chunk(2, dim=-1)
    return (states * cosine + torch.cat((-second, first), dim=-1) * sine).to(states.dtype)


class PositionCache:
    """Keeps the positions of the last (length, device, dtype), so that a step does not make them again.

    A plain attribute of one body, never shared: no module-level state, no buffer, nothing in a state dict. Hidden
    states are one of `split` equal parts of the sequences that positions are made for.
    """

    def __init__(self, make: Callable[[int, torch.device, torch.dtype], Positions], split: int = 1) -> None:
        self._make = make
        self._split = split
        self._key: tuple[int, torch.device, torch.dtype] | None = None
        self._value = Positions()

    def __call__(self, hidden: Tensor) -> Positions:
        """Positions for `hidden` [b, s / split, h]."""
        key = (hidden.shape[1] * self._split, hidden.device, hidden.dtype)
        if key != self._key:
            # A tensor made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                self._value = self._make(*key)
            self._key = key
        return self._value
