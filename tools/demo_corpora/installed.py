"""Text that any installation has: code and documentation of Python and of the packages beside us, read as files.

Nothing is imported: packages are found by their specification and parsed as text. Files are taken in an order that
mixes them (by the hash of their names), so that the first few megabytes are a fair sample of all.
"""

import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from demo_corpora.text import docstrings, meaning_order, without_docstrings
from megatron_dept.common.errors import DataError

# Parts of the standard library that are tables or tests rather than code, or are not the library at all.
_NOT_LIBRARY = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
}
_DOCUMENTED = ("torch", "numpy", "sympy", "transformers")


def package_folder(name: str) -> Path:
    """The folder of an installed package, not imported; `DataError` where it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise DataError(
            f"package {name} is not installed, and its files are a source of the demo's text; run make venv"
        )
    return Path(next(iter(found.submodule_search_locations)))


def _files(folder: Path, *suffixes: str) -> Iterator[tuple[str, str]]:
    """(path under the folder, text) of its files with these suffixes; what is not UTF-8 is left out."""
    names = [str(path.relative_to(folder)) for suffix in suffixes for path in folder.rglob(f"*{suffix}")]
    for name in meaning_order(names):
        if not _NOT_LIBRARY & set(Path(name).parts):
            try:
                yield name, (folder / name).read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue


def _python(folder: Path, convert: Callable[[str], str | None]) -> Iterator[str]:
    for _, source in _files(folder, ".py"):
        converted = convert(source)
        if converted is not None:
            yield converted


def python_code() -> Iterator[str]:
    """The standard library's modules, docstrings taken out, without tests."""
    return _python(Path(sysconfig.get_path("stdlib")), without_docstrings)


def sympy_code() -> Iterator[str]:
    """sympy's modules, docstrings taken out: mathematics written as code."""
    return _python(package_folder("sympy"), without_docstrings)


def cpp_headers() -> Iterator[str]:
    """The C++ headers that torch ships for extensions."""
    return (text for _, text in _files(package_folder("torch") / "include", ".h", ".hpp", ".cuh"))


def english_docstrings() -> Iterator[str]:
    """Docstrings of the large packages: technical English."""
    for name in _DOCUMENTED:
        yield from _python(package_folder(name), docstrings)


def type_stubs() -> Iterator[str]:
    """numpy's and torch's interface files: signatures and nothing else."""
    for name in ("numpy", "torch"):
        for _, text in _files(package_folder(name), ".pyi"):
            yield without_docstrings(text) or text


def licence_texts() -> Iterator[str]:
    """The licences that installed packages ship: legal English."""
    texts: dict[str, Path] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or []:
            if ".dist-info/" in str(file) and "licen" in str(file).lower():
                texts[str(file)] = Path(str(distribution.locate_file(file)))
    for name in meaning_order(texts):
        try:
            yield texts[name].read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def python_licence() -> dict[str, str]:
    """Python's own licence file, where the installation ships it."""
    for folder in (Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("data"))):
        for name in ("LICENSE.txt", "LICENSE"):
            if (folder / name).is_file():
                return {"LICENSE-Python.txt": (folder / name).read_text(encoding="utf-8", errors="replace")}
    return {"LICENSE-Python.txt": "Python Software Foundation License: https://docs.python.org/3/license.html\n"}


def package_licences(*names: str) -> dict[str, str]:
    """The top licence files of installed packages (not those of what they bundle), or where to find them."""
    texts = {}
    for name in names:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise DataError(f"package {name} is not installed; run make venv") from None
        files = [file for file in distribution.files or [] if ".dist-info/" in str(file)]
        files = [file for file in files if file.name.upper().startswith(("LICEN", "COPYING", "NOTICE"))]
        depth = min((len(file.parts) for file in files), default=0)
        for file in (file for file in files if len(file.parts) == depth):
            path = Path(str(distribution.locate_file(file)))
            texts[f"{name}-{file.name}"] = path.read_text(encoding="utf-8", errors="replace")
        if not files:
            stated = {key: value for key, value in distribution.metadata.json.items() if key.startswith("license")}
            texts[f"{name}-LICENSE"] = f"{name} {distribution.version} states: {stated}\n"
    return texts
