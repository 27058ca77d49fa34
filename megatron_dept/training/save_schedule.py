"""When checkpoints are due: pure functions of the configuration that every rank evaluates alike."""

from megatron_dept.config.schema import CheckpointConfig


def save_steps(checkpoint: CheckpointConfig, round: int, n_local: int, first_common: int) -> set[int]:
    """Steps of `round`'s local phases after which all silos save: only those that every silo still has before it.

    `first_common`: steps that the silo furthest on has done.
    """
    if checkpoint.save_interval_unit != "steps" or not checkpoint.save_interval:
        return set()
    base = round * n_local
    return {step for step in range(first_common + 1, n_local) if (base + step) % checkpoint.save_interval == 0}


def is_due_after(checkpoint: CheckpointConfig, round: int, n_local: int) -> bool:
    """Whether all save at the end of `round`."""
    if not checkpoint.save_interval:
        return False
    if checkpoint.save_interval_unit == "rounds":
        return (round + 1) % checkpoint.save_interval == 0
    return (round + 1) * n_local % checkpoint.save_interval == 0
