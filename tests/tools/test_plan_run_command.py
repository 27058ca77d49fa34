"""tools/plan_run.py as a command: clusters it reads and refuses, what it prints, and the JSON that others read."""

import json
import subprocess
import sys
from pathlib import Path

import plan_run
import pytest
from run_plan.cluster import DEVICES, load_cluster
from run_plan.models import MODELS

from megatron_dept.common.errors import ConfigError
from megatron_dept.training.hardware import DATASHEET_TFLOPS

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = sorted((ROOT / "examples" / "clusters").glob("*.yaml"))


@pytest.mark.parametrize(
    "change, told",
    [
        ("device: H900", "device H900 is unknown; choose one of B200,"),
        ("gpus: 8", "unknown field gpus; known fields: name,"),
        ("gpus_per_node: 0", "gpus_per_node: Input should be greater than 0"),
        ("infiniband_gbits_per_node: 100", "give one of infiniband_gbits_per_gpu and infiniband_gbits_per_node"),
        ("device: null", "neither a device nor both peak_tflops and memory_gb"),
    ],
)
def test_clusters_that_are_none(tmp_path, change, told):
    field = change.split(":")[0]
    lines = [line for line in CLUSTERS[1].read_text().splitlines() if not line.startswith(f"{field}:")]
    (tmp_path / "cluster.yaml").write_text("\n".join([*lines, change]))
    with pytest.raises(ConfigError, match=told) as caught:
        load_cluster(tmp_path / "cluster.yaml")
    assert str(caught.value).startswith(f"{tmp_path}/cluster.yaml: ") and "\n" not in str(caught.value)


def test_devices_are_those_that_mfu_is_measured_against():
    assert {name: DEVICES[name][0] for name in DATASHEET_TFLOPS} == DATASHEET_TFLOPS


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda path: path.stem)
def test_every_cluster_plans_every_model(file, tmp_path, capsys):
    """All variants, and one to 1,024 silos; what is too large for a device is planned and said to be."""
    assert len(CLUSTERS) >= 3
    silos = ["--silos", "1", "2", "1024"]
    variants = ["--variant", "std", "act", "glob", "trim", "spec", "spec_opt"]
    output = tmp_path / "plan.json"
    command = ["--cluster", str(file), "--model", *MODELS, *silos, *variants, "--json", str(output)]
    assert plan_run.main(command) == 0
    plans = json.loads(output.read_text())["plans"]
    assert len(plans) == len(MODELS) * 3 * 6
    printed = capsys.readouterr().out
    assert all(name in printed for name in MODELS) and "too much" in printed
    assert {plan["fits"] for plan in plans if plan["model"] == "llama-70b"} == {False}
    by_key = {(plan["model"], plan["variant"], plan["cut"]["silos"]): plan for plan in plans}
    for name in MODELS:
        alone = [by_key[name, variant, 1] for variant in ("glob", "trim", "spec", "spec_opt")]
        assert all(plan["round_seconds"]["exchange"] == 0 for plan in alone), "one silo has nobody to tell"
        many = {
            variant: by_key[name, variant, 1024]["round_seconds"] for variant in ("std", "glob", "trim", "spec_opt")
        }
        assert many["spec_opt"]["exchange"] < many["trim"]["exchange"] < many["glob"]["exchange"]
        assert many["glob"]["total"] < many["std"]["total"]


SCHEMA = {
    "model": str, "variant": str, "rows": int, "n_local": int, "cut": dict, "body_parameters": int,
    "layers_of_stages": list, "bubble": float, "memory": dict, "memory_of_stages": list, "fits": bool,
    "bytes_of_round": list, "step_seconds": dict, "round_seconds": dict, "busy": float, "tokens_per_second": float,
    "paper": dict,
}  # fmt: skip
MEMORY = {
    "weights",
    "gathered",
    "gradients",
    "buckets",
    "masters",
    "moments",
    "outer",
    "embedding",
    "activations",
    "logits",
    "host",
    "row_table",
    "row_deltas",
    "row_files",
    "device",
}
CUT = {
    "silos", "pipe", "data", "tensor", "zero_stage", "precision", "sequence_parallel", "activation_checkpointing",
    "micro_batch", "global_batch", "loss_chunk_tokens", "micro_batches", "optimizer_moments", "ranks",
    "offload_optimizer", "rows_on_disk", "separate", "overlap", "turns", "wire", "bucket_mb",
    "all_ranks", "all_embedding_ranks",
}  # fmt: skip


def test_the_json_keeps_its_shape(tmp_path):
    """What others read: a change here is a change of format_version."""
    output = tmp_path / "plan.json"
    flags = ["--tensor", "8", "--pipe", "2", "--sequence-parallel", "--activation-checkpointing", "--outer-momentum"]
    plan_run.main(["--cluster", str(CLUSTERS[1]), "--model", "llama-7b", *flags, "--json", str(output)])
    found = json.loads(output.read_text())
    assert found["format_version"] == 3 and found["cluster"] == load_cluster(CLUSTERS[1]).model_dump(mode="json")
    for plan in found["plans"]:
        assert {name: type(value) for name, value in plan.items()} == SCHEMA
        assert set(plan["memory"]) == MEMORY | {"stage"} and set(plan["cut"]) == CUT
        assert [set(stage) for stage in plan["memory_of_stages"]] == [MEMORY] * 2
        assert set(plan["step_seconds"]) == {"arithmetic", "tensor", "bubble", "pipe", "data", "between_silos", "total"}
        assert set(plan["round_seconds"]) == {"inner_steps", "exchange", "hidden", "total"}
        for flow in plan["bytes_of_round"]:
            assert set(flow) == {"kind", "link", "rank_bytes", "all_bytes", "per_step"}
        assert sum(plan["layers_of_stages"]) == 32 and len(plan["layers_of_stages"]) == 2


def test_the_arithmetic_needs_no_torch():
    told = "import sys; sys.path.insert(0, 'tools'); import plan_run; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", told], cwd=ROOT, check=True, env={"PYTHONPATH": str(ROOT)})


def test_a_mistake_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        plan_run.run_tool(plan_run.main, ["--cluster", str(CLUSTERS[0]), "--model", "dept-125m", "--tensor", "5"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: 16 devices a silo cannot be cut into pipe 1 x tensor 5; ")
