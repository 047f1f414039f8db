"""OE62 in small: databases written by SchNetPack and, as SchNetPack 1 does, by ASE alone."""

import importlib.util

import numpy as np
import pytest
from ase.db import connect
from ase.units import Bohr, Hartree
from tools.small import indices, molecules, same_structures

from attnpool_kernels.zoo import libraries
from attnpool_kernels.zoo.datasets import load, oe62

COUNT = 18


def properties(atoms, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for one in atoms:
        homo, lumo, ip = -6 + rng.normal(), -1 + rng.normal(), 7 + rng.normal()
        rows.append(
            {
                "HOMO": np.array([homo]),
                "HOMO_au": np.array([homo / Hartree]),
                "LUMO": np.array([lumo]),
                "GAP": np.array([lumo - homo]),
                "IP": np.array([ip]),
                "IP_au": np.array([ip / Hartree]),
                "coeff": rng.dirichlet(np.ones(len(one))),
            }
        )
    return rows


def write_splits(folder, count=COUNT):
    """The five files of the source, whose names begin with the sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(5):
        order = np.random.default_rng(i).permutation(count)
        np.savez(
            folder / f"split_{count - 6}_4_2_{i}.npz",
            train_idx=order[:-6],
            val_idx=order[-6:-2],
            test_idx=order[-2:],
        )


def write_ase(path, atoms, rows):
    """As AtomsData of SchNetPack 1: no units."""
    with connect(str(path)) as database:
        for one, row in zip(atoms, rows):
            database.write(one, data=row)


@pytest.fixture
def source(tmp_path):
    atoms = molecules(COUNT)
    rows = properties(atoms)
    write_ase(tmp_path / oe62.FILE, atoms, rows)
    write_splits(tmp_path / "splits")
    return tmp_path, atoms, rows


def test_database_and_splits(source):
    folder, atoms, rows = source
    for path in (folder, folder / oe62.FILE):  # the second time from the cache
        data = load("oe62", path)
        assert same_structures(data.molecules, atoms)
        assert [t.name for t in data.targets] == ["homo", "lumo", "gap", "ip"]
        wanted = [[row[name][0] for name in ("HOMO", "LUMO", "GAP", "IP")] for row in rows]
        assert np.allclose(data.molecules.y, wanted, rtol=1e-14)
        coefficients = np.concatenate([row["coeff"] for row in rows])
        assert np.array_equal(data.molecules.coefficients, coefficients)
        assert tuple(data.splits) == (0, 1, 2, 3, 4)
        for seed in range(5):
            order = np.random.default_rng(seed).permutation(COUNT).tolist()
            assert indices(data.split(seed)) == [order[:-6], order[-6:-2], order[-2:]]
    assert (folder / f"{oe62.FILE}.cache.npz").exists()
    one = data.molecules.select([5])
    assert np.array_equal(one.coefficients, rows[5]["coeff"])


def test_orbitals(source):
    folder, _, rows = source
    assert load("oe62", folder, orbital=None).molecules.coefficients is None
    with pytest.raises(
        ValueError, match=r"no coefficients 'coeff_lumo' of the lumo, it has: coeff"
    ):
        load("oe62", folder, orbital="lumo")
    published = load("oe62", folder, orbital="lumo", coefficients="coeff")
    assert np.array_equal(published.molecules.coefficients[:5], rows[0]["coeff"])
    with pytest.raises(ValueError, match="orbital must be one of homo, lumo or None, got 'gap'"):
        load("oe62", folder, orbital="gap")


def test_database_of_schnetpack_2(tmp_path):
    """With units, which are honoured."""
    if importlib.util.find_spec("schnetpack") is None:
        pytest.skip("schnetpack is not installed")
    data = libraries.schnetpack("data")
    atoms = molecules(COUNT)
    rows = [{k: row[k] / Hartree for k in ("HOMO", "LUMO")} for row in properties(atoms)]
    in_bohr = [one.copy() for one in atoms]
    for one in in_bohr:
        one.positions /= Bohr
    written = data.ASEAtomsData.create(
        str(tmp_path / "own.db"), "Bohr", {"HOMO": "Ha", "LUMO": "Ha"}
    )
    written.add_systems(rows, in_bohr)
    write_splits(tmp_path)
    found = load("oe62", tmp_path / "own.db", orbital=None)
    assert same_structures(found.molecules, atoms, rtol=1e-9)
    assert [t.name for t in found.targets] == ["homo", "lumo"]
    wanted = [[row["HOMO"][0] * Hartree, row["LUMO"][0] * Hartree] for row in rows]
    assert np.allclose(found.molecules.y, wanted, rtol=1e-14)


def test_two_files_of_one_split(source):
    """The same again does no harm; another one is not passed over."""
    folder, _, _ = source
    kept = (folder / "splits/split_12_4_2_3.npz").read_bytes()
    (folder / "split_12_4_2_3.npz").write_bytes(kept)
    assert tuple(load("oe62", folder).splits) == (0, 1, 2, 3, 4)
    np.savez(folder / "splits/split_3_1_1_3.npz", train_idx=[0, 1, 2], val_idx=[3], test_idx=[4])
    with pytest.raises(
        ValueError, match=r"split_12_4_2_3.npz and .*split_3_1_1_3.npz are both split 3"
    ):
        load("oe62", folder)


def test_periodic_structures_are_said(tmp_path):
    atoms = molecules(COUNT)
    for one in atoms[3:5]:
        one.pbc, one.cell = True, [9, 9, 9]
    write_ase(tmp_path / oe62.FILE, atoms, properties(atoms))
    write_splits(tmp_path)
    with pytest.warns(UserWarning, match="2 of 18 structures are periodic; they are read as mol"):
        assert same_structures(load("oe62", tmp_path).molecules, atoms)


def test_wrong_databases(tmp_path):
    path, atoms = tmp_path / oe62.FILE, molecules(4)
    write_splits(tmp_path / "splits", 8)

    def fails(message, rows, error=ValueError):
        path.unlink(missing_ok=True)
        write_ase(path, atoms[: len(rows)], rows)
        with pytest.raises(error, match=message):
            load("oe62", tmp_path, cache=False)

    with pytest.raises(FileNotFoundError, match=r"needs dataset_OE62_all.db, .*gitlab.mpcdf"):
        load("oe62", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        load("oe62", tmp_path)
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(ValueError, match="cannot be read as a database of ASE"):
        load("oe62", tmp_path)
    rows = properties(atoms)
    fails("must hold indices from 0 to 3, got 0 to 7", rows)
    fails("has none of the properties HOMO", [{"coeff": row["coeff"]} for row in rows])
    fails("HOMO for 3 of 4 molecules", [*rows[:3], {k: rows[3][k] for k in ("LUMO", "coeff")}])
    fails("coeff of .* must be a number for every atom", [r | {"coeff": np.ones(2)} for r in rows])
    fails("HOMO of .* must be a number for every m", [r | {"HOMO": np.ones(2)} for r in rows])
    fails("HOMO in .* is not in eV", [r | {"HOMO": r["HOMO_au"]} for r in rows])
    for i in range(5):
        np.savez(
            tmp_path / "splits" / f"split_2_4_2_{i}.npz",
            train_idx=[0, 1],
            val_idx=[1],
            test_idx=[2, 3],
        )
    fails("molecules in two parts of the split", rows)
    np.savez(tmp_path / "splits" / "split_2_4_2_0.npz", train_idx=[0, 1], val_idx=[1])
    fails("must hold train_idx, val_idx, test_idx; missing: test_idx", rows)
    for file in (tmp_path / "splits").iterdir():
        file.unlink()
    fails(r"no split_\*_<number>.npz beside .*SchNet_OE62/splits", rows, FileNotFoundError)
    rows[2]["HOMO"] = np.array([np.nan])
    write_splits(tmp_path / "splits", 8)
    for file in (tmp_path / "splits").iterdir():
        np.savez(file, train_idx=[0, 1], val_idx=[2], test_idx=[3])
    fails(r"without a value: homo \(1\)", rows)
    assert indices(load("oe62", tmp_path, drop_missing=True).split()) == [[0, 1], [], [2]]
