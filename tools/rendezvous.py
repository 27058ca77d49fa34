"""Serve the store at which silos that are launches of their own meet, so that no silo has to, and any may be lost.

    python tools/rendezvous.py HOST:PORT

Every silo then sets federation.serve: false. The store holds one federation's agreements, in memory: end it (Ctrl-C)
when the run has ended, and start it anew when all silos start anew. It needs no secret: silos prove theirs to each
other.
"""

import signal
from collections.abc import Sequence

from megatron_dept.common.cli import ToolParser, run_tool
from megatron_dept.common.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    parser = ToolParser(description="Serve the store at which silos that are launches of their own meet.")
    parser.add_argument("address", metavar="HOST:PORT", help="what all silos have as federation.address")
    address = parser.parse_args(argv).address
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address} is not HOST:PORT; give what all silos have as federation.address")
    # Imported late: torch takes seconds, a mistake in the address none.
    from megatron_dept.federation.rendezvous import open_store

    store = open_store(address, True, 10.0)
    store.set("served by", "tools/rendezvous.py")
    print(f"serving {address} until it is ended", flush=True)
    # The store lives as long as this frame has it.
    while True:
        signal.pause()


if __name__ == "__main__":
    run_tool(main)
