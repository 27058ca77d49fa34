"""On a GPU: whole runs beside the same on the CPU, and a GPU's checkpoint resumed on the CPU."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_dept.config.load import dump_config
from megatron_dept.config.schema import RunConfig
from tests.support.corpus import Corpus
from tests.support.distributed import free_port
from tests.support.gpu import REHEARSAL, ROOT, gpu_or_skip, run_apart, whole_run
from tests.support.runs import final_state, largest_difference, losses, small_config

pytestmark = pytest.mark.gpu

SMOOTH = {"epsilon": 1e-3, "learning_rate": 3e-3, "warmup_steps": 2}
"""With a large epsilon the update is a smooth function of the gradient, and rounding alone turns no sign."""
NESTEROV = {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9}
MATRIX: dict[str, dict[str, Any]] = {
    "trim": {"dept": {"variant": "trim"}, "parallel": {"zero_stage": 1}},
    "glob": {"dept": {"variant": "glob", "inner_state": "keep"}, "parallel": {"zero_stage": 3}},
    "glob, overlapped": {
        "dept": {"variant": "glob", "outer": NESTEROV | {"overlap": 1}},
        "parallel": {"zero_stage": 1},
    },
    "spec": {"dept": {"variant": "spec"}, "parallel": {"zero_stage": 2}},
    "spec_opt": {"dept": {"variant": "spec_opt"}, "parallel": {"zero_stage": 1}},
    "std": {"dept": {"variant": "std"}, "parallel": {"zero_stage": 1}},
}


def config_of(corpus: Corpus, run_dir: Path, precision: str, **sections: Any) -> RunConfig:
    training = {"precision": precision, "activation_checkpointing": precision == "bf16"}
    return small_config(
        corpus,
        run_dir,
        source_names=["latin", "code"],
        optimizer=SMOOTH,
        training=training,
        evaluation={"interval_rounds": 1, "max_tokens": 600},
        **sections,
    )


def test_a_gpus_checkpoint_goes_on_on_the_cpu(corpus: Corpus, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path / "run", "fp32", dept={"variant": "trim", "outer": NESTEROV})
    assert run_apart(gpu_or_skip(), whole_run, config)
    ended = final_state(config.run_dir)
    saves = sorted((config.run_dir / "checkpoints").iterdir())
    assert len(saves) == 2
    # As if the run had ended after its first round.
    shutil.rmtree(saves[1])
    assert run_apart("cpu", whole_run, config)
    # One round of three steps in fp32, sums in another order.
    assert largest_difference(final_state(config.run_dir), ended) < 1e-3


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[Any, float]]]:
    """{variant: {"gpu", "cpu": losses}}: all runs at once, each of them too small to fill a machine."""
    device, root = gpu_or_skip(), tmp_path_factory.mktemp("runs")
    jobs = []
    for variant, sections in list(MATRIX.items())[: 1 if REHEARSAL else None]:
        for where, precision in ((device, "bf16"), ("cpu", "fp32")):
            place = "gpu" if precision == "bf16" else "cpu"
            jobs.append((variant, place, where, config_of(corpus, root / f"{variant}-{place}", precision, **sections)))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda job: run_apart(job[2], whole_run, job[3]), jobs))
    found: dict[str, dict[str, dict[Any, float]]] = {}
    for variant, place, _, config in jobs:
        found.setdefault(variant, {})[place] = losses(config.run_dir)
    return found


@pytest.mark.parametrize("variant", MATRIX)
def test_bf16_runs_follow_the_cpus_in_fp32(runs: dict[str, dict[str, dict[Any, float]]], variant: str) -> None:
    if variant not in runs:
        pytest.skip("one is enough to rehearse")
    gpu, cpu = runs[variant]["gpu"], runs[variant]["cpu"]
    assert gpu.keys() == cpu.keys() and len(gpu) >= 6
    for step, loss in cpu.items():
        # bf16's 8 bits, over two rounds of three steps: on a CPU they make 1e-4 of the loss.
        assert gpu[step] == pytest.approx(loss, rel=1e-3), step


@pytest.mark.parametrize(("wire", "allowed"), [("fp32", 1e-4), ("bf16", 1e-2), ("int8", 2e-2)])
def test_two_gpus_train_what_one_does(corpus: Corpus, tmp_path: Path, wire: str, allowed: float) -> None:
    if not REHEARSAL and (gpu_or_skip(), torch.cuda.device_count())[1] < 2:
        pytest.skip("one GPU here: NCCL between two is not tried")
    if REHEARSAL:
        pytest.skip("two ranks on the CPU are what tests/training has already")
    config = config_of(corpus, tmp_path / "one", "fp32", dept={"variant": "trim", "outer": NESTEROV | {"wire": wire}})
    assert run_apart("cuda", whole_run, config)
    values = yaml.safe_load(dump_config(config))
    values |= {"run_dir": str(tmp_path / "two"), "parallel": {"silos": 2}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "pretrain_dept.py", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    # One process sends nothing. fp32: the same sums, whose order on a GPU may change from run to run; the packed wires
    # round deltas, which are a tenth of the values at most, to 8 and 7 bits.
    assert largest_difference(final_state(tmp_path / "two"), final_state(config.run_dir)) < allowed
