"""Training on forces as one recorded graph; the example compiles one with inductor."""

import pytest
import torch

from attnpool_kernels import nn
from attnpool_kernels.deploy.compiled import CompiledGradients
from attnpool_kernels.impl import library

pytestmark = pytest.mark.skipif(library.load_cpu() != "", reason="the C++ library is not built")


class Energy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift = torch.nn.Linear(3, 8)
        self.pool = nn.AttentionPooling(8, 8, 1, heads=2, seeds=2, encoder_blocks=1)
        self.again = self.lift  # as PyG's SchNet holds its filters
        self.tied = torch.nn.Linear(3, 8)
        self.tied.weight = self.lift.weight
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.unused = torch.nn.Parameter(torch.ones(2))

    def forward(self, pos, ptr):
        return self.frozen * self.pool(torch.tanh(self.again(pos)) + self.tied(pos), ptr)[:, 0]


def loss(model, pos, ptr, wanted):
    pos = pos.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(pos, ptr).sum(), pos, create_graph=True)
    return (-gradient - wanted).square().mean()


def batch(*sizes):
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    return torch.randn(sum(sizes), 3).double(), ptr, torch.randn(sum(sizes), 3).double()


def as_recorded(graph):
    return graph


def eager(model, given):
    return torch.autograd.grad(
        loss(model, *given), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )


def test_the_gradients_are_eagers_for_other_sizes_and_weights():
    model = Energy().double()
    step = CompiledGradients(loss, model, *batch(3, 4), compiler=as_recorded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())  # nothing left behind
    for sizes in ((3, 4), (5, 2, 6), (4, 4, 4, 9)):
        given = batch(*sizes)
        value = step(*given)
        torch.testing.assert_close(value, loss(model, *given).detach(), rtol=1e-12, atol=1e-12)
        for parameter, right in zip(step.parameters, eager(model, given), strict=True):
            right = torch.zeros_like(parameter) if right is None else right
            torch.testing.assert_close(parameter.grad, right, rtol=1e-12, atol=1e-12)
        assert model.frozen.grad is None
        optimizer.step()  # the next batch sees other weights


def test_a_fault_in_a_weight_is_seen():
    """The graph reads the parameters, it does not keep them."""
    model, given = Energy().double(), batch(3, 4)
    step = CompiledGradients(loss, model, *given, compiler=as_recorded)
    before = float(step(*given))
    with torch.no_grad():
        model.lift.weight.mul_(2)
    assert float(step(*given)) != before
    torch.testing.assert_close(step(*given), loss(model, *given).detach())
