"""How silos that are launches of their own find one another: a store at `host:port`, a charter, and a card of each.

The first silo to come writes the *charter*: what all must share, the program's version and configuration, with a proof
that it knows the secret. Every other silo compares itself with it and refuses itself where it differs, naming the
field. Then each leaves its *card*: what the others must know of it. The secret keeps strangers' and other runs' silos
out; it does not encrypt, so silos belong in a private network.
"""

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_dept.common.errors import ConfigError, FederationError

_CHARTER, _NONCE = "charter", "nonce"
POLL_SECONDS = 0.2


def open_store(address: str, serve: bool, timeout_seconds: float) -> dist.Store:
    """The store at `address` ("host:port"): connect to it, or open it there where `serve`.

    Raises `FederationError` where it cannot be opened, or nobody answers in time.
    """
    host, _, port = address.rpartition(":")
    try:
        return dist.TCPStore(
            host, int(port), is_master=serve, timeout=timedelta(seconds=timeout_seconds), wait_for_workers=False
        )
    except (RuntimeError, dist.DistError) as error:
        what = "open" if serve else "reach"
        raise FederationError(
            f"could not {what} federation.address {address} ({str(error).strip().splitlines()[0]}); check the address, "
            "that what serves it runs, once, and that no firewall is between"
        ) from error


class Rendezvous:
    """A connection to the federation's store. `store` is what the silos' groups are then built on."""

    def __init__(self, store: dist.Store, silo: int, silos: int, secret: str, deadline: Callable[[], float]) -> None:
        """`deadline` tells the seconds left for joining."""
        self.store = store
        self._silo = silo
        self._silos = silos
        self._secret = secret.encode()
        self._left = deadline

    @classmethod
    def meet(
        cls, address: str, serve: bool, silo: int, silos: int, secret: str, timeout_seconds: float
    ) -> "Rendezvous":
        """Connect to the store at `address` ("host:port"), or open it there where `serve`.

        Raises `FederationError` where it cannot be opened, or nobody answers in time.
        """
        end = time.monotonic() + timeout_seconds
        try:
            store = open_store(address, serve, timeout_seconds)
        except FederationError as error:
            raise FederationError(f"silo {silo} {error}") from error
        return cls(store, silo, silos, secret, lambda: end - time.monotonic())

    def sign(self, charter: dict[str, Any]) -> None:
        """Agree on the charter: the first silo's counts. `charter` is plain values, nested by field.

        Raises `FederationError` where the secret differs, `ConfigError` naming the first field that does.
        """
        self.store.compare_set(_NONCE, "", hashlib.sha256(time.time_ns().to_bytes(16, "big")).hexdigest())
        nonce = self.store.get(_NONCE)
        text = json.dumps(charter, sort_keys=True)
        offered = json.dumps({"silo": self._silo, "charter": text, "proof": self._proof(nonce, text)})
        standing = json.loads(self.store.compare_set(_CHARTER, "", offered))
        first = standing["silo"]
        if not hmac.compare_digest(standing["proof"], self._proof(nonce, standing["charter"])):
            raise FederationError(
                f"silo {self._silo} has another secret in federation.token_file than silo {first}; give all the same"
            )
        for field, theirs, ours in _differences(json.loads(standing["charter"]), charter):
            raise ConfigError(
                f"silo {self._silo} has {field} {ours}, silo {first}, which was first, has {theirs}; "
                "give all silos the same"
            )

    def exchange_cards(self, card: dict[str, Any]) -> list[dict[str, Any]]:
        """Leave this silo's card and wait for all: the cards in silo order.

        Raises `FederationError` naming the silos that did not come in time, or where this silo is there already.
        """
        # Two launches of one configuration have the same card; what a process draws at random, they have not.
        token = secrets.token_hex(16)
        if self.store.compare_set(f"launch-{self._silo}", "", token).decode() != token:
            raise FederationError(
                f"silo {self._silo} is in the federation already; start each launch with a federation.silo of its own, "
                "and what serves federation.address anew where all start again"
            )
        self.store.set(f"card-{self._silo}", json.dumps(card, sort_keys=True))
        return self.read_cards()

    def replace_card(self, card: dict[str, Any]) -> None:
        """Leave this silo's card, or another one where it comes again after a loss.

        Raises `FederationError` where it comes with other ranks than before: the others have made their plans.
        """
        key, text = f"card-{self._silo}", json.dumps(card, sort_keys=True)
        before = json.loads(self.store.get(key)) if self.store.check([key]) else card
        if before["shape"] != card["shape"]:
            raise FederationError(
                f"silo {self._silo} was in the federation as {before['shape']} and comes again as {card['shape']}; "
                "start it with as many ranks, cut alike"
            )
        self.store.set(key, text)

    def read_cards(self) -> list[dict[str, Any]]:
        """The cards of all silos, in their order, once all are there."""
        while missing := [silo for silo in range(self._silos) if not self.store.check([f"card-{silo}"])]:
            if self._left() <= 0:
                raise FederationError(
                    f"silo {self._silo} waited for silos {', '.join(map(str, missing))}, which did not come in time; "
                    "start them, or raise federation.join_timeout_seconds"
                )
            time.sleep(POLL_SECONDS)
        return [json.loads(self.store.get(f"card-{silo}")) for silo in range(self._silos)]

    def _proof(self, nonce: bytes, text: str) -> str:
        return hmac.new(self._secret, nonce + text.encode(), hashlib.sha256).hexdigest()


def _differences(theirs: Any, ours: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(field, theirs, ours) of all leaves that differ, in the order of names."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            yield from _differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else key)
    elif theirs != ours:
        yield path, theirs, ours
