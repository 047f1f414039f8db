"""Stand-ins for a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from attnpool_kernels import autograd, dispatch, impl, ops
from attnpool_kernels.impl import cpu

from . import clock, fake_cuda


@pytest.fixture
def device(monkeypatch):
    with fake_cuda.installed(monkeypatch) as found:
        yield found


@pytest.fixture
def as_cuda(device, monkeypatch):
    """The CPU kernels under the name "cuda"."""
    if cpu.load():
        pytest.skip(cpu.load())
    names = ("KIND", "NEEDS", "forward", "backward", "double_backward")
    module = SimpleNamespace(**{name: getattr(cpu, name) for name in names})
    module.why_not, module.load = lambda problem: [], lambda: ""
    module.__name__, module.OPERATORS = "cuda", "attnpool_as_cuda"
    if module.OPERATORS not in ops.PASSES:
        ops.define(module.OPERATORS, lambda: impl.load("cuda"))
        autograd.differentiable(module.OPERATORS)
    load = impl.load
    monkeypatch.setattr(impl, "load", lambda name: module if name == "cuda" else load(name))
    monkeypatch.setattr(dispatch, "_chosen", {})
    clock.copy_rate.cache_clear()
    monkeypatch.setattr(clock.card, "copy_rate", lambda *_: 3.0e12)
    yield device
    clock.copy_rate.cache_clear()
