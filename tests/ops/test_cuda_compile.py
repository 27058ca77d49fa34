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
    assert len(report) >= 30
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


def test_the_snapshot_has_whole_vectors_where_kernels_take_packs(snapshot):
    """16 bytes a load or store of each thread; 32 where sm_100 reads eight fp32. Wires of less than fp32 store less."""
    for kernel, by_architecture in snapshot["kernels"].items():
        single = kernel.endswith(", 1>")
        for architecture, used in by_architecture.items():
            smallest_load = {"body_mean<bf16>": 8, "body_mean<int8>": 4}.get(kernel, 16)
            if kernel.startswith("sum_rows<__"):
                smallest_load = 8
            if kernel.startswith("lookup_rows<__") and architecture == "sm_100":
                smallest_load = 32
            smallest_store = 8 if kernel == "body_pack<bf16>" else 16
            where = f"{kernel} on {architecture}: {used}"
            assert used["load"] >= (4 if single else smallest_load), where
            assert used["store"] >= (2 if single else smallest_store), where


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
