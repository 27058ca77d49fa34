"""Compiles the CUDA half of the kernels for setup.py, which links what comes out into the one library.

`wanted` says whether there is to be a CUDA half; `objects` makes it: object files that define every `mdept_*_cuda` of
launch.h. The binding registers CUDA kernels where setup.py defines MDEPT_WITH_CUDA, which it does where `objects`
returned any.

`report` is what the compiler says of each kernel on each architecture. registers.json beside this file is the report
that tests hold it to; after a change that is meant, `python csrc/kernels/cuda/compile.py --update` writes it anew.
Standard library alone: it runs before the package is there.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
"""Machine code is made for these, and PTX of the last for whatever comes after it."""
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v")
HERE = Path(__file__).resolve().parent
SNAPSHOT = HERE / "registers.json"

Report = dict[str, dict[str, dict[str, int]]]
"""Kernel -> architecture ("sm_90") -> what it uses: `registers` of a thread, bytes of `stack`, `spilled` and `shared`
memory, its widest `load` and `store` in bytes, and how many `fused` multiply-adds of floats it has."""


def wanted(torch_cuda: str | None) -> bool:
    """Whether to build for CUDA: as MEGATRON_DEPT_CUDA=1 or 0 says, else where torch is a CUDA build."""
    asked = os.environ.get("MEGATRON_DEPT_CUDA")
    return asked == "1" if asked is not None else torch_cuda is not None


def nvcc() -> str | None:
    """The compiler: of $CUDA_HOME, on the path, or where CUDA installs itself; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def nvcc_version(compiler: str) -> str:
    """As "13.0.88"."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    if found is None:
        raise RuntimeError(f"{compiler} --version says no version: {said}")
    return found[1]


def architectures(compiler: str) -> tuple[int, ...]:
    """Those of ARCHITECTURES that this nvcc knows: 100 came with CUDA 12.8."""
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(each for each in ARCHITECTURES if f"sm_{each}" in known)


def objects(sources: Path, build: Path) -> tuple[list[str], list[str]]:
    """(object files, linker arguments) made in `build` of the `*.cu` in `sources`; ([], []) where there are none."""
    compiler, files = nvcc(), sorted(sources.glob("*.cu"))
    if not files:
        return [], []
    if compiler is None:
        raise RuntimeError("nvcc was not found; put it on PATH or set CUDA_HOME")
    made = compiled(compiler, files, build)
    libraries = [runtime_library(compiler), "-ldl", "-lrt", "-lpthread"]
    # The runtime stays inside: torch brings one of its own.
    return [str(made / f"{path.stem}.o") for path in files], [*libraries, "-Wl,--exclude-libs,libcudart_static.a"]


def report(build: Path) -> Report:
    """The report on every kernel of this folder, compiled in `build`."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found; put it on PATH or set CUDA_HOME")
    files = sorted(HERE.glob("*.cu"))
    made = compiled(compiler, files, build)
    found: Report = {}
    for path in files:
        for kernel, by_architecture in _resources((made / f"{path.stem}.log").read_text()).items():
            found.setdefault(kernel, {}).update(by_architecture)
        for ptx in made.glob(f"{path.stem}.compute_*.ptx"):
            architecture = ptx.name.split("_")[-1].removesuffix(".ptx")
            for kernel, counted in _instructions(ptx.read_text()).items():
                found[kernel][f"sm_{architecture}"].update(counted)
    return {
        _readable(kernel): {each: by_architecture[each] for each in sorted(by_architecture, key=lambda sm: int(sm[3:]))}
        for kernel, by_architecture in sorted(found.items(), key=lambda item: _readable(item[0]))
    }


def compiled(compiler: str, files: list[Path], build: Path) -> Path:
    """The folder in `build` with an object, the compiler's log and the PTX of each of `files`; made anew only when a
    source, the flags or the compiler changed."""
    known = architectures(compiler)
    digest = hashlib.sha256(f"{nvcc_version(compiler)} {FLAGS} {known}".encode())
    for path in sorted(
        {*files, *(near for file in files for near in file.parent.glob("*.cuh")), HERE.parent / "launch.h"}
    ):
        digest.update(path.name.encode() + path.read_bytes())
    folder = build.resolve() / f"cuda-{digest.hexdigest()[:16]}"
    if folder.exists():
        return folder
    build.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in known[:-1]]
    targets.append(f"-gencode=arch=compute_{known[-1]},code=[sm_{known[-1]},compute_{known[-1]}]")
    # In a folder of its own that is renamed when it is whole: two builds at once do not meet.
    with tempfile.TemporaryDirectory(dir=build) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(path: Path) -> None:
            keep = Path(scratch) / f"{path.stem}.kept"
            keep.mkdir()
            command = [compiler, *FLAGS, *targets, "--threads=3", "--keep", "--keep-dir", str(keep)]
            command += ["-c", str(path), "-o", str(Path(scratch) / f"{path.stem}.o")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            (Path(scratch) / f"{path.stem}.log").write_text(done.stdout + done.stderr)
            for ptx in keep.glob("*.ptx"):
                ptx.rename(Path(scratch) / ptx.name)
            shutil.rmtree(keep)

        list(pool.map(compile_one, files))
        if not folder.exists():
            shutil.copytree(scratch, f"{scratch}.whole")
            Path(f"{scratch}.whole").rename(folder)
    for stale in build.resolve().glob("cuda-*"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)
    return folder


def runtime_library(compiler: str) -> str:
    """libcudart_static.a: where nvcc itself would take it from, since nvcc may be a script that lies elsewhere."""
    said = subprocess.run([compiler, "--dryrun", "any.cu"], capture_output=True, text=True).stderr
    for folder in re.findall(r'"-L([^"]+)"', said):
        library = Path(folder) / "libcudart_static.a"
        if library.exists():
            return str(library)
    raise RuntimeError(f"{compiler} has no libcudart_static.a where its --dryrun says libraries are")


def _resources(log: str) -> Report:
    """What ptxas says, by mangled name."""
    found: Report = {}
    entry = r"Compiling entry function '(\w+)' for '(sm_\d+)'(.*?)(?=Compiling entry|\Z)"
    for kernel, architecture, text in re.findall(entry, log, re.DOTALL):
        counted = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        if counted is None or registers is None:
            raise RuntimeError(f"ptxas says nothing of {kernel} for {architecture}: {text}")
        shared = re.search(r"(\d+) bytes smem", text)
        found.setdefault(kernel, {})[architecture] = {
            "registers": int(registers[1]),
            "stack": int(counted[1]),
            "spilled": int(counted[2]) + int(counted[3]),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def _instructions(ptx: str) -> dict[str, dict[str, int]]:
    """Of each kernel, by mangled name: bytes of its widest load and store, and its fused multiply-adds."""
    found = {}
    for kernel, text in re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.DOTALL | re.MULTILINE):
        found[kernel] = {
            "load": _widest("ld", text),
            "store": _widest("st", text),
            "fused": len(re.findall(r"\bfma\.", text)),
        }
    return found


def _widest(verb: str, ptx: str) -> int:
    """Bytes that the widest of these accesses to global memory moves."""
    accesses = re.findall(rf"\b{verb}\.global(?:\.nc|\.cs)?(?:\.v(\d))?\.[a-z](\d+)", ptx)
    return max((int(lanes or 1) * int(bits) // 8 for lanes, bits in accesses), default=0)


def _readable(mangled: str) -> str:
    """lookup_rows<__half, 8>, body_pack<int8, true>."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = name.removeprefix("void ").replace("mdept::", "")
    for number, wire in enumerate(("fp32", "bf16", "int8")):
        name = name.replace(f"<(Wire){number}, ", f"<{wire}, ")
    return name[: name.index(">(") + 1]


def main() -> None:
    """Print the report, or write it as the snapshot."""
    parser = argparse.ArgumentParser(description="Registers and memory of the CUDA kernels, as nvcc reports them.")
    parser.add_argument("--update", action="store_true", help=f"write {SNAPSHOT.name} anew")
    arguments = parser.parse_args()
    compiler = nvcc()
    if compiler is None:
        parser.exit(1, "nvcc was not found; put it on PATH or set CUDA_HOME\n")
    with tempfile.TemporaryDirectory() as build:
        kernels = report(Path(build))
    for kernel, by_architecture in kernels.items():
        print(kernel, *(f"{each} {used['registers']}" for each, used in by_architecture.items()), sep="  ")
    if arguments.update:
        # A line for each kernel and architecture, so that a change reads well.
        lines = [
            f"    {json.dumps(kernel)}: {{\n"
            + ",\n".join(f'      "{each}": {json.dumps(used)}' for each, used in by_architecture.items())
            + "\n    }"
            for kernel, by_architecture in kernels.items()
        ]
        version = json.dumps(nvcc_version(compiler))
        SNAPSHOT.write_text(f'{{\n  "nvcc": {version},\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n")
        print(f"written to {SNAPSHOT}")


if __name__ == "__main__":
    main()
