"""Backbone, pooling and head together: symmetries, forces, second derivatives, configurations."""

import copy
import dataclasses

import pytest
import torch

from attnpool_kernels import Ragged
from attnpool_kernels.nn import SumPooling
from attnpool_kernels.zoo.backbones import BACKBONES
from attnpool_kernels.zoo.graph import edges
from attnpool_kernels.zoo.model import POOLINGS, PooledModel, build
from attnpool_kernels.zoo.molecules import Molecules

from .test_backbones import SMALL, atoms, small

ABP = {"hidden": 16, "heads": 4, "seeds": 3}
OPTIONS = {"abp": ABP, "seed": {"heads": 2, "seeds": 2, "reduce": "concat"}}
OPTIONS |= {"weighted": {"hidden": [8]}, "orbital_weighted": {"hidden": (8, 4)}}
AVERAGES = ("weighted", "orbital_weighted")


def model(backbone="schnet", pooling="abp", head="molecule", **options):
    options.setdefault("pooling_options", ABP if pooling == "abp" else OPTIONS.get(pooling))
    return PooledModel(small(backbone), pooling, head=head, **options).double()


def molecules(*counts, spread=1.5):
    z, pos, ragged = atoms(list(counts), spread)
    return Molecules(z, pos, ragged.ptr)


def changed(given, **values):
    return dataclasses.replace(given, **values)


def close(a, b, tolerance=1e-12):
    """Within the tolerance relative to the largest element."""
    assert a.shape == b.shape and bool(b.isfinite().all())
    assert float((a - b).detach().abs().max()) <= tolerance * max(
        1.0, float(b.detach().abs().max())
    )


def turned(given):
    """The molecules in another place and orientation, and the rotation."""
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    rotation[0] *= torch.linalg.det(rotation)
    shift = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
    return changed(given, pos=given.pos @ rotation + shift), rotation


def rounding(net, given):
    """What the rounding of float64 may do to energies and forces, in any order of the sums.

    Measured, because it depends on how well the network is conditioned: the largest error that
    float32 makes in four orientations, places and orders, times the ratio of the two roundings,
    2⁻²⁹, and 32 for what four have not shown. The weights are float32 numbers in both.
    """
    narrow, found = copy.deepcopy(net).float(), [0.0, 0.0]
    for _ in range(4):
        moved = turned(given)[0]
        pairs = zip(
            narrow.energy_and_forces(moved.to(dtype=torch.float32)), net.energy_and_forces(moved)
        )
        found = [max(e, float((a - b).detach().abs().max())) for e, (a, b) in zip(found, pairs)]
    return [32 * 2.0**-29 * error for error in found]


@pytest.mark.parametrize("pooling", ["sum", "abp"])
@pytest.mark.parametrize("name", BACKBONES)
def test_symmetries(name, pooling):
    """40 atoms within the cutoff: with 32 neighbours at most the order of the atoms would count."""
    if name == "esa" and pooling == "sum":
        with pytest.raises(ValueError, match="rows of edges"):
            model(name, pooling, "atom")
        return
    net = model(name, pooling, "atom" if pooling == "sum" else "molecule").eval()
    given = molecules(40, 6)
    neighbours = edges(given.pos, given.ptr, net.backbone.cutoff)[1].bincount()
    assert int(neighbours.max()) > 32
    energy, forces = net.energy_and_forces(given)
    assert float(forces.abs().max()) > 1e-4 and float((energy[0] - energy[1]).abs()) > 1e-4
    allowed = rounding(net, given)
    # far below what a wrong symmetry would change
    assert allowed[0] < 1e-9 * max(1.0, float(energy.abs().max()))
    assert allowed[1] < 1e-8 * max(1.0, float(forces.abs().max()))

    def same(found, energy, forces):
        for x, wanted, most in zip(found, (energy, forces), allowed):
            assert x.shape == wanted.shape and bool(wanted.isfinite().all())
            assert float((x - wanted).detach().abs().max()) <= most

    moved, rotation = turned(given)
    same(net.energy_and_forces(moved), energy, forces @ rotation)
    order = torch.cat([torch.randperm(40), 40 + torch.randperm(6)])
    found = net.energy_and_forces(changed(given, z=given.z[order], pos=given.pos[order]))
    same(found, energy, forces[order])
    swapped = net.energy_and_forces(given.select([1, 0]))
    same(swapped, energy.flip(0), torch.cat([forces[40:], forces[:40]]))
    same(net.energy_and_forces(given.select([1])), energy[1:], forces[40:])


@pytest.mark.parametrize("name", BACKBONES)
def test_forces_and_the_gradient_of_their_loss(name):
    net, given = model(name), molecules(5, 1, 8)
    smooth = model(name, pooling_options=ABP | {"activation": "silu"})  # a ReLU's kink is no slope
    energy, forces = smooth.energy_and_forces(given)
    assert not given.pos.requires_grad and energy.requires_grad and not forces[5].any()
    direction, step = torch.randn_like(given.pos), 1e-4
    slopes = []
    for h in (step, 2 * step):
        up, down = (smooth(changed(given, pos=given.pos + s * direction)) for s in (h, -h))
        slopes.append(float((up - down).detach().sum()) / (2 * h))
    wanted = -float((forces * direction).detach().sum())
    # A central difference errs by c·h², so two of them differ by 3·c·h²; and by rounding.
    between, scale = abs(slopes[1] - slopes[0]), max(1.0, abs(wanted), float(energy.abs().max()))
    assert abs(slopes[0] - wanted) <= between + 1e-9 * scale
    assert between <= 1e-3 * scale
    energy, forces = net.energy_and_forces(given)
    for loss in (energy, forces):  # DistributedDataParallel waits for parameters without gradient
        torch.autograd.grad(loss.square().sum(), [*net.backbone.parameters()], retain_graph=True)

    other = model(name, pooling_options=ABP | {"backend": "reference"})
    other.load_state_dict(net.state_dict())
    gradients = []
    for made in (net, other):
        energy, forces = made.energy_and_forces(given)
        loss = energy.square().mean() + 10 * (forces - 0.1).square().mean()
        names, parameters = zip(*made.named_parameters())
        gradients.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
    for parameter, found, wanted in zip(names, *gradients):
        scale = float(wanted.abs().max())
        if not parameter.endswith("in_proj_bias"):  # holds the keys' bias, whose gradient is 0
            assert scale > 0 or not found.any(), parameter
        assert float((found - wanted).abs().max()) <= 1e-10 * scale, parameter
    assert sum(bool(x.any()) for x in gradients[0]) > 0.8 * len(names)


@pytest.mark.parametrize("head", ["molecule", "atom"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling(pooling, head):
    if head == "atom" and pooling in AVERAGES:
        with pytest.raises(ValueError, match="head must be 'molecule'"):
            model(pooling=pooling, head=head)
        return
    options = {"heads": 1, "hidden": 8} if head == "atom" and pooling == "abp" else {}
    options = {} if head == "atom" and pooling == "seed" else OPTIONS.get(pooling, {}) | options
    if head == "atom" and pooling == "set_transformer":
        options["pre_linear"] = False  # a ReLU on rows of width 2 may be off for all atoms
    net = model(pooling=pooling, head=head, pooling_options=options, targets=2)
    given = molecules(4, 1, 7)
    net.set_statistics(torch.tensor([3.0, -5.0]), torch.tensor([0.5, 2.0]), atoms=4)
    y = net(given)
    assert y.shape == (3, 2) and bool(y.isfinite().all())
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    assert sum(bool(p.grad.any()) for p in net.backbone.parameters()) > 10
    close(net(given.select([2])), y[2:])


def test_extensive():
    """Two molecules far apart in one are worth their sum, with statistics and references."""
    net = model(pooling="sum", head="atom").eval()
    net.set_statistics(torch.tensor([-70.0]), torch.tensor([3.0]), atoms=14.0)
    net.set_atomref(torch.randn(100, 1))
    given = molecules(6, 9)
    moved = given.pos + 1e3 * (torch.arange(15) < 6)[:, None]
    one = Molecules(given.z, moved, torch.tensor([0, 15]))
    assert net.extensive and float(net.mean) == -5.0
    close(net(one), net(given).sum(0, keepdim=True))
    close(net.energy_and_forces(one)[1], net.energy_and_forces(given)[1], 1e-9)
    other = model(pooling="sum", head="molecule")  # a sum of vectors in front of a head is not
    assert not other.extensive and (other(one) - other(given).sum(0)).abs() > 1e-3
    with pytest.raises(ValueError, match="atoms"):
        net.set_statistics(torch.tensor([-70.0]), torch.tensor([3.0]))


@pytest.mark.parametrize("head", ["molecule", "atom"])
def test_statistics_and_references(head):
    net, given = model(pooling="sum", head=head), molecules(5, 5)
    before = net(given)
    net.set_statistics(torch.tensor([2.0]), torch.tensor([3.0]), atoms=5.0)
    close(net(given), 3 * before + 2)
    references = torch.arange(100.0)[:, None]
    net.set_atomref(references)
    close(net(given), 3 * before + 2 + given.z.view(2, 5).sum(1, keepdim=True))
    made = PooledModel(net.backbone, "mean", mean=torch.tensor([1.0]), std=torch.tensor([2.0]))
    assert float(made.mean) == 1 and float(made.std) == 2


def test_inference_mode_and_no_grad():
    net, given = model(), molecules(4, 3)
    wanted = net.energy_and_forces(given)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            copied = Molecules(given.z.clone(), given.pos.clone(), given.ptr.clone())
            energy, forces = net.eval().energy_and_forces(copied)
        close(forces, wanted[1].detach())
        assert not energy.requires_grad and not forces.requires_grad
    with pytest.raises(ValueError, match="targets"):
        model(targets=2).energy_and_forces(given)


def test_orbital_weighted_average():
    net, given = model(pooling="orbital_weighted"), molecules(4, 2)
    net.set_statistics(torch.tensor([-6.0]), torch.tensor([0.5]))
    y, weights = net.with_weights(given)
    close(y, net(given))
    close(torch.stack([weights[:4].sum(), weights[4:].sum()]), torch.ones(2, dtype=torch.float64))
    target = torch.tensor([[-5.0], [-7.0]], dtype=torch.float64)
    known = changed(given, y=target, coefficients=torch.full((6,), 0.25, dtype=torch.float64))
    wanted = 0.1 * ((y - target) / 0.5).square().mean() + (weights - 0.25).square().mean()
    close(net.orbital_loss(known), wanted)
    for without in (changed(known, y=None), changed(known, coefficients=None)):
        with pytest.raises(ValueError, match="coefficients"):
            net.orbital_loss(without)
    with pytest.raises(ValueError, match="pooling"):
        model(pooling="sum").with_weights(given)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_config_and_checkpoint(tmp_path, pooling):
    net = model(pooling=pooling).float()
    net.set_statistics(torch.tensor([3.0]), torch.tensor([0.5]))
    torch.save({"config": net.config, "state": net.state_dict()}, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=True)
    again = build(read["config"])
    again.load_state_dict(read["state"])
    given = molecules(4, 3).to(dtype=torch.float32)
    assert torch.equal(again(given), net(given)) and again.config == net.config
    assert torch.equal(copy.deepcopy(net)(given), net(given))


def test_state_dict_of_another_model():
    state = model().state_dict()
    other = model(pooling_options=ABP | {"seeds": 7})
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"pooling_options\.seeds is 3 there and 7 here$"):
        other.load_state_dict(state)
    assert all(torch.equal(x, before[k]) for k, x in other.state_dict().items() if "extra" not in k)
    other = PooledModel(small("schnet", cutoff=4.0), "abp", pooling_options=ABP)
    with pytest.raises(ValueError, match=r"backbone_options\.cutoff is 5\.0 there and 4\.0 here$"):
        other.load_state_dict(state)  # no tensor tells the two apart
    model(pooling_options=ABP | {"backend": "reference"}).load_state_dict(state)  # the same model


def test_module_as_pooling():
    net, named = model(pooling=SumPooling()), model(pooling="sum")
    net.load_state_dict({**named.state_dict(), "_extra_state": net.get_extra_state()})
    given = molecules(4, 3)
    close(net(given), named(given))
    with pytest.raises(ValueError, match="pooling must be made by name"):
        _ = net.config


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"pooling": "median"}, "pooling must be one of sum, .*'median'"),
        ({"pooling_options": {"head": 2}}, "pooling 'abp': .*'head'"),
        ({"pooling_options": {"heads": 3}}, "pooling 'abp': heads"),
        ({"pooling": "sum", "pooling_options": {"seeds": 2}}, "pooling 'sum': .*'seeds'"),
        ({"pooling": "weighted", "pooling_options": {"mean": 2}}, "pooling_options.*mean"),
        (
            {"pooling": "set_transformer", "pooling_options": {"reduce": "none"}},
            "pooling must give",
        ),
        ({"pooling": "seed", "head": "atom", "pooling_options": {"out_features": 2}}, "width"),
        ({"pooling": SumPooling(), "pooling_options": {"seeds": 2}}, "pooling_options"),
        ({"backbone": "egnn"}, "backbone must be one of"),
        ({"backbone_options": {"width": 2}}, "'width'"),
        ({"head": "both"}, "head must be one of molecule, atom"),
        ({"targets": 0}, "targets must be at least 1"),
        ({"target": 2}, "keys of a config are .*'target'"),
    ],
)
def test_bad_config(config, match):
    pytest.importorskip("torch_geometric")
    known = {"backbone": "schnet", "backbone_options": SMALL["schnet"], "pooling": "abp"}
    with pytest.raises(ValueError, match=match):
        PooledModel.from_config(known | config)
    for missing in ("backbone", "pooling"):
        with pytest.raises(ValueError, match=f"config must name a {missing}"):
            PooledModel.from_config({k: x for k, x in known.items() if k != missing})


def test_bad_statistics():
    net = model(pooling="sum", targets=2)
    two = torch.ones(2)
    for mean, std, match in (
        (torch.ones(1), two, "mean must have shape"),
        (two, torch.ones(1), "std must have shape"),
        (two, torch.tensor([1.0, 0.0]), "std must be positive"),
        (two * torch.nan, two, "mean must be finite"),
    ):
        with pytest.raises(ValueError, match=match):
            net.set_statistics(mean, std)
    with pytest.raises(ValueError, match="atomref must have shape"):
        net.set_atomref(torch.zeros(100, 1))


def test_boundaries_in_int32_and_no_molecules():
    net, given = model(), molecules(4, 3)
    close(net(changed(given, ptr=given.ptr.int())), net(given))
    nothing = Molecules(given.z[:0], given.pos[:0], Ragged.from_counts([]).ptr)
    assert net(nothing).shape == (0, 1)
