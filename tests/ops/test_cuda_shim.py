"""The CUDA source under the thread shim equals the reference bit for bit, in three orders of the threads."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dept.ops.wires import WIRES, wire_bytes
from tests.ops import cuda_shim, kernel_cases
from tests.ops.cuda_shim import Call
from tests.ops.kernel_cases import Case, equal_bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the thread shim with")

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIRE = {name: number for number, name in enumerate(WIRES)}


def trim_gather(a: dict[str, Any], offset: int) -> dict[str, Any]:
    n, h = a["table"].shape
    return a | {"n": n, "h": h, "k": len(a["ids"]), "dtype": DTYPE[a["dtype"]]}


def trim_scatter_mean(a: dict[str, Any], offset: int) -> dict[str, Any]:
    n, h = a["table"].shape
    return a | {"n": n, "h": h, "k": len(a["rows"]), "m": len(a["deltas"]), "dtype": DTYPE[a["deltas"].dtype]}


def remap_lookup(a: dict[str, Any], offset: int) -> dict[str, Any]:
    (b, s), (v, h) = a["ids"].shape, a["table"].shape
    out = kernel_cases.placed(torch.full((b, s, h), 7, dtype=a["dtype"]), offset)
    return a | {"b": b, "s": s, "v": v, "h": h, "out": out, "dtype": DTYPE[a["dtype"]]}


def remap_lookup_backward(a: dict[str, Any], offset: int) -> dict[str, Any]:
    """Grouped by row, as the binding does it before it calls the kernel."""
    b, s, h = a["grad"].shape
    local = a["local_of"][a["ids"]].reshape(-1).long() - a["start"]
    places = ((local >= 0) & (local < a["rows"])).nonzero().squeeze(1)
    local, order = local[places].sort(stable=True)
    held = local.unique_consecutive(return_counts=True)[1]

    def out(rows: int) -> Tensor:
        return kernel_cases.placed(torch.full((rows, h), 7.0), offset)

    return {
        **{"grad": a["grad"], "dtype": DTYPE[a["grad"].dtype], "b": b, "s": s, "h": h, "u": len(held)},
        **{"order": places[order], "starts": torch.cat([held.new_zeros(1), held.cumsum(0)])},
        **{"grad_rows": out(len(held)), "positions": a["positions"]},
        "grad_position": out(a["positions"]) if a["positions"] else None,
    }


def body(a: dict[str, Any], offset: int) -> dict[str, Any]:
    """The fields of all four body kernels: names are those of the face, sizes come of the tensors."""
    fields = a | {"wire": WIRE[a["wire"]], "n": a["value" if "value" in a else "out"].numel()}
    if "received" in a:
        fields |= {"silos": len(a["received"]), "bytes": a["received"].shape[1]}
    if "low" in a:
        fields["low_dtype"] = DTYPE[torch.bfloat16 if a["low"] is None else a["low"].dtype]
    return fields


FIELDS = {
    "trim_gather": trim_gather,
    "trim_scatter_mean": trim_scatter_mean,
    "remap_lookup": remap_lookup,
    "remap_lookup_backward": remap_lookup_backward,
    **dict.fromkeys(("body_pack", "body_mean", "body_unpack", "body_apply"), body),
}


def as_call(case: Case, offset: int = 0) -> Call:
    """The call of a case; what the face itself would allocate starts `offset` elements past an aligned address."""
    name = case.face.replace("lookup_backward", "backward")
    struct = "Mdept" + "".join(part.capitalize() for part in name.split("_"))
    fields = FIELDS[case.face](case.arguments, offset)
    return Call(f"mdept_{name}_cuda", struct, {key: fields[key] for key, _ in cuda_shim.layouts()[struct]})


def what_is_to_come(case: Case) -> dict[str, Tensor]:
    """Every tensor of the call that the reference knows, as it leaves it."""
    arguments, returned = case.expected()
    expected = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    if case.face == "remap_lookup":
        expected["out"] = returned
    if case.face == "remap_lookup_backward":
        expected |= {"grad_rows": returned[1]}
        expected |= {} if returned[2] is None else {"grad_position": returned[2]}
    return expected


@pytest.fixture(scope="session")
def library():
    return cuda_shim.build("kernels", cuda_shim.SOURCES)


@pytest.mark.parametrize("kernel", kernel_cases.KERNELS)
def test_equals_the_reference_in_every_order_of_the_threads(kernel, library, tmp_path):
    cases = list(kernel_cases.KERNELS[kernel]())
    calls = [as_call(case, number % 2) for number, case in enumerate(cases)]
    for case, orders in zip(cases, cuda_shim.run(library, calls, tmp_path), strict=True):
        expected = what_is_to_come(case)
        for order, found in zip(cuda_shim.ORDERS, orders, strict=True):
            for name, tensor in expected.items():
                if name in found:
                    assert equal_bits(found[name], tensor), f"{case.name}: {name} in order {order}"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_arrives_as_nan(bad, library, tmp_path):
    value = torch.randn(600, generator=torch.Generator().manual_seed(0))
    value[300] = bad
    out = torch.empty(wire_bytes(600, "int8"), dtype=torch.uint8)
    arguments = {"value": value, "local": None, "carried": None, "residual": None, "wire": "int8", "out": out}
    case = Case("not finite", "body_pack", arguments)
    expected = what_is_to_come(case)["out"]
    for found in cuda_shim.run(library, [as_call(case)], tmp_path)[0]:
        assert torch.equal(found["out"][:600], expected[:600])
        assert equal_bits(found["out"][600:].view(torch.float32), expected[600:].view(torch.float32))
