"""When checkpoints and validations are due: pure functions of the configuration that every rank evaluates alike."""

from megatron_dept.config.schema import CheckpointConfig, EvaluationConfig, RunConfig


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


def validates(evaluation: EvaluationConfig, round: int) -> bool:
    """Whether all sources are validated at the end of `round`."""
    return bool(evaluation.interval_rounds) and (round + 1) % evaluation.interval_rounds == 0


def waiting_rounds(config: RunConfig) -> int:
    """Rounds of the run whose exchange is waited for as they end, overlap or not: a save or a validation needs it."""
    rounds, n_local = config.dept.rounds, config.dept.n_local
    return sum(
        round == rounds - 1 or validates(config.evaluation, round) or is_due_after(config.checkpoint, round, n_local)
        for round in range(rounds)
    )
