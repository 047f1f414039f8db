"""SchNet by pairs: the numbers of its library's layers, edge by edge, and their derivatives."""

import math

import pytest
import torch
from ase.build import bulk, molecule
from tools import tiny

from attnpool_kernels.zoo.backbones import BACKBONES
from attnpool_kernels.zoo.basis import GaussianSmearing
from attnpool_kernels.zoo.model import PooledModel
from attnpool_kernels.zoo.molecules import Molecules
from attnpool_kernels.zoo.pairs import Activation, PairProduct, PairSum, RowDot, halved
from attnpool_kernels.zoo.periodic import energy_forces_stress

from .test_backbones import SMALL, atoms, small

SCHNETS = ("schnet", "schnetpack_schnet")


def made(name, **options):
    small(name)  # skips without its library
    config = {"backbone": name, "backbone_options": SMALL[name] | options, "pooling": "abp"}
    torch.manual_seed(0)
    abp = {**tiny.ABP, "activation": "silu"}
    return PooledModel.from_config({**config, "pooling_options": abp}).double().train()


def molecules(counts=(5, 1, 9, 2)):
    torch.manual_seed(1)
    z, pos, ragged = atoms(counts)
    return Molecules(z, pos, ragged.ptr.long())


def by_edges(monkeypatch, name):
    """As it was: one row an edge, forces by differentiating the networks."""
    monkeypatch.setattr(BACKBONES[name], "radial", lambda self: None)


def learned(model, given):
    """Energies, forces, and the gradients of a loss of both."""
    energy, forces = model.energy_and_forces(given)
    loss = 0.1 * energy.square().mean() + (forces - 0.3).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return [energy.detach(), forces.detach(), *gradients]


def assert_same(found, wanted, rtol):
    total = torch.cat([x.flatten() for x in wanted[2:]]).norm()
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= rtol * max(float(b.norm()), 1e-3 * float(total))


@pytest.mark.parametrize("name", SCHNETS)
def test_learning_forces_is_that_by_edges(monkeypatch, name):
    model, given = made(name), molecules()
    found = learned(model, given)
    states = list(model.state_dict())
    single = learned(model.float(), given)
    alone = model.double()(given).detach()
    frozen = model.eval().requires_grad_(False).energy_and_forces(given)
    by_edges(monkeypatch, name)
    model = made(name)
    wanted = learned(model, given)
    assert list(model.state_dict()) == states
    assert wanted[1].abs().max() > 1e-3
    assert_same(found, wanted, 1e-12)
    assert single[1].dtype == torch.float64  # of the positions
    assert_same(single, wanted, 2e-5)
    torch.testing.assert_close(alone, model(given).detach(), rtol=1e-12, atol=1e-12)
    for a, b in zip(frozen, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # weights rounded to float32


def test_forces_are_the_gradient_of_the_energy():
    """And the energy's own graph has them too, with a Hessian."""
    model, given = made("schnet").requires_grad_(False), molecules((4, 3))
    _, forces = model.energy_and_forces(given, create_graph=False)
    assert not forces.requires_grad

    def energy(pos):
        return model(Molecules(given.z, pos, given.ptr)).sum()

    (gradient,) = torch.autograd.grad(energy(pos := given.pos.clone().requires_grad_()), pos)
    torch.testing.assert_close(forces, -gradient, rtol=1e-11, atol=1e-12)
    hessian = torch.autograd.functional.hessian(energy, given.pos).view(21, 21)
    step = torch.zeros_like(given.pos)
    step[2, 1] = 1e-5
    ends = []
    for sign in (1, -1):
        moved = Molecules(given.z, given.pos + sign * step, given.ptr)
        ends.append(model.energy_and_forces(moved, create_graph=False)[1])
    column = (ends[1] - ends[0]).flatten() / 2e-5
    torch.testing.assert_close(hessian[7], column, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SCHNETS)
@pytest.mark.parametrize("counts", [(1,), (1, 1), (1, 0, 2)])
def test_few_pairs_or_none(monkeypatch, name, counts):
    model, given = made(name), molecules(counts)
    found = learned(model, given)
    assert found[1].shape == given.pos.shape and bool(found[1].any()) == (2 in counts)
    by_edges(monkeypatch, name)
    for a, b in zip(found, learned(made(name), given)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_periodic_structures(monkeypatch):
    """A cell smaller than the cutoff: pairs with images, and of atoms with their own."""
    pytest.importorskip("vesin")
    model = made("schnet")
    alloy = bulk("Cu", cubic=True)
    alloy.rattle(0.1, seed=3)
    given = Molecules.from_ase([alloy, bulk("Al"), molecule("H2O")], periodic=True)
    found = [*learned(model, given), energy_forces_stress(model, given)[2].detach()]
    by_edges(monkeypatch, "schnet")
    wanted = [*learned(model, given), energy_forces_stress(model, given)[2].detach()]
    assert_same(found, wanted, 1e-12)


def test_each_pair_once():
    vectors = torch.tensor([[0.0, 0, -2], [0, 0, 2], [-1, 5, 0], [1, -5, 0], [0, 0, 1], [0, 0, -1]])
    index = torch.tensor([[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]])
    pairs = halved(index, vectors)
    assert pairs.first.tolist() == [0, 0, 0] and pairs.second.tolist() == [0, 0, 1]
    assert pairs.vectors.tolist() == [[0, 0, 2], [1, -5, 0], [0, 0, -1]]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("block", [1 << 16, 8])
def test_derivatives_of_the_operators(monkeypatch, block):
    """To second order, by finite differences, in one block and in many."""
    monkeypatch.setattr("attnpool_kernels.zoo.pairs._CACHED", block)
    torch.manual_seed(0)
    first, second = torch.tensor([0, 0, 1, 3, 2]), torch.tensor([1, 2, 2, 3, 0])
    cases = [
        (lambda y, w: PairSum.apply(y, w, first, second), (double(4, 3), double(5, 3))),
        (lambda g, y: PairProduct.apply(g, y, first, second), (double(4, 3), double(4, 3))),
        (RowDot.apply, (double(5, 3), double(5, 3))),
    ]
    cut, slope = double(5, 1).detach(), double(5, 1).detach()
    cases.append((lambda u, b: Activation.apply(u, b, 0.7, cut, slope), (double(10, 3), double(3))))
    for function, inputs in cases:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_activation_and_gaussians_have_their_derivatives_below():
    distance = torch.linspace(0.4, 4.9, 40, dtype=torch.float64, requires_grad=True)
    basis = GaussianSmearing(8, 5.0).double()
    both = basis.with_slopes(distance.detach())
    values, slopes = both.split(40)
    expanded = basis(distance)
    torch.testing.assert_close(values, expanded.detach(), rtol=1e-14, atol=0)
    for k in range(8):
        (wanted,) = torch.autograd.grad(expanded[:, k].sum(), distance, retain_graph=True)
        torch.testing.assert_close(slopes[:, k], wanted, rtol=1e-12, atol=1e-20)
    bias = torch.randn(8, dtype=torch.float64)
    cut = torch.ones(40, 1, dtype=torch.float64)
    y, dy = Activation.apply(both, bias, math.log(2), cut, torch.zeros_like(cut))
    direct = torch.nn.functional.softplus(expanded + bias) - math.log(2)
    torch.testing.assert_close(y, direct.detach(), rtol=1e-12, atol=1e-14)
    (wanted,) = torch.autograd.grad(direct.sum(), distance)
    torch.testing.assert_close(dy.sum(1), wanted, rtol=1e-11, atol=1e-12)


def hooks():
    def of(path):
        def change(model):
            return model.get_submodule(path).register_forward_hook(lambda *x: 1.5 * x[-1])

        return change

    inside = ("conv", "mlp", "mlp.0", "mlp.1", "mlp.2", "lin", "conv.lin1", "conv.lin2", "act")
    paths = ["", "backbone", "backbone.distance_expansion", "backbone.interactions.1"]
    return [of(path) for path in [*paths, *(f"backbone.interactions.1.{x}" for x in inside)]]


@pytest.mark.parametrize("change", hooks())
def test_hooks_are_not_passed_by(monkeypatch, change):
    given, found = molecules((4, 3)), []
    for edges in (False, True):
        if edges:
            by_edges(monkeypatch, "schnet")
        model = made("schnet")
        before = model(given).detach()
        change(model)
        found.append([model(given).detach(), *(x.detach() for x in model.energy_and_forces(given))])
        assert (found[-1][0] - before).abs().max() > 1e-6
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_other_layers_and_other_atoms_are_called():
    model, given = made("schnet"), molecules((4, 3))
    wanted = model(given).detach()

    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp = model.backbone.interactions[0].mlp
    other = Twice(mlp[2].in_features, mlp[2].out_features).double()
    other.load_state_dict(mlp[2].state_dict())
    mlp[2] = other
    assert (model(given) - wanted).abs().max() > 1e-6
    energy, _ = model.energy_and_forces(given)
    torch.testing.assert_close(energy[:, None], model(given), rtol=1e-12, atol=1e-12)

    class Zeros(BACKBONES["schnet"]):
        def atoms(self, z, index, vectors):
            return 0 * super().atoms(z, index, vectors)

    model.backbone = Zeros(**SMALL["schnet"]).double()
    assert model.energy_and_forces(given)[1].abs().max() == 0

    class Moved(BACKBONES["schnet"]):
        def forward(self, z, pos, ragged, cells=None):
            return super().forward(z, 2 * pos, ragged, cells)

    model.backbone = Moved(**SMALL["schnet"]).double()
    energy, _ = model.energy_and_forces(given)
    torch.testing.assert_close(energy[:, None], model(given), rtol=1e-12, atol=1e-12)


def test_transforms_see_the_layers():
    model, given = made("schnet").eval().requires_grad_(False), molecules((4, 3))

    def energy(pos):  # by the rows alone: the kernels of the pooling refuse the transform
        return model.backbone(given.z, pos, given.ragged).square().sum()

    found = torch.func.grad(energy)(given.pos)
    (wanted,) = torch.autograd.grad(energy(pos := given.pos.clone().requires_grad_()), pos)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_autocast_is_left_to_the_layers(monkeypatch):
    model, given = made("schnet").float(), molecules((4, 3))
    found = []
    for edges in (False, True):
        if edges:
            by_edges(monkeypatch, "schnet")
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model.energy_and_forces(given))
    for a, b in zip(*found):
        assert torch.equal(a, b)
