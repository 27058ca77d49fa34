"""The fused head and loss beside torch's `cross_entropy` over all logits: CPU-seconds of forward and backward.

    python benchmarks/loss.py

2,048 tokens, fp32, one thread; variants are interleaved and the best of three counts.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dept.models.loss import linear_cross_entropy

TOKENS, REPEATS, CHUNKS = 2048, 3, (128, 256, 512, 1024)
SHAPES = [(hidden, vocabulary) for hidden in (128, 256) for vocabulary in (8_000, 20_000, 50_000)]


def cpu_seconds(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> float:
    """One forward and backward to both inputs."""
    states, table = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    began = time.process_time()
    loss(states, table).backward()
    return time.process_time() - began


def main() -> None:
    torch.set_num_threads(1)
    print("| h, V | cross_entropy | " + " | ".join(f"chunk {chunk}" for chunk in CHUNKS) + " |")
    print("|---" * (len(CHUNKS) + 2) + "|")
    for width, vocabulary in SHAPES:
        hidden, weight = torch.randn(TOKENS, width), torch.randn(vocabulary, width) * 0.02
        targets = torch.randint(0, vocabulary, (TOKENS,))
        losses: list[Callable[[Tensor, Tensor], Tensor]] = [lambda h, w, t=targets: F.cross_entropy(h @ w.t(), t)]  # type: ignore[misc]
        losses += [lambda h, w, t=targets, c=chunk: linear_cross_entropy(h, w, t, c) for chunk in CHUNKS]  # type: ignore[misc]
        best = [float("inf")] * len(losses)
        for _ in range(REPEATS):
            for index, loss in enumerate(losses):
                best[index] = min(best[index], cpu_seconds(loss, hidden, weight))
        print(f"| {width}, {vocabulary:,} | " + " | ".join(f"{seconds:.3f}" for seconds in best) + " |", flush=True)


if __name__ == "__main__":
    main()
