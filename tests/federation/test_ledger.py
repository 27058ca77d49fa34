"""The byte ledger: charged by two threads, emptied by one, and no byte lost."""

import threading
from collections import defaultdict
from typing import Any

from megatron_dept.federation.ledger import Ledger


def test_what_is_sent_while_the_counts_are_taken_counts_in_the_next() -> None:
    """A thread charges between the reading and the clearing: it has to wait, or its bytes would be gone."""
    ledger = Ledger()
    sender = threading.Thread(target=ledger.add, args=("federation", "body", 5))

    class Interrupted(defaultdict[Any, int]):
        def clear(self) -> None:
            sender.start()
            sender.join(0.1)
            super().clear()

    ledger._bytes = Interrupted(int)
    ledger.add("federation", "body", 3)
    assert ledger.take() == {"federation/body": 3}
    sender.join()
    ledger._bytes = defaultdict(int, ledger._bytes)
    assert ledger.take() == {"federation/body": 5}


def test_two_threads_charge_at_once() -> None:
    """Each charge reads, adds and writes: one that is interrupted between must not undo the other's."""
    ledger = Ledger()
    other = threading.Thread(target=ledger.add, args=("federation", "body", 5))

    class Interrupted(defaultdict[Any, int]):
        def __setitem__(self, key: Any, value: int) -> None:
            if threading.current_thread() is not other and not other.ident:
                other.start()
                other.join(0.1)
            super().__setitem__(key, value)

    ledger._bytes = Interrupted(int)
    ledger.add("federation", "body", 3)
    other.join()
    assert ledger.take() == {"federation/body": 8}
