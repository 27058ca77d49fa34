"""`pretrain_dept.py` as a script in which one rank dies: the launcher's own processes are put to the test.

DYING is "step RANK STEP", "exchange RANK ROUND" or "bug RANK STEP" (see `tests.support.faults`); arguments are the
program's.
"""

import os
import runpy
from pathlib import Path

from megatron_dept.topology.launch import read_launch
from tests.support.faults import bug, dies_in_exchange, dies_in_step

PROGRAM = Path(__file__).resolve().parents[2] / "pretrain_dept.py"

if __name__ == "__main__":
    place, rank, count = os.environ["DYING"].split()
    {"step": dies_in_step, "exchange": dies_in_exchange, "bug": bug}[place](int(rank), int(count))(read_launch())
    runpy.run_path(str(PROGRAM), run_name="__main__")
