"""MD17 in small: the fields of each source, against torch_geometric's own reading of them."""

import os
import zipfile

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.units import Bohr, Hartree, kcal, mol
from tools.small import indices, random_split

from attnpool_kernels.zoo.datasets import load

pyg = pytest.importorskip("torch_geometric")
FACTOR = kcal / mol


def trajectory(frames, seed=0, formula="CH3CH2OH"):
    atoms, rng = molecule(formula), np.random.default_rng(seed)
    n = len(atoms)
    return {
        "z": atoms.numbers.astype(np.uint8),
        "R": atoms.positions + 0.05 * rng.normal(size=(frames, n, 3)),
        "E": -97000 + rng.normal(size=(frames, 1)),
        "F": 20 * rng.normal(size=(frames, n, 3)),
    }


def same(molecules, wanted, energy=FACTOR, length=1.0):
    frames, n = wanted["R"].shape[:2]
    assert molecules.ptr.tolist() == [i * n for i in range(frames + 1)]
    assert torch.equal(
        molecules.z.view(frames, n), torch.tensor(wanted["z"]).long().expand(frames, n)
    )
    assert np.allclose(molecules.pos.view(frames, n, 3), wanted["R"] * length, rtol=1e-14)
    assert np.allclose(molecules.y[:, 0], wanted["E"].reshape(-1) * energy, rtol=1e-14)
    forces = wanted["F"] * energy / length
    assert np.allclose(molecules.forces.view(frames, n, 3), forces, rtol=1e-14)
    return True


def both(first, second):
    return {k: first[k] if k == "z" else np.concatenate([first[k], second[k]]) for k in first}


def write_divided(folder, name, train, test):
    np.savez(folder / f"{name}-train.npz", **train)
    np.savez(folder / f"{name}-test.npz", **test)


def test_dft_as_torch_geometric_reads_it(tmp_path):
    from torch_geometric.datasets import MD17

    frames = trajectory(60)
    raw = tmp_path / "ethanol" / "raw"
    raw.mkdir(parents=True)
    np.savez(raw / "md17_ethanol.npz", **frames)
    theirs = MD17(str(tmp_path), "ethanol")
    for path in (tmp_path, raw, raw / "md17_ethanol.npz"):
        data = load("md17", path, molecule="ethanol", train=40, val=10)
        assert same(data.molecules, frames)
    assert torch.allclose(theirs.pos, data.molecules.pos.float())
    assert torch.allclose(theirs.force * FACTOR, data.molecules.forces.float(), rtol=1e-5)
    assert torch.allclose(theirs.energy.view(-1) * FACTOR, data.molecules.y[:, 0].float())
    assert data.targets[0].name == "energy" and data.targets[0].unit == "eV"
    assert tuple(data.splits) == (0, 1, 2, 3, 4)
    assert indices(data.split(3)) == random_split(range(60), [40, 10, 10], 3)


def test_forces_are_the_gradient_of_the_energy(tmp_path):
    """The sign and the units of both together, on a potential that is known."""
    from ase.calculators.lj import LennardJones

    frames = []
    for i in range(4):
        atoms = molecule("CH4")
        atoms.positions += 0.02 * np.random.default_rng(i).normal(size=(5, 3))
        atoms.calc = LennardJones(sigma=1.0, rc=20.0)
        frames.append((atoms.positions, atoms.get_potential_energy(), atoms.get_forces()))
    pos, energy, forces = (np.array(x) for x in zip(*frames))
    np.savez(tmp_path / "lj.npz", z=atoms.numbers, R=pos, E=energy / FACTOR, F=forces / FACTOR)
    found = load("md17", tmp_path / "lj.npz", train=2, val=1).molecules
    step = 1e-5
    atoms.positions[2, 1] += step
    change = (atoms.get_potential_energy() - float(found.y[3, 0])) / step
    assert abs(change + float(found.forces[3 * 5 + 2, 1])) < 1e-3 * abs(change)


def test_revised(tmp_path):
    frames = trajectory(30)
    fields = dict(zip(("nuclear_charges", "coords", "energies", "forces"), frames.values()))
    fields["energies"] = fields["energies"].reshape(-1)
    folder = tmp_path / "raw" / "rmd17" / "npz_data"
    folder.mkdir(parents=True)
    np.savez(folder / "rmd17_aspirin.npz", **fields)
    for path in (tmp_path, folder / "rmd17_aspirin.npz"):
        data = load("md17", path, molecule="aspirin", level="revised", train=20, val=5)
        assert same(data.molecules, frames)


@pytest.mark.parametrize("name", ["toluene", "aspirin"])
def test_ccsd(tmp_path, name):
    """The given training set, and the given test set halved by the published recipe."""
    from torch_geometric.datasets import MD17

    train, test = trajectory(20, 0), trajectory(11, 1)
    stem = "aspirin_ccsd" if name == "aspirin" else f"{name}_ccsd_t"
    folder = tmp_path / (f"{name} CCSD" if name == "aspirin" else f"{name} CCSD(T)") / "raw"
    folder.mkdir(parents=True)
    write_divided(folder, stem, train, test)
    assert len(MD17(str(tmp_path), folder.parent.name, train=False)) == 11  # the layout is theirs
    with zipfile.ZipFile(tmp_path / f"{stem}.zip", "w") as archive:
        for part in ("train", "test"):
            archive.write(folder / f"{stem}-{part}.npz", f"{stem}-{part}.npz")
    for path in (tmp_path, folder, folder / f"{stem}-train.npz", tmp_path / f"{stem}.zip"):
        data = load("md17", path, molecule=name, level="CCSD(T)")
        assert same(data.molecules, both(train, test))
        _, val, rest = random_split(range(11), [0, 5, 6], 42)
        wanted = [list(range(20)), [20 + i for i in val], [20 + i for i in rest]]
        assert indices(data.split(42)) == wanted and tuple(data.splits) == (42,)
    with pytest.raises(ValueError, match="train and val must not be given"):
        load("md17", tmp_path, molecule=name, level="ccsd(t)", train=5)


def test_units_that_the_file_states(tmp_path):
    frames, path = trajectory(6), tmp_path / "own.npz"
    np.savez(path, **frames, e_unit="eV", r_unit=np.bytes_(b"bohr"))
    assert same(load("md17", path, train=4, val=1).molecules, frames, 1.0, Bohr)
    np.savez(path, **frames, e_unit="hartree")
    assert same(load("md17", path, train=4, val=1).molecules, frames, Hartree)
    np.savez(path, **frames, e_unit="kJ/mol")
    with pytest.raises(ValueError, match=r"e_unit of .* must be one of kcal/mol, .*, got 'kJ/mol'"):
        load("md17", path)


def test_download(tmp_path, monkeypatch):
    from torch_geometric.datasets import MD17

    source = tmp_path / "source"
    source.mkdir()
    np.savez(source / "md17_ethanol.npz", **trajectory(8))
    write_divided(source, "ethanol_ccsd_t", trajectory(8), trajectory(4))
    with zipfile.ZipFile(source / "ethanol_ccsd_t.zip", "w") as archive:
        for part in ("train", "test"):
            archive.write(source / f"ethanol_ccsd_t-{part}.npz", f"ethanol_ccsd_t-{part}.npz")
    monkeypatch.setattr(MD17, "gdml_url", source.as_uri())
    options = {"molecule": "ethanol", "download": True}
    assert len(load("md17", tmp_path / "new", train=4, val=2, **options)) == 8
    assert len(load("md17", tmp_path / "new", level="ccsd(t)", **options)) == 12
    assert sorted(os.listdir(tmp_path / "new")) == [
        "ethanol_ccsd_t-test.npz",
        "ethanol_ccsd_t-train.npz",
        "md17_ethanol.npz",
    ]
    with pytest.raises(OSError, match=r"md17_uracil.npz could not be fetched"):
        load("md17", tmp_path / "new", molecule="uracil", download=True)
    assert len(os.listdir(tmp_path / "new")) == 3


def test_wrong_input(tmp_path):
    frames, path = trajectory(10), tmp_path / "md17_ethanol.npz"
    np.savez(path, **frames)
    with pytest.raises(
        ValueError, match=r"molecule must be one of benzene, .* at level dft, got N"
    ):
        load("md17", tmp_path)
    with pytest.raises(
        ValueError, match=r"one of benzene, aspirin, .* at level ccsd\(t\), got 'ur"
    ):
        load("md17", tmp_path, molecule="uracil", level="ccsd(t)")
    with pytest.raises(ValueError, match=r"level must be one of dft, revised, .*, got 'mp2'"):
        load("md17", tmp_path, molecule="ethanol", level="mp2")
    with pytest.raises(FileNotFoundError, match=r"needs md17_aspirin.npz, .*sGDML"):
        load("md17", tmp_path, molecule="aspirin")
    with pytest.raises(ValueError, match=r"at most the 10 frames of .*, got 950 and 50"):
        load("md17", path)
    for field, value, message in (
        (
            "R",
            frames["R"][:, :5],
            r"must hold z \[n\] and R \[M, n, 3\], got \[9\] and \[10, 5, 3\]",
        ),
        ("R", frames["R"][:0], r"got \[9\] and \[0, 9, 3\]"),
        ("F", frames["F"][:9], r"got \[9, 9, 3\]"),
        ("E", frames["E"][:9], r"and \[9, 1\]"),
        ("lattice", 9 * np.eye(3), "is periodic, it holds a lattice"),
    ):
        np.savez(path, **frames | {field: value})
        with pytest.raises(ValueError, match=message):
            load("md17", path, train=5, val=2)
    frames["F"][3, 2, 1] = np.nan
    np.savez(path, **frames)
    with pytest.raises(ValueError, match="1 values in forces that are not finite"):
        load("md17", path, train=5, val=2)
    del frames["F"]
    np.savez(path, **frames)
    with pytest.raises(ValueError, match="must hold F or forces, got z, R, E"):
        load("md17", path, train=5, val=2)
    np.savez(tmp_path / "ethanol_ccsd_t-train.npz", **trajectory(5))
    with pytest.raises(FileNotFoundError, match=r"ethanol_ccsd_t-test.npz does not exist"):
        load("md17", tmp_path, molecule="ethanol", level="ccsd(t)")
    (tmp_path / "x.zip").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"x.zip cannot be read"):
        load("md17", tmp_path / "x.zip", level="ccsd(t)")
    with pytest.raises(ValueError, match=r"must be a .zip or end with -train.npz"):
        load("md17", path, level="ccsd(t)")
    write_divided(tmp_path, "y", trajectory(5), trajectory(5, formula="CH3OH"))
    with pytest.raises(ValueError, match="training and test set must have the same atoms"):
        load("md17", tmp_path / "y-train.npz", level="ccsd(t)")
