"""The kernels on a GPU equal the reference on the CPU bit for bit; run with `pytest -m gpu`, or with all the others.

The cases are those that the CUDA source also meets under the thread shim; here too are sizes that only a GPU's memory
and speed allow.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dept.ops import body, remap, rows, wires
from megatron_dept.ops.native import native_kernels
from tests.ops import kernel_cases
from tests.ops.kernel_cases import equal_bits, placed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]

FACES = {
    name: getattr(module, name)
    for module in (rows, remap, body)
    for name in kernel_cases.KERNELS
    if hasattr(module, name)
}
LARGE = 2**31 + 1000


def called(face: Callable[..., Any], arguments: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """(arguments on the GPU after the call, what it returned), brought back to the CPU."""
    there = {
        key: placed(value, value.storage_offset(), "cuda") if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }
    returned = face(**there)
    back = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in there.items()}
    if isinstance(returned, tuple):
        return back, tuple(None if each is None else each.cpu() for each in returned)
    return back, None if returned is None else returned.detach().cpu()


def test_the_kernels_are_built_for_the_gpu():
    assert native_kernels("cuda")


@pytest.mark.parametrize("kernel", kernel_cases.KERNELS)
def test_equals_the_reference_on_the_cpu(kernel):
    for case in kernel_cases.KERNELS[kernel]():
        expected, expected_return = case.expected()
        found, returned = called(FACES[kernel], case.arguments)
        for name, tensor in expected.items():
            if isinstance(tensor, Tensor):
                assert equal_bits(found[name], tensor), f"{case.name}: {name}"
        pairs = (
            zip(returned, expected_return, strict=True)
            if isinstance(returned, tuple)
            else [(returned, expected_return)]
        )
        for number, (one, other) in enumerate(pairs):
            assert (one is None) == (other is None), f"{case.name}: returned {number}"
            assert one is None or equal_bits(one, other), f"{case.name}: returned {number}"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_arrives_as_nan(bad):
    value = torch.randn(600, device="cuda")
    value[300] = bad
    out = torch.empty(wires.wire_bytes(600, "int8"), dtype=torch.uint8, device="cuda")
    back = torch.zeros(600, device="cuda")
    body.body_pack(value, None, None, None, "int8", out)
    body.body_mean(out.unsqueeze(0), 1, "int8", back)
    assert back[256:512].isnan().all() and back[:256].isfinite().all() and back[512:].isfinite().all()


def test_the_gradient_is_the_same_every_time():
    """A row with thousands of occurrences, whose sum would move with the order of its parts."""
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(0, 5, (16, 1024), generator=generator, device="cuda")
    grad = torch.randn(16, 1024, 768, generator=generator, device="cuda")
    first, *others = [remap.remap_lookup_backward(ids, None, grad, 5, 0, 1024) for _ in range(5)]
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_the_current_stream_is_used():
    """On a stream of its own, behind work that takes a while and only then makes the input."""
    stream, table = torch.cuda.Stream(), torch.zeros(1000, 768, device="cuda")
    ids = torch.arange(1000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        table.fill_(1)
        found = rows.trim_gather(table, ids, dtype=torch.bfloat16)
        total = found.sum()
    stream.synchronize()
    assert total.item() == 1000 * 768


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_is_that_of_the_tensors():
    """Whatever device is current, and it stays so."""
    table, ids = torch.randn(100, 768, device="cuda:1"), torch.arange(0, 100, 3, device="cuda:1")
    with torch.cuda.device(0):
        found = rows.trim_gather(table, ids, dtype=torch.bfloat16)
        assert torch.cuda.current_device() == 0
    assert torch.equal(found, table[ids].bfloat16())


def free_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


@pytest.mark.skipif(free_memory() < 30 << 30, reason="needs 30 GB of GPU memory")
def test_more_than_32_bits_of_elements():
    hidden = 1024
    table = torch.zeros(LARGE // hidden + 1, hidden, device="cuda")
    last = len(table) - 1
    table[last] = torch.arange(hidden, device="cuda")
    found = rows.trim_gather(table, torch.tensor([0, last], device="cuda"))
    assert torch.equal(found, table[[0, last]])

    value, n = table.view(-1)[:LARGE], LARGE
    out = torch.empty(wires.wire_bytes(n, "int8"), dtype=torch.uint8, device="cuda")
    value[-1], value[-2] = 127, -3
    body.body_pack(value, None, None, None, "int8", out)
    body.body_apply(out, value, "int8")
    assert value[-2:].tolist() == [0, 0], "the last elements less what was sent of them, exactly all"
    value.fill_(2)
    body.body_mean(out.unsqueeze(0), 1, "int8", value)
    assert value[-2:].tolist() == [-3, 127]
