"""A row table in a checkpoint: its rows, momentum and the round's sums by blocks, so that it is never whole in memory.

Shapes: `n` rows owned by this rank from id `first` on, `h` hidden.
"""

from megatron_dept.checkpoint.slice_file import Entry
from megatron_dept.checkpoint.slices import SliceIndex, in_blocks, whole
from megatron_dept.federation.row_table import RowTable


def table_entries(part: str, table: RowTable, mid_round: bool) -> dict[str, Entry]:
    """What this rank saves of a table called `part`; in the middle of a round its sums and counts, too."""
    first, hidden, blocks = table.first, table.hidden, list(table.stored.blocks())
    entries = in_blocks(part, first, blocks, hidden, table.stored.read)
    if table.stored_momentum is not None:
        entries |= in_blocks(f"{part}.momentum", first, blocks, hidden, table.stored_momentum.read)
    if mid_round:
        entries |= in_blocks(f"{part}.sums", first, blocks, hidden, table.pending.sums)
        entries |= whole(f"{part}.counts", table.pending.counts, first)
    return entries


def load_table(index: SliceIndex, part: str, table: RowTable, mid_round: bool) -> None:
    """Put back what all ranks' `table_entries` saved, on any layout."""
    for start, stop in table.stored.blocks():
        first, last = table.first + start, table.first + stop
        table.stored.write(start, index.read(part, first, last))
        if table.stored_momentum is not None:
            table.stored_momentum.write(start, index.read(f"{part}.momentum", first, last))
        if mid_round:
            counts = index.read(f"{part}.counts", first, last)
            table.pending.put_back(start, index.read(f"{part}.sums", first, last), counts)
