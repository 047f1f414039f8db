"""A molecule learned from energies and forces, then run in molecular dynamics with the model.

Run: python examples/md_forces.py
Needs torch_geometric and ase. The energies are those of ASE's effective medium theory, which is
quick; put any calculator of ASE in its place (tblite's GFN2-xTB for real chemistry).
"""

import numpy as np
import torch

try:
    import ase
    import torch_geometric  # noqa: F401, the backbone is its SchNet
    from ase import units
    from ase.build import molecule
    from ase.calculators.emt import EMT
    from ase.md.verlet import VelocityVerlet
except ImportError as error:
    raise SystemExit(
        f"needs torch_geometric and ase: pip install torch_geometric ase ({error})"
    ) from None

from attnpool_kernels.zoo.calculator import PooledCalculator
from attnpool_kernels.zoo.model import PooledModel
from attnpool_kernels.zoo.molecules import Molecules


def moving(atoms: ase.Atoms, temperature: float, seed: int) -> VelocityVerlet:
    normal = np.random.default_rng(seed).standard_normal((len(atoms), 3))
    atoms.set_momenta(normal * np.sqrt(units.kB * temperature * atoms.get_masses()[:, None]))
    return VelocityVerlet(atoms, 0.5 * units.fs)


def frames(start: ase.Atoms, count: int) -> Molecules:
    """Every fourth step of a trajectory, with energies in eV and forces in eV/Å."""
    atoms = start.copy()
    atoms.calc = EMT()
    dynamics = moving(atoms, 600, seed=0)
    kept, energies, forces = [], [], []
    for _ in range(count):
        dynamics.run(4)
        kept.append(atoms.copy())
        energies.append([atoms.get_potential_energy()])
        forces.append(atoms.get_forces())
    data = Molecules.from_ase(kept)
    data.y, data.forces = torch.tensor(energies), torch.tensor(np.concatenate(forces))
    return data.to(dtype=torch.float32)


def main(steps: int = 200, size: int = 8) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    start = molecule("CH3OH")
    data = frames(start, 60)
    model = PooledModel.from_config(
        {
            "backbone": "schnet",
            "backbone_options": {
                "hidden_channels": 32,
                "num_filters": 32,
                "num_interactions": 2,
                "num_gaussians": 20,
                "cutoff": 4.0,
            },
            "pooling": "abp",
            # relu, the default, has a force that jumps; dynamics need a smooth activation.
            "pooling_options": {"hidden": 32, "heads": 4, "seeds": 4, "activation": "silu"},
        }
    )
    model.set_statistics(data.y.mean(0), data.y.std(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        batch = data.select(torch.randint(len(data), (size,)))
        energy, forces = model.energy_and_forces(batch)  # differentiable again: training mode
        loss = 0.01 * (energy - batch.y[:, 0]).square().mean()
        loss = loss + 0.99 * (forces - batch.forces).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.4f}")

    atoms = start.copy()
    atoms.calc = PooledCalculator(model)
    dynamics = moving(atoms, 300, seed=1)
    totals = []
    for _ in dynamics.irun(40):
        totals.append(atoms.get_potential_energy() + atoms.get_kinetic_energy())
    print(
        f"20 fs with the model: total energy {totals[0]:.4f} eV, changes by at most "
        f"{max(abs(x - totals[0]) for x in totals):.1e} eV"
    )
    return losses


if __name__ == "__main__":
    main()
