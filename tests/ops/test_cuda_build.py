"""One library serves torch with CUDA and without: built with the CUDA half, it loads and works in a CPU torch."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.ops.cuda_shim import ROOT
from tests.ops.test_cuda_compile import needs_nvcc

USE = """
import sys, torch
from megatron_dept.ops import native, reference
torch.ops.load_library(sys.argv[1])
for name in native.OPERATORS:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_dept::{name}", key), (name, key)
table, ids = torch.randn(50, 20), torch.tensor([3, 11, 40, 60])
out = torch.empty(4, 20, dtype=torch.bfloat16)
torch.ops.megatron_dept.trim_gather(table, ids, 0, out)
assert torch.equal(out, reference.trim_gather(table, ids, 0, torch.bfloat16))
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@needs_nvcc
def test_a_library_with_cuda_loads_and_works_on_any_torch(tmp_path):
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT,
        env={**os.environ, "MEGATRON_DEPT_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-4000:]
    library = tmp_path / "megatron_dept" / "ops" / "_kernels.abi3.so"
    used = subprocess.run([sys.executable, "-c", USE, str(library)], cwd=ROOT, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr[-4000:]

    # The CUDA runtime inside is nobody else's, and nothing of torch's CUDA half is asked for by name.
    if shutil.which("nm"):
        symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
        assert " T cuda" not in symbols and "_cuda_stream" not in symbols
