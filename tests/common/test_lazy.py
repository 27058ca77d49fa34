"""Things made when asked for: the last used stay, and no more of them than may."""

import threading

import pytest

from megatron_dept.common.errors import DataError
from megatron_dept.common.lazy import LazyMapping


class Maker:
    """Notes what is made, and how many of it live at once."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, name: str) -> str:
        self.made.append(name)
        return name.upper()


def test_each_is_made_when_asked_for_and_the_last_used_stay() -> None:
    make = Maker()
    mapping = LazyMapping("abc", make, keep=2)
    assert not make.made
    assert [mapping[name] for name in "abacabc"] == list("ABACABC")
    # c displaces b, which was used before a; then b displaces c, and c displaces a.
    assert make.made == ["a", "b", "c", "b", "c"]


def test_names_are_known_without_making() -> None:
    make = Maker()
    mapping = LazyMapping(["b", "a"], make, keep=1)
    assert list(mapping) == ["b", "a"] and len(mapping) == 2 and "a" in mapping and "c" not in mapping
    assert mapping.keys() == {"a", "b"} and not make.made
    with pytest.raises(KeyError):
        mapping["c"]


def test_what_cannot_be_made_is_told_each_time_and_leaves_the_rest() -> None:
    def make(name: str) -> str:
        if name == "bad":
            raise DataError("bad")
        return name

    mapping = LazyMapping(["good", "bad"], make, keep=1)
    for _ in range(2):
        with pytest.raises(DataError):
            mapping["bad"]
    assert mapping["good"] == "good"


def test_threads_that_ask_for_the_same_make_it_once() -> None:
    begun, go_on, make = threading.Event(), threading.Event(), Maker()

    def slow(name: str) -> str:
        begun.set()
        assert go_on.wait(10)
        return make(name)

    mapping = LazyMapping(["a"], slow, keep=1)
    asking = [threading.Thread(target=mapping.__getitem__, args=("a",)) for _ in range(2)]
    for thread in asking:
        thread.start()
    assert begun.wait(10)
    go_on.set()
    for thread in asking:
        thread.join(10)
    assert make.made == ["a"]
