"""Where the native kernels are not built, or turned off: said once, and the references give the results."""

import pytest
import torch

from megatron_dept.ops import native, reference, rows


@pytest.fixture
def forgotten():
    """What was found out about the library, forgotten before and after."""
    caches = (native._available, native._missing)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_a_library_that_is_not_built_is_said_with_the_remedy(forgotten, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.abi3.so")
    monkeypatch.delenv(native.SWITCH, raising=False)
    table, ids = torch.randn(3, 2), torch.tensor([0, 2])
    with pytest.warns(RuntimeWarning, match=r"are not built .*none.abi3.so.*pip install") as said:
        found = [rows.trim_gather(table, ids, 0, torch.float16) for _ in range(2)]
    assert len(said) == 1
    assert said[0].filename == __file__
    for each in found:
        assert torch.equal(each, reference.trim_gather(table, ids, 0, torch.float16))


def test_the_environment_turns_them_off_and_that_is_said_once(forgotten, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    with pytest.warns(RuntimeWarning, match="MEGATRON_DEPT_NATIVE=0 turns the native kernels off") as said:
        for _ in range(3):
            assert not rows.trim_gather(torch.ones(2, 3), torch.tensor([5])).any()
    assert len(said) == 1


def test_a_device_that_none_are_built_for_is_named():
    with pytest.warns(RuntimeWarning, match="not built for xpu"):
        assert not native.native_kernels("xpu")
