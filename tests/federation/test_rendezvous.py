"""Silos that meet at a store: what they must have alike, who came, and who did not."""

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dept.common.errors import ConfigError, FederationError
from megatron_dept.federation.rendezvous import Rendezvous
from tests.support.distributed import free_port

CHARTER: dict[str, Any] = {"version": "1", "model": {"hidden_size": 32, "layers": 2}, "sources": {"de": "home 0"}}


def silo(store: dist.Store, number: int, secret: str = "secret", seconds: float = 20) -> Rendezvous:
    end = time.monotonic() + seconds
    return Rendezvous(store, number, 2, secret, lambda: end - time.monotonic())


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (CHARTER | {"version": "2"}, "silo 1 has version 2, silo 0, which was first, has 1"),
        (CHARTER | {"model": {"hidden_size": 64, "layers": 3}}, "silo 1 has model.hidden_size 64, silo 0, "),
        (CHARTER | {"sources": {}}, "silo 1 has sources.de None, silo 0, which was first, has home 0"),
        (CHARTER | {"seed": 3}, "silo 1 has seed 3, silo 0, which was first, has None"),
    ],
)
def test_whoever_differs_from_the_first_is_refused_with_the_field(other: dict[str, Any], told: str) -> None:
    store = dist.HashStore()
    silo(store, 0).sign(CHARTER)
    silo(store, 1).sign(CHARTER)
    with pytest.raises(ConfigError) as error:
        silo(store, 1).sign(other)
    assert str(error.value).startswith(told) and str(error.value).endswith("; give all silos the same")


def test_another_secret_is_refused_before_any_field_is_told() -> None:
    store = dist.HashStore()
    silo(store, 1).sign(CHARTER)
    with pytest.raises(FederationError, match="silo 0 has another secret in federation.token_file than silo 1"):
        silo(store, 0, "another").sign(CHARTER | {"version": "2"})
    assert "secret" not in str([store.get(key) for key in store.list_keys()])


def test_cards_come_in_the_order_of_silos_whoever_comes_first() -> None:
    store, found = dist.HashStore(), {}
    late = threading.Timer(0.3, lambda: found.update({0: silo(store, 0).exchange_cards({"of": 0})}))
    late.start()
    found[1] = silo(store, 1).exchange_cards({"of": 1})
    late.join()
    assert found == {0: [{"of": 0}, {"of": 1}], 1: [{"of": 0}, {"of": 1}]}


def test_a_silo_that_never_comes_is_named() -> None:
    with pytest.raises(FederationError, match="silo 0 waited for silos 1, which did not come in time; start them"):
        silo(dist.HashStore(), 0, seconds=0.3).exchange_cards({})


def test_a_silo_that_is_there_already_is_refused_though_it_is_the_same_in_all() -> None:
    store = dist.HashStore()
    store.set("card-1", "{}")
    assert silo(store, 0).exchange_cards({"of": "both"}) == [{"of": "both"}, {}]
    with pytest.raises(FederationError, match="silo 0 is in the federation already"):
        silo(store, 0).exchange_cards({"of": "both"})


def test_a_silo_that_comes_again_replaces_its_card_and_keeps_its_shape() -> None:
    store = dist.HashStore()
    first = {"shape": {"data": 1}, "round": 3}
    silo(store, 0).replace_card(first)
    silo(store, 0).replace_card(first | {"round": 5})
    silo(store, 1).replace_card(first)
    assert silo(store, 1).read_cards() == [first | {"round": 5}, first]
    with pytest.raises(FederationError, match="silo 1 was in the federation as {'data': 1} and comes again as"):
        silo(store, 1).replace_card({"shape": {"data": 2}, "round": 3})


def test_an_address_where_nobody_serves_is_told() -> None:
    with pytest.raises(FederationError, match=r"silo 1 could not reach federation.address 127.0.0.1:\d+ \("):
        Rendezvous.meet(f"127.0.0.1:{free_port()}", False, 1, 2, "secret", 0.5)
