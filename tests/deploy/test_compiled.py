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


class Shared(torch.nn.Module):
    """Gradients that are one tensor, expanded, an input, or laid out unlike the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        self.summed = torch.nn.Parameter(torch.ones(3))
        self.turned = torch.nn.Parameter(torch.ones(3, 2))

    def forward(self, x):
        mixed = (self.turned.t() * x[:2]).sum()
        return (x * (self.a + self.b)).sum(0).sum() + self.summed.sum() + mixed


def test_gradients_are_tensors_of_their_own():
    model, x = Shared(), torch.randn(4, 3)
    step = CompiledGradients(lambda m, x: m(x), model, torch.randn(4, 3), compiler=as_recorded)
    step(x)
    places = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)
    assert all(p.grad.stride() == p.stride() for p in model.parameters())
    found = [p.grad.clone() for p in model.parameters()]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=False)
    for parameter, gradient in zip(model.parameters(), found):
        factor = 0.1 / torch.cat([g.flatten() for g in found]).norm()
        torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-4, atol=1e-6)


def pooled_loss(model, x, ptr):
    return model(x, ptr).square().sum()


def test_rows_of_no_molecule_reach_no_weight():
    model = nn.AttentionPooling(8, 8, 1, heads=2, seeds=2, encoder_blocks=1).double()
    ptr, x = torch.tensor([0, 3, 7]), random_rows(7)
    step = CompiledGradients(pooled_loss, model, x, ptr, compiler=as_recorded)
    longer = random_rows(9)
    longer[7:] = torch.nan
    step(longer, ptr)
    found = [p.grad for p in step.parameters]
    right = torch.autograd.grad(pooled_loss(model, longer, ptr), step.parameters)
    for a, b in zip(found, right):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def random_rows(count):
    return torch.randn(count, 8, dtype=torch.float64)


def test_a_model_that_changed_is_refused():
    model, given = Energy().double(), batch(3, 4)
    step = CompiledGradients(loss, model, *given, compiler=as_recorded)
    handle = model.lift.weight.register_hook(lambda g: 0 * g)
    with pytest.raises(NotImplementedError, match="hook"):
        step(*given)
    handle.remove()
    step(*given)
    model.lift.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="record it again"):
        step(*given)
    model.lift.weight.requires_grad_()
    model.load_state_dict(Energy().double().state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="record it again"):
        step(*given)


def test_sizes_that_are_not_served_are_refused():
    model = Energy().double()
    with pytest.raises(ValueError, match="add an empty molecule"):
        CompiledGradients(loss, model, *batch(5), compiler=as_recorded)
    step = CompiledGradients(loss, model, *batch(5, 0), compiler=as_recorded)
    for sizes in ((4, 5), (7,), (0, 3, 0)):
        given = batch(*sizes)
        torch.testing.assert_close(step(*given), loss(model, *given).detach())
    pos, ptr, wanted = batch(4, 5)
    with pytest.raises(ValueError, match="dtypes"):
        step(pos.float(), ptr, wanted)
    step(pos, torch.stack([ptr, ptr], 1)[:, 0], wanted)  # strided boundaries


def test_recording_leaves_the_model_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model[0].kept = torch.ones(2)
    step = CompiledGradients(norm_loss, model, torch.randn(5, 3), compiler=as_recorded)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert type(model[0].kept) is torch.Tensor
    step(torch.randn(6, 3))
    assert int(model[1].num_batches_tracked) == 1


def norm_loss(model, x):
    model[0].kept = model[0](x)
    return model[1](model[0].kept).square().sum() * 0.1
