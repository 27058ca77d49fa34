"""CUDA source built with g++ and the thread shim of csrc/kernels/shim, and its functions called.

The library is sanitized for addresses and undefined behaviour, so it lives in a process of its own that has the
address sanitizer loaded first (`cuda_shim_child.py`); calls go there and what they wrote comes back as files. Struct
layouts are read from csrc/kernels/launch.h.
"""

import ctypes
import hashlib
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc" / "kernels"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
FLAGS = (
    *(
        "-std=c++17",
        "-O1",
        "-g1",
        "-fPIC",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    f"-I{CSRC / 'shim'}",
    f"-I{CSRC / 'cuda'}",
)
ORDERS = (0, 1, 7)
"""Orders the threads run in: forward, reverse, and random with this seed."""
ALIGNED = 64
"""Bytes that arrays are aligned to in the child, before their offset is added."""


def build(name: str, sources: Sequence[Path]) -> Path:
    """The shared library of CUDA `sources`, in build/cuda_shim; made anew only when they or csrc/kernels changed."""
    everything = sorted({*sources, *CSRC.glob("shim/*.h"), *CSRC.glob("cuda/*.cu*"), CSRC / "launch.h"})
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in everything:
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda_shim"
    library = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    own = f"{library.stem}.{os.getpid()}"  # two test processes may build at once; the last rename wins

    def compiled(source: Path) -> str:
        target = folder / f"{own}.{source.stem}.o"
        _run("g++", *FLAGS, "-x", "c++", "-c", str(source), "-o", str(target))
        return str(target)

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sources))
    _run("g++", *FLAGS, "-shared", *objects, "-o", str(folder / f"{own}.so"))
    (folder / f"{own}.so").rename(library)
    for stale in [*map(Path, objects), *folder.glob(f"{name}-*.so")]:
        if stale != library:
            stale.unlink(missing_ok=True)
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


@cache
def layouts(header: Path = CSRC / "launch.h") -> dict[str, list[tuple[str, str]]]:
    """Struct name -> (field, ctypes name) of every struct in a file, in order."""
    text = re.sub(r"//.*", "", header.read_text())
    numbers = {"int64_t": "c_int64", "int32_t": "c_int32", "float": "c_float"}
    found = {}
    for body, struct in re.findall(r"typedef struct \{([^}]*)\} (\w+);", text):
        fields: list[tuple[str, str]] = []
        for kind, names in re.findall(r"(?:const )?(\w+\*?) ([\w, ]+);", body):
            pointer = kind.endswith("*")
            fields += [(each.strip(), "c_void_p" if pointer else numbers[kind]) for each in names.split(",")]
        found[struct] = fields
    return found


@dataclass(frozen=True)
class Call:
    """function(&struct): a number, None or a tensor for each of its fields; a tensor keeps its storage offset."""

    function: str
    struct: str
    fields: Mapping[str, Any]
    header: Path = CSRC / "launch.h"


def run(library: Path, calls: Sequence[Call], folder: Path) -> list[list[dict[str, Tensor]]]:
    """What the tensors of each call hold after it, one dictionary for each of ORDERS; AssertionError with what the
    child said if it died, which is how the sanitizers and the shim report."""
    listed = []
    for call in calls:
        layout = layouts(call.header)[call.struct]
        assert {name for name, _ in layout} == set(call.fields), (call.struct, set(call.fields))
        listed.append((call.function, [(name, kind, _sent(call.fields[name])) for name, kind in layout]))
    where, answer = folder / "calls.pickle", folder / "answers.pickle"
    where.write_bytes(pickle.dumps((str(library), ORDERS, ALIGNED, listed)))
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    child = subprocess.run(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("cuda_shim_child.py")), str(where), str(answer)],
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, f"exit {child.returncode}: {child.stderr[-6000:]}"
    answers = pickle.loads(answer.read_bytes())
    return [
        [{name: _came(data, call.fields[name]) for name, data in order.items()} for order in orders]
        for call, orders in zip(calls, answers, strict=True)
    ]


def _sent(value: Any) -> Any:
    """A number or None as it is; a tensor as (bytes, bytes of offset)."""
    if not isinstance(value, Tensor):
        return value
    size = value.numel() * value.element_size()
    return ctypes.string_at(value.data_ptr(), size) if size else b"", value.storage_offset() * value.element_size()


def _came(data: bytes, like: Tensor) -> Tensor:
    if not data:
        return torch.empty_like(like)
    return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape)
