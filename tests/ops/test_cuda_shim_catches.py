"""The thread shim tells broken kernels from sound ones: races, accesses outside or aslant, threads that do not meet."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.ops import cuda_shim
from tests.ops.cuda_shim import Call
from tests.ops.kernel_cases import placed

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the thread shim with")

SOURCE = Path(__file__).with_name("broken_kernels.cu")


@pytest.fixture(scope="session")
def library():
    return cuda_shim.build("broken", [SOURCE])


def outputs(library, function, folder, offset=0):
    """What the kernel writes in each order of the threads; `in` has large numbers that cancel, so that order tells."""
    values = torch.randn(256, generator=torch.Generator().manual_seed(0))
    values[::5] *= 1e8
    fields = {"in": placed(values, offset), "out": placed(torch.zeros(256), offset), "n": 256}
    orders = cuda_shim.run(library, [Call(function, "Arguments", fields, SOURCE)], folder)[0]
    return values, [found["out"] for found in orders]


@pytest.mark.parametrize("function", ["sound_barrier", "sound_shuffles", "packs"])
def test_sound_kernels_pass(function, library, tmp_path):
    values, found = outputs(library, function, tmp_path)
    expected = {
        "sound_barrier": values.flip(0),
        "packs": values,
        # Halves are added pairwise, as the shuffles do it.
        "sound_shuffles": shuffled_sum(values),
    }[function]
    assert all(torch.equal(each, expected) for each in found)


def shuffled_sum(values):
    lanes = values.view(8, 32)
    for apart in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[:, torch.arange(32) ^ apart]
    return lanes.reshape(-1)


def test_a_missing_barrier_gives_wrong_numbers(library, tmp_path):
    values, found = outputs(library, "missing_barrier", tmp_path)
    assert not torch.equal(found[0], values.flip(0))


def test_atomics_give_other_sums_in_other_orders(library, tmp_path):
    _, found = outputs(library, "atomics", tmp_path)
    assert len({each[0].item() for each in found}) == len(cuda_shim.ORDERS)


@pytest.mark.parametrize(
    ("function", "offset", "report"),
    [
        ("read_outside", 0, "heap-buffer-overflow"),
        ("write_outside", 0, "heap-buffer-overflow"),
        ("packs", 1, "misaligned address"),
        ("absent_lanes", 0, "wait for others that never come"),
        ("narrow_mask", 0, "mask leaves it out"),
        ("divergent_barrier", 0, "wait for others that never come"),
        ("narrow_index", 0, "signed integer overflow"),
    ],
)
def test_what_ends_the_process(function, offset, report, library, tmp_path):
    with pytest.raises(AssertionError, match=report):
        outputs(library, function, tmp_path, offset)
