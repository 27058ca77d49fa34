"""Reading a checkpoint by name, on any layout, with no distributed job.

`Checkpoint` is what evaluation, export and adapt see: the body by parameter name, embedding tables by source name.
Shapes: `v` rows a table holds, `V` ids of its tokenizer, `h` hidden, `L` positions.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_dept.checkpoint.slices import SliceIndex
from megatron_dept.common.errors import CheckpointError, UserError
from megatron_dept.common.files import read_json
from megatron_dept.config.schema import ModelConfig

FORMAT_VERSION = 2
"""2: row-parallel weights are input-major."""
MANIFEST = "manifest.json"


def committed(directory: Path) -> list[Path]:
    """The committed checkpoints in a `checkpoints` directory, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if (path / MANIFEST).is_file())


class Checkpoint:
    """One committed checkpoint. `manifest` is its description, `index` its tensors."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open a checkpoint directory, or the newest one of a run directory.

        Raises `CheckpointError` where there is none, or a file of it is missing or cut short.
        """
        path = Path(path)
        directory = path
        if not (path / MANIFEST).is_file():
            found = committed(path / "checkpoints") or committed(path)
            if not found:
                raise CheckpointError(f"{path} holds no committed checkpoint; give a run or checkpoint directory")
            directory = found[-1]
        try:
            manifest = read_json(directory / MANIFEST)
        except UserError as error:
            raise CheckpointError(
                f"{directory / MANIFEST} is damaged; remove {directory} and use an earlier checkpoint"
            ) from error
        if manifest.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{directory / MANIFEST}: format_version {manifest.get('format_version')!r} is not {FORMAT_VERSION}; "
                "use the release that wrote it"
            )
        for name, size in manifest["files"].items():
            actual = (directory / name).stat().st_size if (directory / name).is_file() else None
            if actual != size:
                what = "is missing" if actual is None else f"has {actual} bytes, not {size}"
                raise CheckpointError(f"{directory / name} {what}; use an earlier checkpoint")
        return cls(directory, manifest)

    @cached_property
    def index(self) -> SliceIndex:
        """Every named slice of the checkpoint."""
        return SliceIndex(self.directory / name for name in self.manifest["files"])

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.model_validate(self.manifest["model"])

    def body(self) -> dict[str, Tensor]:
        """The global body: fp32 tensors by the names of `build_body(...).named_parameters()`."""
        return {
            name: self.index.read(f"body/{name}").view(shape) for name, shape in self.manifest["body_shapes"].items()
        }

    def vocabulary(self, source: str) -> np.ndarray:
        """The ids of a source's tokenizer that the source trains on: int64 [v], ascending."""
        self._check_source(source)
        return self.index.read(f"vocabulary/{source}").numpy()

    def token_table(self, source: str | None = None) -> tuple[np.ndarray, Tensor]:
        """(ids int64 [v] ascending, rows fp32 [v, h]): the global rows that some source holds, or a source's own.

        `source` None is the global table (GLOB, TRIM, STD, ACT, adapted); SPEC and SPEC-OPT have one per source.
        Raises `CheckpointError` naming what the checkpoint has where the table asked for does not exist.
        """
        if source is None:
            if "token" not in self.index:
                raise CheckpointError(
                    f"{self.directory}: variant {self.manifest['variant']} has no global embedding; name one of the "
                    f"sources {', '.join(self.manifest['sources'])}, or adapt the body first"
                )
            table = self.index.read("token")
            if self.manifest["vocabulary"] == "global":
                return np.arange(len(table), dtype=np.int64), table
            held = np.unique(np.concatenate([self.vocabulary(name) for name in self.manifest["sources"]]))
            return held, table[held]
        self._check_own(source)
        return self.vocabulary(source), self.index.read(f"source/{source}/token")

    def position_table(self, source: str | None = None) -> Tensor | None:
        """fp32 [L, h], global or a source's own; None where the model has no learned positions."""
        if not self.model_config.has_position_table:
            return None
        if source is not None:
            self._check_own(source)
        return self.index.read("position" if source is None else f"source/{source}/position")

    def _check_source(self, source: str) -> None:
        if source not in self.manifest["sources"]:
            raise CheckpointError(
                f"{self.directory} has no source {source!r}; it has {', '.join(self.manifest['sources'])}"
            )

    def _check_own(self, source: str) -> None:
        self._check_source(source)
        if f"source/{source}/token" not in self.index:
            if "token" in self.index:
                raise CheckpointError(f"{self.directory}: its embedding is global; leave the source {source} out")
            raise CheckpointError(f"{self.directory}: source {source} was never sampled and has no embedding yet")
