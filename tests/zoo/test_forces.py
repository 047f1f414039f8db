"""Training on energies and forces: gradients against plain autograd in float64."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("torch_geometric")

from tools.padded import set_transformer

from attnpool_kernels import Ragged
from attnpool_kernels.nn import AttentionPooling
from attnpool_kernels.zoo.model import PooledModel
from attnpool_kernels.zoo.molecules import Molecules

SIZES = (9, 1, 4, 12, 2)
SAME = 1e-10


class Composite(AttentionPooling):
    """The same parameters, molecule by molecule, in matmul and softmax of torch."""

    def forward(self, x, ptr):
        ends = ptr.ptr.tolist()
        return torch.stack([set_transformer(self, x[i:j]).mean(0) for i, j in pairwise(ends)])


def molecules():
    """Atoms at random places at least 0.9 Å apart, with random energies and forces."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lattice = 1.5 * torch.cartesian_prod(*[torch.arange(3.0, dtype=torch.float64)] * 3)
    pos = torch.cat([lattice[:n] for n in SIZES])
    z = torch.tensor([1, 6, 7, 8])[torch.randint(4, (len(pos),), generator=generator)]
    return Molecules(
        z,
        pos + 0.1 * normal(*pos.shape),
        Ragged.from_counts(SIZES).ptr.long(),
        normal(len(SIZES), 1),
        normal(*pos.shape),
    )


def model(activation, backend=None, pooling=None):
    options = {"hidden": 24, "heads": 3, "seeds": 3, "activation": activation, "backend": backend}
    backbone = {
        "hidden_channels": 16,
        "num_filters": 16,
        "num_interactions": 2,
        "num_gaussians": 10,
        "cutoff": 4.0,
    }
    torch.manual_seed(0)
    made = PooledModel.from_config(
        {
            "backbone": "schnet",
            "backbone_options": backbone,
            "pooling": "abp",
            "pooling_options": options,
        }
    )
    if pooling is not None:
        made.pooling = pooling(16, **options)
    return made


def energy_and_force_gradients(made, state=None):
    """Energies, forces, and gradients of 0.01·MSE(energy) + 0.99·MSE(forces) by parameter."""
    made = made.double().train()
    if state is not None:
        made.load_state_dict(state)
    data = molecules()
    energy, forces = made.energy_and_forces(data)
    loss = 0.01 * (energy - data.y[:, 0]).square().mean()
    loss = loss + 0.99 * (forces - data.forces).square().mean()
    names, parameters = zip(*made.named_parameters())
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    found = {"energy": energy, "forces": forces, **dict(zip(names, gradients))}
    return {name: x.detach() for name, x in found.items()}


def worst(found, truth):
    """Largest relative difference of a tensor, and of which one."""
    assert found.keys() == truth.keys()
    total = torch.cat([g.flatten() for name, g in truth.items() if "." in name]).norm()
    return max(
        # A gradient that is 0 but for rounding is measured by that of all parameters.
        (float((x - truth[name]).norm() / max(truth[name].norm(), 1e-3 * total)), name)
        for name, x in found.items()
    )


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("truth", ["reference", "autograd"])
def test_gradient_of_the_force_loss(activation, truth):
    ours = model(activation)
    if truth == "reference":
        other = model(activation, backend="reference")
    else:
        other = model(activation, pooling=Composite)
    state = ours.double().state_dict()
    found = energy_and_force_gradients(ours)
    wanted = energy_and_force_gradients(other, state)
    assert wanted["forces"].abs().max() > 1e-4
    difference, name = worst(found, wanted)
    assert difference <= SAME, f"{name}: {difference:.2g}"
    # Every parameter of the pooling learns from the forces.
    for name in found:
        if name.startswith("pooling.") and not name.endswith(("head.bias", "mab.lin.bias")):
            assert found[name].norm() > 1e-9, name


def test_gradient_of_the_force_loss_in_float32():
    truth = energy_and_force_gradients(model("silu"))
    made = model("silu")
    data = molecules()
    made.float().train()
    energy, forces = made.energy_and_forces(
        Molecules(data.z, data.pos.float(), data.ptr, data.y.float(), data.forces.float())
    )
    assert (energy - truth["energy"]).norm() < 1e-5 * truth["energy"].norm()
    assert (forces - truth["forces"]).norm() < 1e-4 * truth["forces"].norm()


def test_wrong_second_derivative_is_noticed(monkeypatch):
    """The comparison sees an error of 1e-8 in the second derivative of the kernels alone."""
    from attnpool_kernels import autograd
    from attnpool_kernels.impl import cpu

    if cpu.load():
        pytest.skip(cpu.load())
    passes = autograd.CALLS[cpu.OPERATORS]

    def wrong(*arguments):
        return tuple(g * (1 + 1e-8) for g in passes.double_backward(*arguments))

    truth = energy_and_force_gradients(model("silu", backend="reference"))
    changed = passes._replace(double_backward=wrong)
    monkeypatch.setitem(autograd.CALLS, cpu.OPERATORS, changed)
    difference, _ = worst(energy_and_force_gradients(model("silu")), truth)
    assert difference > SAME
