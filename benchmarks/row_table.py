"""A row table's gather and scatter-mean, in memory and on disk, beside what they were before they were fused.

    python -m benchmarks.row_table [--passes 2] [--json FILE]

V = 250,112 rows of h = 768 (768 MB of values, as many of outer momentum), one owner, one thread. A slot's two sources
hold V_k rows each: one asks for its rows (gather); the deltas of both have come at once and are averaged into the
table with a Nesterov step (scatter-mean). `former` is plain torch: rows by index; `index_add_` into a table of sums, a
table of means, the outer step on copies of the rows held, the sums set to zero.

Each way runs in a process of its own, ways in turn, and again; of all repetitions the best counts. GB/s are of the
bytes that must move: a row read and written; two deltas read, value and momentum of the rows held read and written.
The file is in the page cache. Peak is resident memory, mapped pages included, over what the process had before the
table; rows gathered are in it, the deltas, which every way is given, are not.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dept.dept.outer import OuterRule, outer_step
from megatron_dept.dept.row_storage import RowStorage
from megatron_dept.federation.communicator import Alone
from megatron_dept.federation.row_spread import RowSpread
from megatron_dept.federation.row_table import RowTable
from megatron_dept.ops.native import native_kernels

ROWS, HIDDEN = 250_112, 768
HELD = (20_000, 100_000, 200_000)
WAYS = ("former", "host", "disk")
RULE = OuterRule("nesterov", 0.7, 0.9)
REPETITIONS = 4
SCRATCH_ELEMENTS = 1 << 20


class Former:
    """One owner's rows as they were kept and averaged before: dense sums, dense means, several passes."""

    def __init__(self) -> None:
        self.rows, self.momentum = initial(0, ROWS), torch.zeros(ROWS, HIDDEN)
        self.sums, self.counts = torch.zeros(ROWS, HIDDEN), torch.zeros(ROWS, dtype=torch.int32)

    def gather(self, ids: Tensor) -> Tensor:
        return self.rows[ids]

    def scatter_mean(self, ids: list[Tensor], deltas: Tensor) -> None:
        for each, part in zip(ids, deltas.split([len(each) for each in ids]), strict=True):
            self.sums.index_add_(0, each, part)
            self.counts.index_add_(0, each, torch.ones_like(each, dtype=torch.int32))
        mean, held = self.sums / self.counts.clamp(min=1).unsqueeze(1), self.counts > 0
        for rows in held.nonzero().squeeze(1).split(SCRATCH_ELEMENTS // HIDDEN):
            value, momentum = self.rows[rows], self.momentum[rows]
            outer_step(RULE, value, mean[rows], momentum)
            self.rows[rows], self.momentum[rows] = value, momentum
        self.sums.zero_()
        self.counts.zero_()


class Now:
    """The project's table, owned by this process alone."""

    def __init__(self, storage: RowStorage) -> None:
        spread = RowSpread.of_peers(ROWS, 1, 1)
        self._table = RowTable("embedding", HIDDEN, spread, Alone(), Alone(), 1, RULE, initial, storage)
        self.rows = self._table.rows

    def gather(self, ids: Tensor) -> Tensor:
        return self._table.gather(ids, range(len(ids)))

    def scatter_mean(self, ids: list[Tensor], deltas: Tensor) -> None:
        self._table.pending.add_all(ids, deltas)
        self._table.apply()


def initial(start: int, stop: int) -> Tensor:
    return torch.full((stop - start, HIDDEN), 0.02)


def resident(what: str) -> int:
    """Bytes of this process now ("VmRSS"), or at most since `forget` ("VmHWM")."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget() -> None:
    """The peak begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def best(action: Callable[[], object]) -> tuple[float, float]:
    """(seconds, CPU seconds) of the best repetition, each by itself."""
    times = []
    for _ in range(REPETITIONS):
        begun, cpu = time.perf_counter(), time.process_time()
        action()
        times.append((time.perf_counter() - begun, time.process_time() - cpu))
    return min(wall for wall, _ in times), min(cpu for _, cpu in times)


def measure(way: str, held: int, directory: Path) -> dict[str, Any]:
    """One way, in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(held)
    ids = [torch.randperm(ROWS, generator=generator)[:held].sort().values for _ in range(2)]
    before = resident("VmRSS")
    forget()
    table = Former() if way == "former" else Now(RowStorage(directory if way == "disk" else None))
    gather = best(lambda: table.gather(ids[0]))
    gathered = resident("VmHWM") - before
    deltas = torch.full((2 * held, HIDDEN), 0.001)
    forget()
    scatter = best(lambda: table.scatter_mean(ids, deltas))
    union = len(torch.cat(ids).unique())
    row = 4 * HIDDEN
    return {
        "way": way,
        "held": held,
        "gather": {"seconds": gather[0], "cpu_seconds": gather[1], "bytes": 2 * held * row},
        "scatter_mean": {"seconds": scatter[0], "cpu_seconds": scatter[1], "bytes": (2 * held + 4 * union) * row},
        "peak_bytes": max(gathered, resident("VmHWM") - before - deltas.nbytes),
        "checksum": float(table.rows[::997].double().sum()),
    }


def table_of(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each V_k and way."""
    lines = [
        "| V_k | way | gather GB/s | CPU s | scatter-mean GB/s | CPU s | peak, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        figures = []
        for verb in ("gather", "scatter_mean"):
            part = result[verb]
            figures += [f"{part['bytes'] / part['seconds'] / 1e9:.2f}", f"{part['cpu_seconds']:.3f}"]
        peak = f"{result['peak_bytes'] / 1e9:.2f}"
        lines.append(f"| {result['held']:,} | {result['way']} | {' | '.join(figures)} | {peak} |")
    return "\n".join(lines)


def run_all(passes: int, directory: str) -> list[dict[str, Any]]:
    """The best of all passes, by V_k and way; every pass starts a process for each."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for _ in range(passes):
        for held in HELD:
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.row_table", "--one", way, str(held), directory]
                told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                kept = found.setdefault((held, way), told)
                for verb in ("gather", "scatter_mean"):
                    for figure in ("seconds", "cpu_seconds"):
                        kept[verb][figure] = min(kept[verb][figure], told[verb][figure])
                kept["peak_bytes"] = max(kept["peak_bytes"], told["peak_bytes"])
                assert kept["checksum"] == found[held, WAYS[0]]["checksum"], "all ways give the same bits"
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where the table on disk lies")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "HELD", "DIRECTORY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), Path(options.one[2]))))
        return
    results = run_all(options.passes, options.directory)
    print(f"native kernels: {'yes' if native_kernels() else 'no'}; torch {torch.__version__}; one thread")
    print(table_of(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
