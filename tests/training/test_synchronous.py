"""The baselines STD and ACT: one blended stream, held against plain torch; data ranks and ZeRO change nothing."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_dept.config.schema import RunConfig
from megatron_dept.data.blend import BlendedStream
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.data.sampler import SampleStream
from megatron_dept.dept.schedule import ScheduleRule, cycle_learning_rate
from tests.support.corpus import Corpus
from tests.support.runs import final_state, largest_difference, losses, metrics, small_config
from tests.training.conftest import Finished
from tests.training.plain_run import by_checkpoint_name, first_tables, plain_run, vocabulary_size
from tests.training.test_identities import SMOOTH, TOLERANCE


def blended_batch(config: RunConfig, step: int) -> torch.Tensor:
    """Step `step`'s samples of the blend of all sources, int64 [B, L + 1]."""
    opened = [
        (source.name, DatasetDirectory.open(source.data).indexed("train")) for source in config.sources if source.data
    ]
    streams = [SampleStream(indexed, config.model.seq_length, config.seed, name) for name, indexed in opened]
    tokens = [indexed.total_tokens for _, indexed in opened]
    size = config.training.global_batch_size
    return torch.from_numpy(
        BlendedStream(streams, tokens, config.dept.std_tau, config.seed).batch(step * size, size)[0]
    )


@pytest.mark.parametrize(("variant", "tau"), [("std", 1.0), ("std", 0.0), ("act", 1.0)])
def test_a_baseline_is_plain_training_on_the_blend(
    finished: Finished, corpus: Corpus, variant: str, tau: float
) -> None:
    """ACT draws its embedding anew, and forgets the embedding's moments, at every cycle's start; its body goes on, on
    the run's schedule, while the embedding's cosine starts over."""
    sections: dict[str, Any] = {"dept": {"variant": variant, "std_tau": tau}, "optimizer": SMOOTH}
    run_dir = finished(**sections)
    config = small_config(corpus, run_dir, **sections)
    size = vocabulary_size(config)
    plain = plain_run(config, size)
    rule = ScheduleRule(3e-3, config.optimizer.min_learning_rate_ratio, 2, config.total_steps, "cosine")
    lines = metrics(run_dir, "step")
    assert len(lines) == 6
    for step, line in enumerate(lines):
        rate = embedding_rate = line["learning_rate"]
        if variant == "act":
            embedding_rate = cycle_learning_rate(step, 3, rule)
            if step % 3 == 0:
                for table, fresh in zip(
                    plain.embedding_parameters(), first_tables(config, size, "reset", step // 3), strict=True
                ):
                    table.data.copy_(fresh)
                    plain.optimizer.state.pop(table, None)
        loss, norm = plain.step(blended_batch(config, step), rate, embedding_rate)
        assert (line["loss"], line["grad_norm"]) == pytest.approx((loss, norm), rel=TOLERANCE)
    assert largest_difference(final_state(run_dir), by_checkpoint_name(plain)) < TOLERANCE


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_std_on_two_data_ranks_is_std_on_one(finished: Finished, stage: int) -> None:
    same = {"dept": {"variant": "std", "std_tau": 1.0}, "optimizer": SMOOTH}
    one, two = finished(**same), finished(2, **same, parallel={"zero_stage": stage})
    assert largest_difference(final_state(two), final_state(one)) < TOLERANCE
    assert losses(two) == pytest.approx(losses(one), rel=TOLERANCE)


def test_a_blend_draws_from_every_source_as_tau_says(corpus: Corpus, finished: Finished) -> None:
    """Tau changes what is drawn, so the two runs above did not train the same samples."""
    flat = small_config(
        corpus, finished(dept={"variant": "std", "std_tau": 0.0}, optimizer=SMOOTH), dept={"std_tau": 0.0}
    )
    proportional = small_config(corpus, flat.run_dir, dept={"std_tau": 1.0})
    draws = [np.concatenate([blended_batch(config, step) for step in range(6)]) for config in (flat, proportional)]
    assert (draws[0] != draws[1]).any()
