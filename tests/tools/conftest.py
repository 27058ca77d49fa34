"""The tools are scripts: their folder is put on the path, as Python does when one of them is run; so is this one."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE.parents[1] / "tools", HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
