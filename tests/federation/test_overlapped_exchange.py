"""What an overlapped exchange gives while it is under way, and who hears of what goes wrong in it."""

import threading

import pytest
import torch
from torch import Tensor

from megatron_dept.common.errors import LostPeerError
from megatron_dept.dept.outer import SCRATCH_ELEMENTS, OuterRule
from megatron_dept.federation.body_exchange import BodyExchange
from megatron_dept.federation.communicator import Alone
from megatron_dept.federation.ledger import Ledger
from megatron_dept.federation.overlapped_exchange import OverlappedExchange

RULE = OuterRule("nesterov", 0.7, 0.9)
LIMIT = 30
"""Seconds after which a test that waits for a thread has failed."""


class Held(BodyExchange):
    """An exchange that ends when it may; `fault` is what then goes wrong."""

    def __init__(self, partition: Tensor, fault: Exception | None = None) -> None:
        super().__init__(Alone(), partition, RULE)
        self.may_end = threading.Event()
        self.ledger = Ledger()
        self.fault = fault

    def finish(self, sources: int) -> None:
        assert self.may_end.wait(LIMIT)
        if self.fault is not None:
            raise self.fault
        self.ledger.add("federation", "body", 7)
        super().finish(sources)


def test_the_update_is_what_the_exchange_makes_of_the_start() -> None:
    """Over more elements than are worked on at once; the delta of the next round is taken from the new value."""
    torch.manual_seed(0)
    first, trained, local = torch.randn(3, SCRATCH_ELEMENTS + 5)
    plain, held = BodyExchange(Alone(), first, RULE), Held(first)
    overlapped = OverlappedExchange(held, held.ledger)
    for exchange in (plain, overlapped):
        exchange.add(trained.clone())
        exchange.finish(1)
    assert held.delta.any(), "the exchange is still to come"
    assert torch.equal(overlapped.start, first)
    held.may_end.set()
    assert torch.equal(overlapped.value, plain.value) and not torch.equal(plain.value, first)
    assert torch.equal(overlapped.start, first), "phases that come later begin with it too"
    updated = overlapped.updated(local.clone())
    assert torch.equal(updated, local + (plain.value - first))
    overlapped.add(updated.clone())
    assert torch.equal(overlapped.delta, plain.value - updated)
    overlapped.finish(1)
    assert torch.equal(overlapped.start, plain.value)


ASKED = ["value", "delta", "momentum", "owned_value", "owned_momentum"]


@pytest.mark.parametrize("what", ASKED)
def test_whoever_asks_for_the_outcome_waits_for_it(what: str) -> None:
    held = Held(torch.ones(4))
    overlapped = OverlappedExchange(held, held.ledger)
    overlapped.add(torch.zeros(4))
    overlapped.finish(1)
    threading.Timer(0.05, held.may_end.set).start()
    plain = BodyExchange(Alone(), torch.ones(4), RULE)
    plain.add(torch.zeros(4))
    plain.finish(1)
    assert torch.equal(getattr(overlapped, what), getattr(plain, what))
    assert 0 < overlapped.waited <= overlapped.whole + 0.05


def test_bytes_are_those_of_whole_exchanges() -> None:
    held = Held(torch.ones(4))
    overlapped = OverlappedExchange(held, held.ledger)
    overlapped.finish(1)
    threading.Timer(0.05, held.may_end.set).start()
    assert overlapped.sent() == {"federation/body": 7}
    assert overlapped.sent() == {}


@pytest.mark.parametrize("fault", [LostPeerError("rank 0 of 2 lost a peer"), ZeroDivisionError("nobody foresaw this")])
@pytest.mark.parametrize("asks", ["value", "finish"])
def test_what_goes_wrong_in_the_background_is_raised_where_the_outcome_is_asked_for(
    fault: Exception, asks: str
) -> None:
    held = Held(torch.ones(4), fault)
    held.may_end.set()
    overlapped = OverlappedExchange(held, held.ledger)
    overlapped.finish(1)
    with pytest.raises(type(fault), match=str(fault)):
        _ = overlapped.value if asks == "value" else overlapped.finish(1)  # type: ignore[func-returns-value]
