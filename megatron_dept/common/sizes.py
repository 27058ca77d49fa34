"""Sizes that several rooms must agree on."""

FP32_BYTES = 4
"""Of one element of what silos exchange, and of masters, moments and gradients."""
LARGEST_BUCKET = 50_000_000
"""Elements of a reduction bucket at most; DeepSpeed allocates it whole, so small bodies get a small one."""
PENDING_ON_DISK = 256 << 20
"""Bytes of a round's row deltas that wait in memory where row tables lie on disk."""
