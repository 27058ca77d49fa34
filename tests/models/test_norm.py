"""Norms are apex's where it can be used, torch's elsewhere, and which is said once."""

import logging
import sys
import types

import pytest
import torch
from torch import nn

from megatron_dept.models import norm
from megatron_dept.models.parts import BodyPart
from megatron_dept.tensor_parallel.group import TensorGroup
from megatron_dept.tensor_parallel.shards import shard_of


class Fused(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps


@pytest.fixture(autouse=True)
def forget():
    norm.apex_normalization.cache_clear()
    yield
    norm.apex_normalization.cache_clear()


def test_without_a_gpu_torchs_norms_are_used_in_silence(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert type(norm.layer_norm(4, 1e-5)) is nn.LayerNorm
        assert type(norm.rms_norm(4, 1e-6)) is nn.RMSNorm
    assert caplog.records == []


def test_apex_is_used_where_it_is_installed_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    apex = types.ModuleType("apex.normalization")
    apex.FusedLayerNorm, apex.FusedRMSNorm = Fused, type("FusedRMS", (Fused,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.normalization", apex)
    with caplog.at_level(logging.INFO):
        made = norm.layer_norm(4, 1e-5), norm.rms_norm(8, 1e-6)
    assert type(made[0]) is Fused and made[0].eps == 1e-5
    assert type(made[1]) is apex.FusedRMSNorm and made[1].size == 8
    assert len(caplog.records) == 1 and "apex" in caplog.text


def test_a_gpu_without_apex_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "apex", None)  # importing it raises ImportError
    with caplog.at_level(logging.INFO):
        assert type(norm.layer_norm(4, 1e-5)) is nn.LayerNorm
        assert type(norm.rms_norm(4, 1e-5)) is nn.RMSNorm
    assert len(caplog.records) == 1 and "not installed" in caplog.text


class SecondOfTwo:
    """A rank of a group whose sums are told here: the other rank's gradient is 10 everywhere."""

    rank, size = 1, 2

    def all_reduce_sum(self, value: torch.Tensor, kind: str) -> None:
        value += 10


def split(tensor: TensorGroup) -> BodyPart:
    return BodyPart(tensor, sequence_parallel=True)


@pytest.mark.parametrize(("make", "plain"), [(norm.layer_norm, nn.LayerNorm), (norm.rms_norm, nn.RMSNorm)])
def test_where_the_sequence_is_split_gradients_are_summed(make, plain):
    found, expected = make(4, 1e-5, split(SecondOfTwo())), plain(4, eps=1e-5)
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found(hidden), expected(hidden))
    found(hidden).square().sum().backward()
    expected(hidden).square().sum().backward()
    for (name, parameter), (_, wanted) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(parameter.grad, wanted.grad + 10), name
        assert [run.primary for run in shard_of(parameter).runs] == [False]


def test_apex_kernels_serve_a_split_sequence_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    apex = types.ModuleType("apex.normalization")
    kernels = {
        "fused_layer_norm_affine": lambda hidden, weight, bias, shape, eps: ("layer", weight, bias, shape, eps),
        "fused_rms_norm_affine": lambda hidden, weight, shape, eps: ("rms", weight, shape, eps),
    }
    apex.fused_layer_norm = types.SimpleNamespace(**kernels)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.normalization", apex)
    on_gpu = types.SimpleNamespace(is_cuda=True)
    layer, rms = (make(4, 1e-5, split(SecondOfTwo())) for make in (norm.layer_norm, norm.rms_norm))
    name, weight, bias, shape, eps = layer.forward(on_gpu)
    assert (name, tuple(weight.shape), tuple(bias.shape), tuple(shape), eps) == ("layer", (4,), (4,), (4,), 1e-5)
    name, weight, shape, eps = rms.forward(on_gpu)
    assert (name, tuple(weight.shape), tuple(shape), eps) == ("rms", (4,), (4,), 1e-5)
    with torch.no_grad():
        assert isinstance(layer(torch.zeros(1, 4)), torch.Tensor), "tensors of the CPU go to torch's own"
