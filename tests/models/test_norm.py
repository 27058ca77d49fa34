"""Norms are apex's where it can be used, torch's elsewhere, and which is said once."""

import logging
import sys
import types

import pytest
import torch
from torch import nn

from megatron_dept.models import norm


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
