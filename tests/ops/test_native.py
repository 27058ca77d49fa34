"""Native kernels == plain torch reference, bit for bit, on random shapes, ids, dtypes and alignments; as operators."""

import random

import pytest
import torch

from megatron_dept.ops import body, reference, remap, rows, wires
from megatron_dept.ops.native import OPERATORS, native_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One vector and less, a block of the wire and its neighbours, a part of a row that the kernels take at once and more.
SIZES = [0, 1, 2, 3, 7, 16, 33, 255, 256, 257, 511, 1000, 1024, 1025, 2500]
SPECIAL = torch.tensor(
    [0.0, -0.0, 1e-45, -1e-40, 6e-8, 3e-8, 2.9802323e-08, 6.1e-5, 65504.0, 65519.9, 65520.0, 7e4, 3.4e38, -3.4e38, 1e-3]
)
NOT_FINITE = torch.tensor([torch.nan, torch.inf, -torch.inf])
CASES = pytest.mark.parametrize("seed", range(24))


class Draw:
    """Random arguments of one case; tensors start at any element of their storage."""

    def __init__(self, seed):
        self.choice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, *sizes):
        return self.choice.choice(sizes or SIZES)

    def maybe(self, tensor):
        return tensor if self.choice.random() < 0.6 else None

    def floats(self, *shape, dtype=torch.float32, finite=True):
        """Normal numbers of any exponent, with special ones among them."""
        offset = self.choice.randrange(4)
        count = offset + torch.Size(shape).numel()
        drawn = torch.randn(count, generator=self.generator)
        drawn *= 10.0 ** torch.randint(-4, 5, (count,), generator=self.generator)
        special = SPECIAL if finite else torch.cat([SPECIAL, NOT_FINITE])
        places = torch.rand(count, generator=self.generator) < 0.05
        drawn[places] = special[torch.randint(len(special), (int(places.sum()),), generator=self.generator)]
        return drawn.to(dtype)[offset:].view(shape)

    def integers(self, low, high, *shape, dtype=torch.int64):
        offset = self.choice.randrange(3)
        count = offset + torch.Size(shape).numel()
        return torch.randint(low, high, (count,), generator=self.generator).to(dtype)[offset:].view(shape)

    def wire(self, n, wire, *leading):
        """Room for packed elements, filled with what must not stay; at 0 or more units into its storage."""
        unit = 2 if wire == "bf16" else 4
        offset = unit * self.choice.randrange(3)
        shape = (*leading, wires.wire_bytes(n, wire))
        return torch.full((offset + torch.Size(shape).numel(),), 0xA5, dtype=torch.uint8)[offset:].view(shape)

    def received(self, silos, n, wire):
        packed = self.wire(n, wire, silos)
        for each in packed:
            reference.encode(self.floats(n, finite=self.choice.random() < 0.5), None, wire, each)
        return packed


def copied(arguments):
    """Copies of the tensors among them, at the same alignment."""
    return [shifted(each) if isinstance(each, torch.Tensor) else each for each in arguments]


def shifted(tensor):
    whole = tensor.new_empty(tensor.storage_offset() + tensor.numel())
    part = whole[tensor.storage_offset() :].view(tensor.shape)
    return part.copy_(tensor)


def assert_same(found, expected, what=""):
    """Equal bits, except that any NaN is as good as another."""
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    if found.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan()), what
        found, expected = (torch.where(each.isnan(), 0, each) for each in (found, expected))
        bits = torch.int32 if found.dtype == torch.float32 else torch.int16
        found, expected = found.view(bits), expected.view(bits)
    assert torch.equal(found, expected), what


def assert_same_bytes(found, expected, n, wire):
    """Packed bytes; on the float wires any NaN is as good as another."""
    if wire == "int8":
        assert torch.equal(found, expected)
    else:
        dtype = torch.float32 if wire == "fp32" else torch.bfloat16
        assert_same(found.view(dtype), expected.view(dtype))


def test_native_is_built():
    assert native_kernels()


@CASES
def test_gather(seed):
    draw = Draw(seed)
    n, h, k, first = draw.size(0, 1, 7, 100), draw.size(), draw.size(0, 1, 2, 50), draw.size(0, 5, 10**12)
    table = draw.floats(n, h, finite=False)
    ids = (draw.integers(-3, n + 3, k) + first).sort().values
    dtype = draw.choice.choice(DTYPES)
    out = draw.maybe(draw.floats(k, h, dtype=dtype))
    found = rows.trim_gather(table, ids, first, dtype, out)
    assert out is None or found is out
    assert_same(found, reference.trim_gather(table, ids, first, dtype))


@CASES
def test_scatter_mean(seed):
    draw = Draw(seed)
    n, h = draw.size(1, 2, 9, 60), draw.size()
    table, momentum = draw.floats(n, h, finite=False), draw.maybe(draw.floats(n, h, finite=False))
    # None, one, some or all of the rows, by up to five sources.
    share = draw.choice.choice([0.0, 0.3, 0.7, 1.0])
    held = torch.rand(draw.size(1, 2, 5), n, generator=draw.generator) < share
    lists = [each.nonzero().squeeze(1) for each in held]
    deltas = draw.floats(sum(map(len, lists)), h, dtype=draw.choice.choice(DTYPES), finite=False)
    which, starts, order = rows.order_by_row(lists)
    counts = starts.diff().int() + draw.size(0, 2)
    learning_rate, mu = draw.choice.choice([1.0, 0.7, 0.05]), draw.choice.choice([0.9, 0.3])
    ours, theirs = copied([table, momentum]), copied([table, momentum])
    rows.trim_scatter_mean(*ours, which, starts, order, deltas, counts, learning_rate, mu)
    reference.trim_scatter_mean(*theirs, which, starts, order, deltas, counts, learning_rate, mu)
    for found, expected, before in zip(ours, theirs, [table, momentum], strict=True):
        if before is not None:
            assert_same(found, expected)
            untouched = torch.ones(n, dtype=torch.bool)
            untouched[which] = False
            assert torch.equal(found[untouched].view(torch.int32), before[untouched].view(torch.int32))


@CASES
def test_lookup_and_its_backward(seed):
    draw = Draw(seed)
    total, b, s, h = draw.size(1, 3, 40), draw.size(0, 1, 3), draw.size(1, 2, 30), draw.size()
    v, start = draw.size(0, 1, 20, 60), draw.size(0, 0, 5)
    ids = draw.integers(0, total, b, s)
    local_of = draw.maybe(draw.integers(-1, start + v + 2, total, dtype=torch.int32))
    table, dtype = draw.floats(v, h, finite=False), draw.choice.choice(DTYPES)
    positions = draw.choice.choice([0, s, s + 3])
    position = draw.floats(positions, h) if positions else None
    found = remap.remap_lookup(ids, local_of, table, position, dtype, start)
    assert_same(found, reference.remap_lookup(ids, local_of, table, position, dtype, start))

    grad = draw.floats(b, s, h, dtype=dtype, finite=False)
    results = remap.remap_lookup_backward(ids, local_of, grad, v, start, positions)
    expected = reference.remap_lookup_backward(ids, local_of, grad, v, start, positions)
    assert torch.equal(results[0], expected[0])
    assert_same(results[1], expected[1])
    assert (results[2] is None) == (position is None)
    if results[2] is not None:
        assert_same(results[2], expected[2])


@CASES
@pytest.mark.parametrize("wire", wires.WIRES)
def test_pack(seed, wire):
    draw = Draw(seed)
    n = draw.size()
    value = draw.floats(n, finite=draw.choice.random() < 0.5)
    if draw.choice.random() < 0.2:
        value *= 1e-38
    local, carried = draw.maybe(draw.floats(n)), draw.maybe(draw.floats(n))
    residual = draw.maybe(draw.floats(n)) if wire == "int8" else None
    ours, theirs = (
        [*copied([value, local, carried, residual]), wire, out] for out in (draw.wire(n, wire), draw.wire(n, wire))
    )
    body.body_pack(*ours)
    reference.body_pack(*theirs)
    assert_same_bytes(ours[5], theirs[5], n, wire)
    if residual is not None:
        assert_same(ours[3], theirs[3])


@CASES
@pytest.mark.parametrize("wire", wires.WIRES)
def test_mean_unpack_and_apply(seed, wire):
    draw = Draw(seed)
    n, silos, sources = draw.size(), draw.size(1, 2, 3, 5), draw.size(1, 2, 3, 7)
    received = draw.received(silos, n, wire)
    mean, expected_mean = draw.floats(n), torch.empty(n)
    body.body_mean(received, sources, wire, mean)
    reference.body_mean(received, sources, wire, expected_mean)
    assert_same(mean, expected_mean)

    value, momentum = draw.floats(n), draw.maybe(draw.floats(n))
    residual = draw.maybe(draw.floats(n)) if wire == "int8" else None
    rule = draw.choice.choice([1.0, 0.7]), draw.choice.choice([0.9, 0.5])
    ours, theirs = (
        [*copied([received, sources, value, momentum]), *rule, wire, draw.wire(n, wire), *copied([residual])]
        for _ in range(2)
    )
    body.body_unpack(*ours)
    reference.body_unpack(*theirs)
    assert torch.equal(ours[2].view(torch.int32), value.view(torch.int32))
    assert_same_bytes(ours[7], theirs[7], n, wire)
    for found, expected in ((ours[3], theirs[3]), (ours[8], theirs[8])):
        if found is not None:
            assert_same(found, expected)

    back = theirs[7]
    master = draw.maybe(draw.floats(n))
    low = draw.maybe(draw.floats(n, dtype=draw.choice.choice([torch.bfloat16, torch.float16])))
    ours, theirs = ([*copied([back, value]), wire, *copied([master, low])] for _ in range(2))
    body.body_apply(*ours)
    reference.body_apply(*theirs)
    for found, expected in zip(ours, theirs, strict=True):
        if isinstance(found, torch.Tensor) and found is not ours[0]:
            assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_cast_is_to_nearest_even(dtype):
    """Every number of the narrow type, and what lies halfway between neighbours and beside that."""
    narrow = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    narrow = narrow[narrow.isfinite()].sort().values
    halves = (narrow[1:].double() + narrow[:-1].double()).div(2).float()
    beside = [torch.nextafter(halves, torch.full_like(halves, end)) for end in (-torch.inf, torch.inf)]
    table = torch.cat([narrow, halves, *beside, SPECIAL, NOT_FINITE]).unsqueeze(0)
    assert_same(rows.trim_gather(table, torch.tensor([0]), 0, dtype), table.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_narrow_number_is_widened_exactly(dtype):
    deltas = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).unsqueeze(0)
    table, one = torch.zeros(1, 2**16), torch.tensor([0])
    rows.trim_scatter_mean(table, None, one, torch.tensor([0, 1]), one, deltas, torch.ones(1, dtype=torch.int32), 1, 0)
    # From zero: the sign of a zero does not come back.
    assert_same(table, 0.0 - (0.0 + deltas.float()))


def example(name):
    """Arguments of each operator, small."""
    draw = Draw(7)
    ids, table, one = torch.tensor([[1, 3, 1]]), draw.floats(4, 6), torch.tensor([0, 1])
    value, momentum, residual = (draw.floats(300) for _ in range(3))
    int8 = wires.WIRES.index("int8")
    received = draw.received(2, 300, "int8")
    return {
        "trim_gather": (table, torch.tensor([1, 3]), 0, torch.empty(2, 6, dtype=torch.bfloat16)),
        "trim_scatter_mean": (
            *(table, draw.floats(4, 6), torch.tensor([2]), one, one[:1], draw.floats(1, 6)),
            *(torch.ones(1, dtype=torch.int32), 0.7, 0.9),
        ),
        "remap_lookup": (ids, None, table, draw.floats(3, 6), 0, torch.empty(1, 3, 6)),
        "remap_backward": (draw.floats(1, 3, 6), one, one[1:], torch.empty(1, 6), torch.empty(3, 6)),
        "body_pack": (value, momentum, None, residual, int8, draw.wire(300, "int8")),
        "body_mean": (received, 2, int8, torch.empty(300)),
        "body_unpack": (received, 2, value, momentum, 0.7, 0.9, int8, draw.wire(300, "int8"), residual),
        "body_apply": (received[0], value, int8, torch.empty(300), torch.empty(300, dtype=torch.bfloat16)),
    }[name]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_what_torch_asks_of_one(name):
    torch.library.opcheck(getattr(torch.ops.megatron_dept, name), example(name))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_can_be_compiled_in_one_graph(name):
    operator = getattr(torch.ops.megatron_dept, name)
    ours, theirs = copied(example(name)), copied(example(name))
    torch.compile(lambda *arguments: operator(*arguments), fullgraph=True, backend="aot_eager")(*ours)
    operator(*theirs)
    for found, expected in zip(ours, theirs, strict=True):
        if isinstance(found, torch.Tensor):
            assert_same(found, expected)


def test_faces_can_be_compiled_in_one_graph():
    table, ids, position = torch.randn(5, 4), torch.tensor([[1, 4]]), torch.randn(2, 4)

    def both(table, ids, position):
        gathered = rows.trim_gather(table, ids[0], 0, torch.bfloat16)
        looked_up = remap.remap_lookup(ids, None, table, position, torch.bfloat16)
        mean = torch.empty_like(table[0])
        out = torch.empty(wires.wire_bytes(4, "bf16"), dtype=torch.uint8)
        body.body_pack(table[0], None, None, None, "bf16", out)
        body.body_mean(out.unsqueeze(0), 1, "bf16", mean)
        return gathered, looked_up, mean

    for found, expected in zip(
        torch.compile(both, fullgraph=True, backend="aot_eager")(table, ids, position),
        both(table, ids, position),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_two_threads_give_the_bits_of_one():
    draw = Draw(3)
    # Several parts of kGrain elements for each.
    table, n = draw.floats(400, 257), 300_001
    ids = draw.integers(0, 400, 5, 401)
    value, local, residual = (draw.floats(n) for _ in range(3))

    def everything():
        packed, left = torch.empty(1, wires.wire_bytes(n, "int8"), dtype=torch.uint8), residual.clone()
        body.body_pack(value, local, None, left, "int8", packed[0])
        mean = torch.empty(n)
        body.body_mean(packed, 1, "int8", mean)
        looked_up = remap.remap_lookup(ids, None, table, None, torch.float32)
        back = remap.remap_lookup_backward(ids, None, looked_up, 400, 0, 401)
        return [packed, left, mean, looked_up, *back, rows.trim_gather(table, ids[0], 0, torch.float16)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(2)
        together = everything()
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(alone, together, strict=True):
        assert_same(one, two)


@pytest.mark.parametrize(
    "name, place, wrong, message",
    [
        ("trim_gather", 1, torch.tensor([1, 3], dtype=torch.int32), "ids has the wrong dtype"),
        ("trim_gather", 3, torch.empty(3, 6), "out has 18 elements; want 12"),
        ("trim_scatter_mean", 2, torch.tensor([4]), "rows.0. is 4, outside 0..3"),
        ("trim_scatter_mean", 3, torch.tensor([0, 2]), "ends beyond order"),
        ("trim_scatter_mean", 4, torch.tensor([-1]), "order.0. is -1"),
        ("remap_lookup", 1, torch.tensor([0, 1], dtype=torch.int32), "ids.1. is 3, outside 0..1"),
        ("remap_lookup", 3, torch.empty(2, 6), "position is shorter"),
        ("remap_backward", 2, torch.tensor([3]), "order.0. is 3, outside 0..2"),
        ("body_pack", 5, torch.empty(1, dtype=torch.uint8), "out has 1 elements; want 308"),
        ("body_pack", 4, 3, "wire is 3"),
        ("body_apply", 4, torch.empty(300), "low is not bf16 or fp16"),
    ],
)
def test_operators_called_without_their_faces_refuse_foreign_memory(name, place, wrong, message):
    arguments = list(example(name))
    arguments[place] = wrong
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.megatron_dept, name)(*arguments)
