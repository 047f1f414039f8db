"""Periodic structures: neighbours, stress, supercells, and relaxation of a cell in ASE."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, make_supercell, molecule
from tools import tiny

from attnpool_kernels.ragged import Ragged
from attnpool_kernels.zoo import libraries
from attnpool_kernels.zoo.graph import triplets
from attnpool_kernels.zoo.model import PooledModel
from attnpool_kernels.zoo.molecules import Molecules
from attnpool_kernels.zoo.periodic import (
    Cells,
    edges_in_cells,
    energy_forces_stress,
    vectors_in_cells,
)

pytest.importorskip("vesin")
BACKBONES = {
    "schnet": {**tiny.SCHNET, "cutoff": 4.0},
    "painn": {"n_atom_basis": 16, "n_interactions": 2, "n_rbf": 8, "cutoff": 4.0},
    "dimenet++": {"hidden_channels": 16, "num_blocks": 1, "out_emb_channels": 16, "latent": 16}
    | {"cutoff": 3.5},
    "dimenet": {"hidden_channels": 16, "num_blocks": 1, "latent": 16, "cutoff": 3.5},
}
ABP = {**tiny.ABP, "activation": "silu"}


def model(backbone, pooling="abp", head="molecule"):
    torch.manual_seed(0)
    config = {"backbone": backbone, "backbone_options": BACKBONES[backbone], "head": head}
    options = ABP if pooling == "abp" else {}
    found = PooledModel.from_config(config | {"pooling": pooling, "pooling_options": options})
    return found.double().eval()


def crystal(seed=0):
    """Three atoms in a skew cell, smaller than the cutoff: they are neighbours of their images."""
    rng = np.random.default_rng(seed)
    cell = np.array([[3.1, 0.2, 0.0], [0.4, 3.3, 0.1], [-0.2, 0.3, 3.6]])
    return Atoms("COH", rng.random((3, 3)) @ cell, cell=cell, pbc=True)


def given(*atoms):
    return Molecules.from_ase(atoms, periodic=True)


@pytest.mark.parametrize("pbc", [True, [True, False, True], [False, False, True]])
def test_neighbours_are_all_of_those_within_the_cutoff(pbc):
    """By brute force over images, of positions outside of the cell, beside a molecule."""
    atoms, cutoff = crystal(), 4.0
    atoms.positions[1] += 2 * atoms.cell[0] - atoms.cell[2]
    atoms.pbc = pbc
    held = given(molecule("H2O"), atoms)
    cells = Cells(held.cell, held.pbc)
    index, shift = edges_in_cells(held.pos, held.ragged, cutoff, cells)
    vectors = vectors_in_cells(held.pos, held.ragged, index, shift, cells)
    assert bool((index[1].diff() >= 0).all()) and float(vectors.norm(dim=1).max()) <= cutoff
    wanted = []
    steps = [range(-6, 7) if along else (0,) for along in atoms.pbc]
    for shifts in np.stack(np.meshgrid(*steps), -1).reshape(-1, 3):
        offset = atoms.positions[None] + shifts @ atoms.cell.array - atoms.positions[:, None]
        for i, j in zip(*np.nonzero(np.linalg.norm(offset, axis=2) < cutoff)):
            if i != j or shifts.any():
                wanted.append((i, j, *np.round(offset[i, j], 6)))
    inside = index[1] >= 3
    rows = zip((index[1] - 3)[inside].tolist(), (index[0] - 3)[inside].tolist(), vectors[inside])
    assert sorted((i, j, *np.round(v.numpy(), 6) + 0.0) for i, j, v in rows) == sorted(
        (i, j, *(np.array(v) + 0.0)) for i, j, *v in wanted
    )
    assert (~inside).sum() == 6  # the molecule, as without a cell


def test_an_image_is_another_atom_of_a_path():
    held = given(Atoms("C", [[0, 0, 0]], cell=[2.0, 20, 20], pbc=True))
    cells = Cells(held.cell, held.pbc)
    index, shift = edges_in_cells(held.pos, held.ragged, 2.5, cells)
    vectors = vectors_in_cells(held.pos, held.ragged, index, shift, cells)
    assert index.shape[1] == 2  # to the left and to the right
    *_, kj, ji = triplets(index, 1, vectors)
    assert torch.equal(vectors[kj], vectors[ji]) and len(kj) == 2  # on, not back


@pytest.mark.parametrize("backbone", BACKBONES)
def test_extensive_models_are_extensive_in_cells(backbone):
    made = model(backbone, "sum", "atom")
    made.set_statistics(torch.tensor([-5.0]), torch.tensor([2.0]), atoms=2.0)
    atoms = crystal()
    large = make_supercell(atoms, [[2, 0, 0], [0, 1, 1], [0, 0, 2]])
    one, four = made(given(atoms, large))[:, 0].tolist()
    assert len(large) == 12 and four == pytest.approx(4 * one, rel=1e-10)


@pytest.mark.parametrize("pooling", ["abp", "mean"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_wrapped_is_the_same_as_not_wrapped(backbone, pooling):
    atoms = crystal()
    moved = atoms.copy()
    moved.positions += 1.234 + np.array([[3, 0, -1], [0, 2, 0], [-4, 1, 1]]) @ atoms.cell.array
    wrapped = moved.copy()
    wrapped.wrap()
    found = energy_forces_stress(model(backbone, pooling), given(atoms, moved, wrapped))
    for values in (found[0], found[1].view(3, -1), found[2].view(3, -1)):
        for other in values[1:]:
            torch.testing.assert_close(other, values[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("pooling", ["abp", "sum"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_stress_and_forces_are_derivatives(backbone, pooling):
    made, atoms, step = model(backbone, pooling), crystal(), 1e-5
    energy, forces, stress = energy_forces_stress(made, given(atoms))
    assert torch.equal(energy, made(given(atoms))[:, 0].detach()) and not stress.requires_grad
    torch.testing.assert_close(stress, stress.mT)

    def at(change):
        return made(given(change))[0, 0].item()

    def strained(strain):
        other = atoms.copy()
        other.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        return at(other)

    for i, j in ((0, 0), (1, 2), (0, 2), (2, 2)):
        strain = np.zeros((3, 3))
        strain[i, j] += step / 2
        strain[j, i] += step / 2
        slope = (strained(strain) - strained(-strain)) / (2 * step) / atoms.get_volume()
        assert float(stress[0, i, j]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    for sign in (1, -1):
        other = atoms.copy()
        other.positions[1, 2] += sign * step
        forces[1, 2] += sign * at(other) / (2 * step)
    assert float(forces[1, 2].detach()) == pytest.approx(0, abs=1e-6)


def test_stress_can_be_trained_on():
    made = model("painn").train()
    _, forces, stress = energy_forces_stress(made, given(crystal()))
    (stress.square().sum() + forces.square().sum()).backward()
    assert all(p.grad is not None for n, p in made.named_parameters() if "weight" in n)


def test_a_structure_without_repetition_is_a_molecule():
    made, water = model("schnet"), molecule("H2O", vacuum=2.0)
    alone = made(Molecules.from_ase([water]))
    both = made(given(water, crystal()))
    torch.testing.assert_close(both[:1], alone)
    slab = fcc111("Al", (1, 1, 2), vacuum=None)  # without a third vector
    slab.pbc = [True, True, False]
    assert bool(made(given(slab)).isfinite().all())


def test_cells_that_cannot_be(monkeypatch):
    flat = Atoms("C", cell=[[1, 0, 0], [1, 0, 0], [0, 0, 1]], pbc=True)
    with pytest.raises(ValueError, match="cell must have a volume, that of structure 0 has none"):
        given(flat)
    held = given(crystal())
    held.cell[0, 0] = held.cell[0, 1]
    with pytest.raises(ValueError, match="cell must have a volume"):
        model("schnet")(held)
    flat = Atoms("H", cell=[[4, 0, 0], [8, 0, 0], [0, 0, 9]], pbc=[True, True, False])
    with pytest.raises(ValueError, match="cell must have a volume"):
        given(flat)
    with pytest.raises(ValueError, match=r"y must have shape \[1, T\], got \(2, 1\)"):
        Molecules(held.z, held.pos, held.ptr, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="cell and pbc must both be given"):
        Molecules(held.z, held.pos, held.ptr, cell=held.cell)
    with pytest.raises(ValueError, match="molecules must have cells"):
        energy_forces_stress(model("schnet"), Molecules.from_ase([molecule("H2O")]))
    config = {"backbone": "esa", "backbone_options": {"hidden_channels": 16, "heads": 2}}
    esa = PooledModel.from_config(config | {"pooling": "seed"})
    with pytest.raises(NotImplementedError, match="no periodic structures"):
        esa(given(crystal()))
    monkeypatch.setitem(__import__("sys").modules, "vesin", None)
    with pytest.raises(ImportError, match="pip install vesin"):
        libraries.vesin()


def test_selected_and_moved_with_their_cells():
    held = given(molecule("H2O"), crystal(0), crystal(1)).select([2, 0])
    assert held.pbc.tolist() == [[True] * 3, [False] * 3] and len(held.z) == 6
    assert held.to(dtype=torch.float32).cell.dtype == torch.float32
    assert held.to(dtype=torch.float32).pbc.dtype == torch.bool
    assert Ragged(held.ptr).molecules == 2


def test_relaxation_and_pressure_in_ase():
    from ase import units
    from ase.filters import FrechetCellFilter
    from ase.md.nptberendsen import NPTBerendsen
    from ase.optimize import BFGS

    from attnpool_kernels.zoo.calculator import PooledCalculator

    atoms = bulk("NaCl", "rocksalt", a=4.6) * (1, 1, 2)
    atoms.rattle(0.05, seed=1)
    made = model("painn", "sum", "atom")
    atoms.calc = PooledCalculator(made)
    with pytest.raises(ValueError, match="must not be periodic"):
        atoms.get_potential_energy()
    with pytest.raises(NotImplementedError):
        atoms.get_stress()
    atoms.calc = PooledCalculator(made, periodic=True)
    stress = energy_forces_stress(made, given(atoms))[2][0]
    np.testing.assert_allclose(atoms.get_stress(voigt=False), stress, rtol=1e-10, atol=1e-12)
    before = atoms.get_potential_energy()
    BFGS(FrechetCellFilter(atoms), logfile=None, maxstep=0.02).run(steps=5)
    assert atoms.get_potential_energy() < before
    cell = atoms.cell.array.copy()
    options = {"temperature_K": 300, "pressure_au": 0.0, "compressibility_au": 0.01}
    NPTBerendsen(atoms, units.fs, **options).run(3)
    assert np.isfinite(atoms.positions).all() and (cell != atoms.cell.array).any()
