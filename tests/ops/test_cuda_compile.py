"""nvcc compiles every CUDA kernel for every architecture: no spills, and the registers of the committed snapshot."""

import json
import runpy
from types import SimpleNamespace

import pytest

from tests.ops.cuda_shim import CSRC, ROOT

compiler = SimpleNamespace(**runpy.run_path(str(CSRC / "cuda" / "compile.py")))
NVCC = compiler.nvcc()
UPDATE = "if the change is meant, run: python csrc/kernels/cuda/compile.py --update"

# The compiler runs once, in whichever test comes first: half a minute where other things run too.
pytestmark = pytest.mark.timeout(900)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: neither $CUDA_HOME, PATH nor /usr/local/cuda has one")


@pytest.fixture(scope="module")
def report():
    return compiler.report(ROOT / "build")


@pytest.fixture(scope="module")
def snapshot():
    return json.loads(compiler.SNAPSHOT.read_text())


@needs_nvcc
def test_every_architecture_is_compiled_without_spills_or_stack(report):
    wanted = {f"sm_{each}" for each in compiler.architectures(NVCC)}
    assert len(report) >= 42
    for kernel, by_architecture in report.items():
        assert set(by_architecture) == wanted, kernel
        for architecture, used in by_architecture.items():
            assert used["spilled"] == used["stack"] == 0, f"{kernel} on {architecture}: {used}"


@needs_nvcc
def test_registers_are_those_of_the_snapshot(report, snapshot):
    version = compiler.nvcc_version(NVCC)
    if version != snapshot["nvcc"]:
        pytest.skip(f"the snapshot is of nvcc {snapshot['nvcc']}, this is {version}: only spills are looked at")
    changed = [
        f"{kernel}: {snapshot['kernels'].get(kernel)} became {report.get(kernel)}"
        for kernel in sorted({*report, *snapshot["kernels"]})
        if report.get(kernel) != snapshot["kernels"].get(kernel)
    ]
    assert not changed, "\n".join([*changed, UPDATE])


@needs_nvcc
def test_no_product_is_fused_with_a_sum(report):
    """Each is rounded by itself, or results would differ from the CPU's. (A division's own steps are not in PTX.)"""
    assert not [kernel for kernel, used in report.items() if any(each["fused"] for each in used.values())]


def test_kernels_on_packs_move_whole_vectors(snapshot):
    """16 bytes a load and store of a thread, 32 where sm_100 reads eight fp32; less only of what is stored smaller."""
    smaller = {
        ("load", "body_mean<bf16, true>"): 8,
        ("load", "body_mean<int8, true>"): 4,
        ("load", "sum_rows<__half, 4>"): 8,
        ("load", "sum_rows<__nv_bfloat16, 4>"): 8,
        ("store", "body_pack<bf16, true>"): 8,
    }
    seen = 0
    for kernel, by_architecture in snapshot["kernels"].items():
        if kernel.endswith((", 1>", ", false>")):
            continue
        for architecture, used in by_architecture.items():
            eight_fp32 = kernel.endswith(", 8>") and architecture == "sm_100"
            assert used["load"] == smaller.get(("load", kernel), 32 if eight_fp32 else 16), f"{kernel}, {architecture}"
            assert used["store"] == smaller.get(("store", kernel), 16), f"{kernel}, {architecture}"
            seen += 1
    assert seen >= 60


def test_a_spill_is_seen():
    said = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
"""
    assert compiler._resources(said) == {
        "_Z1kv": {"sm_90": {"registers": 64, "stack": 16, "spilled": 12, "shared": 1024}}
    }


def test_wanted_says_what_is_asked_before_what_torch_is(monkeypatch):
    monkeypatch.delenv("MEGATRON_DEPT_CUDA", raising=False)
    assert compiler.wanted("13.0") and not compiler.wanted(None)
    monkeypatch.setenv("MEGATRON_DEPT_CUDA", "1")
    assert compiler.wanted(None)
    monkeypatch.setenv("MEGATRON_DEPT_CUDA", "0")
    assert not compiler.wanted("13.0")
