"""Makes the calls that `cuda_shim.run` lists, in a process that has the address sanitizer loaded first.

Standard library alone, so that it starts in no time. An array is a block of its own from the sanitizer's allocator, of
its size to the byte: what is read or written beside it ends the process.
"""

import ctypes
import pickle
import sys
from pathlib import Path


def main() -> None:
    path, orders, aligned, calls = pickle.loads(Path(sys.argv[1]).read_bytes())
    library, libc = ctypes.CDLL(path), ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]

    def block(data: bytes, offset: int) -> tuple[int, int]:
        """(what to free, where the data are)."""
        base = ctypes.c_void_p()
        assert (
            libc.posix_memalign(ctypes.byref(base), ctypes.c_size_t(aligned), ctypes.c_size_t(len(data) + offset)) == 0
        )
        assert base.value is not None
        ctypes.memmove(base.value + offset, data, len(data))
        return base.value, base.value + offset

    class Where(ctypes.Structure):
        _fields_ = [("parallel_for", ctypes.c_void_p), ("stream", ctypes.c_void_p)]

    answers = []
    for function, fields in calls:
        struct = type(
            "Arguments", (ctypes.Structure,), {"_fields_": [(name, getattr(ctypes, kind)) for name, kind, _ in fields]}
        )
        of_orders = []
        for order in orders:
            library.shim_set_order(order)
            blocks = {name: block(*value) for name, _, value in fields if isinstance(value, tuple)}
            numbers = {name: value for name, _, value in fields if not isinstance(value, tuple)}
            arguments = struct(**numbers, **{name: address for name, (_, address) in blocks.items()})
            # What fails here fails with a report of its own, and this says of which call.
            print(f"{function} in order {order}: {numbers}", file=sys.stderr, flush=True)
            error = getattr(library, function)(ctypes.byref(arguments), ctypes.byref(Where()))
            assert error == 0, f"{function} returned {error}"
            sizes = {name: len(value[0]) for name, _, value in fields if isinstance(value, tuple)}
            of_orders.append({name: ctypes.string_at(address, sizes[name]) for name, (_, address) in blocks.items()})
            for base, _ in blocks.values():
                libc.free(base)
        answers.append(of_orders)
    Path(sys.argv[2]).write_bytes(pickle.dumps(answers))


main()
