"""outer.overlap: a round's body exchange in the background of the next, its update applied after so many inner steps."""

from typing import Any

import pytest
import torch

from megatron_dept.config.schema import RunConfig
from tests.support.corpus import Corpus
from tests.support.runs import final_state, largest_difference, small_config
from tests.training.conftest import Finished
from tests.training.plain_run import by_checkpoint_name, plain_run, source_batch, vocabulary_size
from tests.training.test_identities import PLAIN_SGD, TOLERANCE

NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}
SELDOM = {"save_interval": 0}
"""A save waits for the exchange: only the end is saved."""


def overlapped(overlap: int = 2, rounds: int = 3, **outer: Any) -> dict[str, Any]:
    return {"dept": {"rounds": rounds, "outer": {**NESTEROV, "overlap": overlap, **outer}}, "checkpoint": SELDOM}


def merged(sections: dict[str, Any], **dept: Any) -> dict[str, Any]:
    """`sections` with more of the section dept."""
    return {**sections, "dept": {**sections["dept"], **dept}}


@pytest.mark.parametrize("overlap", [1, 3])
def test_a_run_is_the_delayed_rule_in_plain_torch(finished: Finished, corpus: Corpus, overlap: int) -> None:
    """GLOB with plain SGD, three sources, three rounds: phases begin with theta_t, add theta_(t+1) - theta_t after
    `overlap` steps, and are held against theta_(t+1). The shared rows, which every source holds, are of the round before.
    """
    sections = merged(overlapped(overlap), variant="glob")
    sections["optimizer"] = {**PLAIN_SGD["optimizer"], "learning_rate": 0.1}
    run_dir = finished(2, **sections, parallel={"silos": 2})
    config = small_config(corpus, run_dir, **sections)
    expected = _plain_delayed(config, overlap)
    assert largest_difference(final_state(run_dir), expected) < TOLERANCE
    at_once = finished(2, **merged(sections, outer=NESTEROV), parallel={"silos": 2})
    assert largest_difference(final_state(at_once), expected) > 100 * TOLERANCE, "the delay must tell"


def _plain_delayed(config: RunConfig, overlap: int) -> dict[str, torch.Tensor]:
    """The final state of `config` under the delayed rule, by checkpoint name."""
    local = plain_run(config, vocabulary_size(config))
    new = {name: value.clone() for name, value in by_checkpoint_name(local).items()}
    momentum = {name: torch.zeros_like(value) for name, value in new.items()}
    parameters = dict(zip(new, [*local.body.parameters(), local.token, local.position], strict=True))
    old = new
    for round in range(config.dept.rounds):
        deltas = []
        for source in config.sources:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(old[name] if name.startswith("body/") else new[name])
            for step in range(config.dept.n_local):
                local.step(source_batch(config, source.name, round * config.dept.n_local + step), 0.1)
                if step + 1 == overlap:
                    with torch.no_grad():
                        for name, parameter in parameters.items():
                            parameter += new[name] - old[name] if name.startswith("body/") else 0
            deltas.append({name: new[name] - parameter.detach() for name, parameter in parameters.items()})
        old, new = new, {}
        for name, value in old.items():
            mean = sum(delta[name] for delta in deltas) / len(deltas)
            momentum[name] = 0.9 * momentum[name] + mean
            new[name] = value - 0.7 * (mean + 0.9 * momentum[name])
    return new
