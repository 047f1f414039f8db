"""Tiny data sets and models for the tests of the training."""

import numpy as np
import torch

from attnpool_kernels.zoo.molecules import Molecules, MoleculeSet, Split, Target

SCHNET = {"hidden_channels": 16, "num_filters": 16, "num_interactions": 1, "num_gaussians": 8}
ABP = {"hidden": 16, "heads": 2, "seeds": 2}


def molecules(count=40, targets=2, forces=False, elements=(1, 6, 8)):
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(2, 6, (count,), generator=g)
    ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    atoms = int(ptr[-1])
    z = torch.tensor(elements)[torch.randint(0, len(elements), (atoms,), generator=g)]
    pos = 1.5 * torch.randn(atoms, 3, generator=g, dtype=torch.float64)
    y = counts[:, None] + 0.1 * torch.randn(count, targets, generator=g, dtype=torch.float64)
    return Molecules(
        z,
        pos,
        ptr,
        y,
        torch.randn(atoms, 3, generator=g) if forces else None,
        torch.rand(atoms, generator=g),
    )


def molecule_set(count=40, train=28, val=6, targets=("energy", "homo"), **options):
    i = torch.arange(count)
    split = Split(i[:train], i[train : train + val], i[train + val :])
    found = molecules(count, len(targets), **options)
    return MoleculeSet("tiny", found, tuple(Target(t, "eV") for t in targets), {7: split})


def write_qm7b(path, count=40):
    """A file in the format of QM7b with random molecules of H, C and O."""
    found = molecules(count, 14)
    np.savez(
        path,
        z=found.z.numpy(),
        pos=1.9 * found.pos.numpy(),
        ptr=found.ptr.numpy(),
        y=found.y.numpy(),
    )
    return path


def write_md17(path, frames=40):
    """A trajectory of a chain of three atoms with harmonic bonds, in the format of MD17."""
    rng = np.random.default_rng(0)
    pos = np.array([[0.0, 0, 0], [1.2, 0, 0], [1.8, 1.0, 0]])
    pos = pos + 0.1 * rng.normal(size=(frames, 3, 3))
    energy, forces = np.zeros(frames), np.zeros_like(pos)
    for i, j in ((0, 1), (1, 2)):
        bond = pos[:, i] - pos[:, j]
        length = np.linalg.norm(bond, axis=1)
        energy += 300 * (length - 1.2) ** 2
        pull = (600 * (length - 1.2) / length)[:, None] * bond
        forces[:, i] -= pull
        forces[:, j] += pull
    np.savez(path, z=np.array([8, 6, 1]), R=pos, E=energy - 97000.0, F=forces)
    return path
