"""Compiles the CUDA half of the kernels for setup.py, which links what comes out into the one library.

`wanted` says whether there is to be a CUDA half; `objects` makes it: object files that define every `mdept_*_cuda` of
launch.h. The binding registers CUDA kernels where setup.py defines MDEPT_WITH_CUDA, which it does where `objects`
returned any.
"""

import os
import shutil
from pathlib import Path


def wanted(torch_cuda: str | None) -> bool:
    """Whether to build for CUDA: as MEGATRON_DEPT_CUDA=1 or 0 says, else where torch is a CUDA build."""
    asked = os.environ.get("MEGATRON_DEPT_CUDA")
    return asked == "1" if asked is not None else torch_cuda is not None


def nvcc() -> str | None:
    """The compiler, or None."""
    return shutil.which("nvcc")


def objects(sources: Path, build: Path) -> tuple[list[str], list[str]]:
    """(object files, linker arguments) made in `build` of the `*.cu` in `sources`; ([], []) where there are none."""
    if not sorted(sources.glob("*.cu")):
        return [], []
    raise NotImplementedError("the CUDA half")
