"""Many things by name of which few are in use: each is made when it is asked for, and the last used stay."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class LazyMapping(Mapping[str, T], Generic[T]):
    """`make(name)` for each of `names`, of which the `keep` last used are kept. Threads may share it."""

    def __init__(self, names: Sequence[str], make: Callable[[str], T], keep: int) -> None:
        assert keep > 0
        self._names = dict.fromkeys(names)
        self._make = make
        self._keep = keep
        self._made: OrderedDict[str, T] = OrderedDict()
        # Held while one is made: whoever asks for the same meanwhile waits for it.
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> T:
        with self._lock:
            if name not in self._made:
                if name not in self._names:
                    raise KeyError(name)
                while len(self._made) >= self._keep:  # before the next is made: never more than `keep`
                    self._made.popitem(last=False)
                self._made[name] = self._make(name)
            self._made.move_to_end(name)
            return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
