"""Whether the native kernels are there; the faces take the plain torch of `reference` where they are not.

The library, `_kernels.abi3.so`, is no Python module: loading it registers operators, `torch.ops.megatron_dept.*`, that
csrc/kernels/bind defines. They check what would touch foreign memory; the faces say it in words beforehand.
"""

import os
import warnings
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_kernels.abi3.so")
SWITCH = "MEGATRON_DEPT_NATIVE"
OPERATORS = (
    "trim_gather",
    "trim_scatter_mean",
    "remap_lookup",
    "remap_backward",
    "body_pack",
    "body_mean",
    "body_unpack",
    "body_apply",
)
_REMEDY = "Build them with: pip install --no-build-isolation -e ."


@torch.compiler.assume_constant_result
def native_kernels(device_type: str = "cpu") -> bool:
    """Whether the kernels of csrc are built for this type of device and in use; where not, a warning says why, once.

    The environment's MEGATRON_DEPT_NATIVE=0 turns them off.
    """
    return _available(device_type)


@cache
def _available(device_type: str) -> bool:
    missing = _missing()
    if missing is None and not _registered(device_type):
        missing = f"the native kernels are not built for {device_type}"
    if missing is not None:
        # Attributed to who called the face: this, native_kernels, the face, its caller.
        warnings.warn(f"{missing}; using the slower plain torch ones. {_REMEDY}", RuntimeWarning, stacklevel=4)
    return missing is None


@cache
def _missing() -> str | None:
    """Load the library; what stands in the way, or None."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 turns the native kernels off"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the native kernels are not built ({str(error).splitlines()[0]})"
    for name in OPERATORS:
        # All write into what they are given: a trace need know no shape.
        torch.library.register_fake(f"megatron_dept::{name}", lambda *_: None)
    return None


def _registered(device_type: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_dept::{name}", key) for name in OPERATORS
    )
