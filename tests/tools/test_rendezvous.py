"""tools/rendezvous.py: a store that serves until it is ended."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rendezvous

from megatron_dept.common.errors import ConfigError, FederationError
from megatron_dept.federation.rendezvous import Rendezvous
from tests.support.distributed import free_port

SECRET = "a secret of the silos"


@pytest.fixture
def served() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    address = f"127.0.0.1:{free_port()}"
    # Also where the package is on pytest's path alone.
    environment = {**os.environ, "PYTHONPATH": str(Path(rendezvous.__file__).parents[1])}
    command = [sys.executable, rendezvous.__file__, address]
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert tool.stdout is not None and tool.stdout.readline() == f"serving {address} until it is ended\n"
        yield address, tool
    finally:
        tool.kill()
        tool.wait()


def test_silos_meet_where_none_of_them_serves(served: tuple[str, subprocess.Popen[str]]) -> None:
    address, tool = served
    silos = [Rendezvous.meet(address, False, silo, 2, SECRET, 20) for silo in range(2)]
    for silo in silos:
        silo.sign({"version": "1"})
        silo.store.set(f"card-{silos.index(silo)}", f'{{"silo": {silos.index(silo)}}}')
    assert [silo.read_cards() for silo in silos] == [[{"silo": 0}, {"silo": 1}]] * 2
    tool.send_signal(signal.SIGTERM)
    assert tool.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(RuntimeError):
        silos[0].store.check(["anything"])


@pytest.mark.parametrize("address", ["nowhere", ":29400", "host:", "host:port", "host:0", "host:65536"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT; give what all silos have as federation.address"):
        rendezvous.main([address])


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        with pytest.raises(FederationError, match="could not open federation.address .*; check the address"):
            rendezvous.main([f"127.0.0.1:{other.getsockname()[1]}"])
