"""Where rows are kept: a table on disk is the same table, takes a block of memory, and a full disk is said so."""

import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dept.common.errors import UserError
from megatron_dept.dept import row_storage
from megatron_dept.dept.averaging import RowMean
from megatron_dept.dept.outer import OuterRule
from megatron_dept.dept.row_storage import BLOCK_BYTES, RowStorage
from megatron_dept.federation.communicator import Alone
from megatron_dept.federation.row_spread import RowSpread
from megatron_dept.federation.row_table import RowTable

NESTEROV = OuterRule("nesterov", 0.7, 0.9)
HIDDEN = 256
ROWS = 64 << 10  # of 1 kB: 64 MB


def resident(what: str) -> int:
    """Bytes that this process has now ("VmRSS"; of files alone, "RssFile") or at most since `forget_peak` ("VmHWM")."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def rows_of(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop, dtype=torch.float32)[:, None].expand(-1, HIDDEN)


def test_a_table_on_disk_is_the_table_and_holds_a_block_of_memory(tmp_path: Path) -> None:
    """Rows, momentum and sums of 64 MB each; every row is read, and every third stepped, in a few blocks of 8 MB."""
    RowStorage(tmp_path).make(8, HIDDEN, rows_of)  # what is loaded at first use is not the table's
    before = resident("VmRSS")
    forget_peak()
    storage = RowStorage(tmp_path)
    table = storage.make(ROWS, HIDDEN, rows_of)
    momentum = storage.make(ROWS, HIDDEN)
    for start, stop in table.blocks():
        assert torch.equal(table.read(start, stop), rows_of(start, stop))
    mean = RowMean(ROWS, HIDDEN, storage)
    for start, stop in table.blocks():
        sums = torch.zeros(stop - start, HIDDEN)
        held = (torch.arange(start, stop) % 3 == 0).int()
        sums[held.bool()] = 2.0
        mean.put_back(start, sums, held)
    mean.step(NESTEROV, table, momentum)
    grown = resident("VmHWM") - before
    # A block of each of three tables, of what is compared, and its scratch: far from the 192 MB that they are.
    assert grown < 9 * BLOCK_BYTES, f"{grown / 1e6:.0f} MB"
    expected = rows_of(0, ROWS).clone()
    expected[::3] -= torch.tensor(2.0).mul(0.9).add(2.0).mul(0.7)
    for start, stop in table.blocks():
        assert torch.equal(table.read(start, stop), expected[start:stop])
    assert list(tmp_path.iterdir()) == [], "a file that is left behind is nobody's"


def test_gathering_from_disk_keeps_no_page_of_the_table(tmp_path: Path) -> None:
    spread = RowSpread.of_peers(ROWS, 1, 1)
    table = RowTable(
        "embedding", HIDDEN, spread, Alone(), Alone(), 1, NESTEROV, rows_of, RowStorage(tmp_path), torch.bfloat16
    )
    ids = torch.arange(0, ROWS, 2)
    table.gather(ids[:8], range(8))
    before = resident("RssFile")
    rows = table.gather(ids, range(len(ids)))
    grown = resident("RssFile") - before
    assert torch.equal(rows, rows_of(0, ROWS)[::2].bfloat16().float())
    # Each block has been let go of; kept, all pages of the 64 MB would be there.
    assert grown < BLOCK_BYTES, f"{grown / 1e6:.0f} MB"


def test_a_disk_that_has_no_room_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path} has no room for 72,057,\S+ GB .*embedding.directory"):
        RowStorage(tmp_path).make(1 << 44, 1024)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/tables has no room .*embedding.row_table to host"):
        RowStorage(tmp_path / "file" / "tables").make(4, 4)


def test_room_is_taken_when_the_table_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that the disk has no room for kills the process that writes it, so it must be there before."""
    named = tmp_path / "named"
    monkeypatch.setattr(row_storage.tempfile, "TemporaryFile", lambda **_: named.open("w+b"))
    table = RowStorage(tmp_path).make(2048, HIDDEN)
    assert not table.tensor.any()
    assert os.stat(named).st_blocks * 512 >= os.stat(named).st_size == table.tensor.nbytes


def test_an_empty_table_is_kept_anywhere(tmp_path: Path) -> None:
    for storage in (RowStorage(), RowStorage(tmp_path)):
        assert storage.make(0, 4).tensor.shape == (0, 4)


def test_a_refused_pin_is_said_and_the_table_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime is stood in for: it refuses once, then takes what it is given, and is told when that ends."""
    told: list[tuple[str, int]] = []
    answers = [2, 0]

    def register(address: int, size: int, flags: int) -> int:
        told.append(("pin", size))
        return answers.pop(0)

    runtime = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=lambda address: told.append(("unpin", address))
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.warns(RuntimeWarning, match=r"would not pin 0.000 GB .*ulimit -l"):
        assert not RowStorage(pinned=True).make(3, 4).tensor.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = RowStorage(pinned=True).make(3, 4)
    address = table.tensor.data_ptr()
    del table
    assert told == [("pin", 48), ("pin", 48), ("unpin", address)]
