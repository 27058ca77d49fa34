"""The packed exchange against numpy, element by element, and what an exchange as a whole must keep."""

import numpy as np
import pytest
import torch

from megatron_dept.dept.outer import OuterRule, outer_step
from megatron_dept.ops import body, reference, wires

BOTH = pytest.mark.parametrize("module", [body, reference])
EVERY_WIRE = pytest.mark.parametrize("wire", wires.WIRES)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def buffer(n, wire, *leading):
    return torch.full((*leading, wires.wire_bytes(n, wire)), 0xA5, dtype=torch.uint8)


def int8_by_hand(x):
    """(bytes, residual) of fp32 x, one block after another."""
    x = x.numpy()
    sent, scales, left = [], [], []
    for block in np.split(x, range(wires.BLOCK, len(x), wires.BLOCK)) if len(x) else []:
        largest = np.abs(block).max()
        scales.append(largest / np.float32(127))
        inverse = np.float32(0) if largest == 0 else np.float32(127) / largest
        q = np.clip(np.rint(block * inverse), -127, 127).astype(np.int8)
        sent.append(q)
        left.append(block - q.astype(np.float32) * scales[-1])
    padding = np.zeros(-len(x) % 4, np.int8)
    bytes_ = np.concatenate([*sent, padding]).view(np.uint8), np.array(scales, np.float32).view(np.uint8)
    return torch.from_numpy(np.concatenate(bytes_)), torch.from_numpy(np.concatenate([np.empty(0, np.float32), *left]))


@pytest.mark.parametrize(
    "n, expected", [(0, (0, 0, 0)), (1, (4, 2, 8)), (256, (1024, 512, 260)), (257, (1028, 514, 268))]
)
def test_wire_bytes(n, expected):
    assert tuple(wires.wire_bytes(n, wire) for wire in ("fp32", "bf16", "int8")) == expected


@BOTH
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
@pytest.mark.parametrize("given", ["value", "local", "carried", "both"])
def test_fp32_and_bf16_packs(module, n, given):
    value, local, carried = (drawn(n, seed=seed) for seed in range(3))
    local = local if given in ("local", "both") else None
    carried = carried if given in ("carried", "both") else None
    expected = value if local is None else value - local
    expected = expected if carried is None else carried + expected
    for wire, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out = buffer(n, wire)
        module.body_pack(value, local, carried, None, wire, out)
        assert torch.equal(out.view(dtype), expected.to(dtype))


@BOTH
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
@pytest.mark.parametrize("feedback", [True, False])
def test_int8_packs(module, n, feedback):
    value, local, residual = (drawn(n, seed=seed) for seed in range(3))
    value[256:400] = local[256:400] = 0
    residual[256:512] = 0
    out = buffer(n, "int8")
    expected, left = int8_by_hand(value - local + residual if feedback else value - local)
    module.body_pack(value, local, None, residual if feedback else None, "int8", out)
    assert torch.equal(out, expected)
    if feedback:
        assert torch.equal(residual, left)


@BOTH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@EVERY_WIRE
def test_what_is_not_finite_arrives_as_such(module, wire, bad):
    value = drawn(600)
    value[300] = bad
    out, mean = buffer(600, wire, 1), torch.empty(600)
    module.body_pack(value, None, None, None, wire, out[0])
    module.body_mean(out, 1, wire, mean)
    poisoned = slice(256, 512) if wire == "int8" else slice(300, 301)
    assert not mean[poisoned].isfinite().any()
    mean[poisoned] = 0
    assert mean.isfinite().all()


@BOTH
def test_the_smallest_and_the_largest_blocks_are_sent(module):
    for element in (1e-45, 1e-38, 3e38):
        value, residual = torch.tensor([element, 0.0, -element]), torch.zeros(3)
        out, mean = buffer(3, "int8", 1), torch.empty(3)
        module.body_pack(value, None, None, residual, "int8", out[0])
        assert residual.isfinite().all()
        module.body_mean(out, 1, "int8", mean)
        # Of a denormal number, a scale keeps few bits or none.
        torch.testing.assert_close(mean, value, rtol=1e-2, atol=1e-38)


@BOTH
@EVERY_WIRE
@pytest.mark.parametrize("silos, sources", [(1, 1), (2, 2), (3, 5)])
def test_mean_sums_in_silo_order_and_divides_once(module, wire, silos, sources):
    n = 517
    received, mean = buffer(n, wire, silos), torch.empty(n)
    total = None
    for silo in range(silos):
        body.body_pack(drawn(n, seed=silo), None, None, None, wire, received[silo])
        sent = reference.decode(received[silo], wire, n).numpy()
        total = sent if total is None else total + sent
    module.body_mean(received, sources, wire, mean)
    np.testing.assert_array_equal(mean.numpy(), total / np.float32(sources))


@BOTH
@EVERY_WIRE
@pytest.mark.parametrize("mu", [None, 0.9])
def test_unpack_and_apply_are_the_outer_step(module, wire, mu):
    n, rule = 517, OuterRule("fedavg" if mu is None else "nesterov", 0.7, mu or 0.0)
    received = buffer(n, wire, 3)
    for silo in range(3):
        body.body_pack(drawn(n, seed=silo), None, None, None, wire, received[silo])
    value, momentum = drawn(n, seed=5), None if mu is None else drawn(n, seed=6)
    mean = torch.empty(n)
    reference.body_mean(received, 3, wire, mean)
    new, new_momentum = value.clone(), None if momentum is None else momentum.clone()
    outer_step(rule, new, mean, new_momentum)

    before, back = value.clone(), buffer(n, wire)
    residual = drawn(n, seed=7) * 1e-3 if wire == "int8" else None
    expected_residual = None if residual is None else residual.clone()
    module.body_unpack(received, 3, value, momentum, 0.7, mu or 0.0, wire, back, residual)
    assert torch.equal(value, before)
    if momentum is not None:
        assert torch.equal(momentum, new_momentum)
    if wire == "fp32":
        expected = new
    else:
        packed = buffer(n, wire)
        reference.body_pack(value, new, None, expected_residual, wire, packed)
        assert torch.equal(back, packed)
        expected = value - reference.decode(packed, wire, n)
    if residual is not None:
        assert torch.equal(residual, expected_residual)

    master, low = torch.empty(n), torch.empty(n, dtype=torch.bfloat16)
    module.body_apply(back, value, wire, master, low)
    assert torch.equal(value, expected)
    assert torch.equal(master, value)
    assert torch.equal(low, value.bfloat16())


def test_error_feedback_loses_nothing_in_the_long_run():
    value, residual, out = drawn(300), torch.zeros(300), buffer(300, "int8", 1)
    mean, told = torch.empty(300), torch.zeros(300, dtype=torch.float64)
    for _ in range(20):
        body.body_pack(value, None, None, residual, "int8", out[0])
        body.body_mean(out, 1, "int8", mean)
        told += mean.double()
    # What is not told yet is one rounding: half of the largest magnitude (about 3.5) / 127; the rest is fp32's own.
    torch.testing.assert_close(told, 20 * value.double(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "name, changed",
    [
        ("wire", {"wire": "int4"}),
        ("value", {"value": torch.zeros(4, 1)}),
        ("local", {"local": torch.zeros(5)}),
        ("carried", {"carried": torch.zeros(4, dtype=torch.bfloat16)}),
        ("residual", {"residual": torch.zeros(4, device="meta")}),
        ("residual", {"wire": "bf16", "out": torch.zeros(8, dtype=torch.uint8)}),
        ("out", {"out": torch.zeros(7, dtype=torch.uint8)}),
        ("out", {"out": torch.zeros(8, dtype=torch.int8)}),
        ("out", {"out": torch.zeros(9, dtype=torch.uint8)[1:]}),
    ],
)
def test_what_does_not_fit_a_pack_is_named(name, changed):
    arguments = {
        "value": torch.zeros(4),
        "local": torch.zeros(4),
        "carried": torch.zeros(4),
        "residual": torch.zeros(4),
        "wire": "int8",
        "out": torch.zeros(8, dtype=torch.uint8),
    }
    body.body_pack(**arguments)
    with pytest.raises(ValueError, match=f"^{name} "):
        body.body_pack(**{**arguments, **changed})


@pytest.mark.parametrize(
    "name, changed",
    [
        ("received", {"received": torch.zeros(0, 8, dtype=torch.uint8)}),
        ("received", {"received": torch.zeros(8, dtype=torch.uint8)}),
        ("sources", {"sources": 0}),
        ("momentum", {"momentum": torch.zeros(3)}),
        ("back", {"back": torch.zeros(4, dtype=torch.uint8)}),
        ("back_residual", {"back_residual": torch.zeros(5)}),
    ],
)
def test_what_does_not_fit_an_unpack_is_named(name, changed):
    arguments = {
        "received": torch.zeros(1, 8, dtype=torch.uint8),
        "sources": 1,
        "value": torch.zeros(4),
        "momentum": torch.zeros(4),
        "learning_rate": 1.0,
        "mu": 0.5,
        "wire": "int8",
        "back": torch.zeros(8, dtype=torch.uint8),
        "back_residual": torch.zeros(4),
    }
    body.body_unpack(**arguments)
    with pytest.raises(ValueError, match=f"^{name} "):
        body.body_unpack(**{**arguments, **changed})


def test_what_does_not_fit_an_apply_is_named():
    back, value = torch.zeros(8, dtype=torch.uint8), torch.zeros(4)
    with pytest.raises(ValueError, match="^low "):
        body.body_apply(back, value, "int8", None, torch.zeros(4))
    with pytest.raises(ValueError, match="^master "):
        body.body_apply(back, value, "int8", torch.zeros(5))
    with pytest.raises(ValueError, match="^back "):
        body.body_apply(back[:4], value, "int8")
