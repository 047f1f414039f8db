"""Adapters under ``torch.compile``: they run outside of its graphs, guard included."""

import pytest
import torch
from tools import stand_ins
from torch._dynamo.utils import counters

from attnpool_kernels import Problem, Ragged, autograd, set_attention
from attnpool_kernels.impl import cpu

PTR = torch.tensor([0, 5, 5, 9])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    stand_ins.forget()


def compiled(backend, **options):
    def attend(q, k, v, ptr):
        return set_attention(q * 1.5, k, v, ptr, backend=backend).sin()

    return attend, torch.compile(attend, backend="aot_eager", **options)


@pytest.mark.parametrize(("backend", "tracked"), [("sdpa", True), ("flex", False)])
def test_one_break_of_the_graph(backend, tracked):
    attend, fast = compiled(backend)
    own = Ragged.from_ptr(PTR)
    for ptr in (PTR, own, own):
        inputs = [torch.randn(9, 2, 8, requires_grad=tracked) for _ in range(3)]
        found, exact = (f(*inputs, ptr) for f in (fast, attend))
        assert torch.allclose(found, exact, atol=1e-6)
        if tracked:
            for x, y in zip(*(torch.autograd.grad(o.sum(), inputs) for o in (found, exact))):
                assert torch.allclose(x, y, atol=1e-6)
    assert list(counters["graph_break"]) and len(counters["graph_break"]) == 1


def test_whole_graph_is_refused_with_the_reason():
    q = torch.randn(9, 2, 8)
    with pytest.raises(Exception, match="adapters read sizes on the host"):
        compiled("sdpa", fullgraph=True)[1](q, q, q, PTR)


@pytest.mark.parametrize("served", [True, False])
def test_second_derivative_is_never_silently_wrong(served, monkeypatch):
    """A library whose backward is opaque, called from a compiled function."""
    if cpu.load():
        pytest.skip(cpu.load())
    torch.use_deterministic_algorithms(False)
    backend = stand_ins.install(monkeypatch, "flash_attn 2")
    assert not stand_ins.flash_attn.why_not(Problem("cpu", torch.float16, 8, 8, grad_order=1))
    if not served:
        monkeypatch.setattr(autograd, "_native", lambda *_: None)
    attend = torch.compile(
        lambda q, k, v: set_attention(q, k, v, PTR, backend=backend), backend="aot_eager"
    )
    inputs = [torch.randn(9, 2, 8, dtype=torch.float16, requires_grad=True) for _ in range(3)]

    def penalty(call):
        (dq,) = torch.autograd.grad(call(*inputs).float().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(dq.float().square().sum(), inputs)

    if not served:
        with pytest.raises(NotImplementedError, match=r"flash_attn.*no second derivative"):
            penalty(attend)
        return
    exact = penalty(lambda *x: set_attention(*x, PTR, backend="reference"))
    for x, y in zip(penalty(attend), exact):
        assert y.any() and torch.allclose(x, y, atol=4e-3)
