"""QM8, QM9 and QMugs in small, in the formats of their sources."""

import csv
import dataclasses
import os

import numpy as np
import pytest
import torch
from ase.io import write
from ase.units import Hartree, kcal, mol
from tools.small import indices, molecules, random_split, same_structures

from attnpool_kernels.zoo.datasets import load, qm8, qm9, qmugs, structures
from attnpool_kernels.zoo.datasets.splits import eighty_ten_ten

pyg = pytest.importorskip("torch_geometric")


def write_sdf(path, atoms):
    with open(path, "w") as file:
        for one in atoms:
            write(file, one, format="sdf")


def write_csv(path, header, values):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(header)
        rows.writerows([f"gdb_{i + 1}", *row] for i, row in enumerate(values.tolist()))


def write_list(path, atoms, y, **extra):
    """As the published files: float32 positions and targets, names beside them."""
    from torch_geometric.data import Data

    data = [
        Data(
            z=torch.tensor(one.numbers),
            pos=torch.tensor(one.positions).float(),
            y=torch.tensor(row).float(),
            y_names=["a"] * len(row),
            num_nodes=len(one),
            **extra,
        )
        for one, row in zip(atoms, y)
    ]
    torch.save(data, path)
    return data


@pytest.mark.parametrize(
    ("seeds", "count", "lengths"),
    [
        (qm8.SEEDS, 21786, [17428, 2179, 2179]),
        (qm9.SEEDS, 130831, [104664, 13083, 13084]),
        (qmugs.SEEDS, 1001, [800, 100, 101]),
    ],
)
def test_published_splits(seeds, count, lengths):
    splits = eighty_ten_ten(count, seeds, val_extra=int(seeds is qm8.SEEDS))
    assert tuple(splits) == seeds and len(seeds) == 5
    for seed in seeds:
        assert indices(splits[seed]) == random_split(range(count), lengths, seed)


QM8_HEADER = ["gdb9_index"] + [
    f"{kind}-{level}"
    for level in ("CC2", "PBE0", "PBE0", "CAM")
    for kind in ("E1", "E2", "f1", "f2")
]


def test_qm8_of_moleculenet(tmp_path):
    atoms, y = molecules(), np.random.default_rng(0).random((18, 16))
    write_sdf(tmp_path / "qm8.sdf", atoms)
    write_csv(tmp_path / "qm8.sdf.csv", QM8_HEADER, y)
    for path in (tmp_path, tmp_path / "qm8.sdf"):  # the second time from the cache
        data = load("qm8", path)
        assert same_structures(data.molecules, atoms)
        factors = [Hartree, Hartree, 1, 1] * 4
        assert np.allclose(data.molecules.y, y * factors, rtol=1e-14)
        assert [t.name for t in data.targets][5:8] == ["e2_pbe0_svp", "f1_pbe0_svp", "f2_pbe0_svp"]
        assert [t.name for t in data.targets][8::4] == ["e1_pbe0_tzvp", "e1_cam"]
        assert [t.unit for t in data.targets] == ["eV", "eV", "a.u.", "a.u."] * 4
        assert indices(data.split(qm8.SEEDS[1])) == random_split(atoms, [14, 2, 2], qm8.SEEDS[1])
    assert (tmp_path / "qm8.sdf.cache.npz").exists()


def test_qm8_as_published_list(tmp_path):
    atoms, y = molecules(), np.random.default_rng(0).random((18, 16))
    write_list(tmp_path / qm8.FILE, atoms, y)
    registered = set(torch.serialization.get_safe_globals())
    for _ in range(2):
        data = load("qm8", tmp_path)
        assert same_structures(data.molecules, atoms, rtol=1e-6)
        assert np.allclose(data.molecules.y / torch.tensor([Hartree, Hartree, 1, 1] * 4), y)
    assert data.molecules.pos.dtype == torch.float64
    # torch_geometric may register its classes for everybody; reading leaves that as it was
    assert set(torch.serialization.get_safe_globals()) == registered
    in_bohr = molecules()
    for one in in_bohr:
        one.positions /= 0.529177210903
    write_list(tmp_path / qm8.FILE, in_bohr, y)
    with pytest.raises(ValueError, match=r'not in Å; position_unit="bohr" converts them'):
        load("qm8", tmp_path)
    data = load("qm8", tmp_path, position_unit="bohr")
    assert same_structures(data.molecules, atoms, rtol=1e-6)
    with pytest.raises(ValueError, match="position_unit must be angstrom or bohr, got 'nm'"):
        load("qm8", tmp_path, position_unit="nm")


def test_qm8_download(tmp_path, monkeypatch):
    import tarfile

    atoms, y = molecules(), np.random.default_rng(0).random((18, 16))
    write_sdf(tmp_path / "qm8.sdf", atoms)
    write_csv(tmp_path / "qm8.sdf.csv", QM8_HEADER, y)
    with tarfile.open(tmp_path / "gdb8.tar.gz", "w:gz") as archive:
        for name in qm8.GDB8.files:
            archive.add(tmp_path / name, name)
    source = dataclasses.replace(qm8.GDB8, url=(tmp_path / "gdb8.tar.gz").as_uri())
    monkeypatch.setattr(qm8, "GDB8", source)
    data = load("qm8", tmp_path / "new", download=True, cache=False)
    assert same_structures(data.molecules, atoms)
    assert sorted(os.listdir(tmp_path / "new")) == ["qm8.sdf", "qm8.sdf.csv"]


def test_qm8_wrong_tables(tmp_path):
    atoms, y = molecules(), np.zeros((18, 16))
    write_sdf(tmp_path / "qm8.sdf", atoms)
    with pytest.raises(FileNotFoundError, match=r"qm8.sdf.csv, which is not in .*gdb8.tar.gz"):
        load("qm8", tmp_path)
    write_csv(tmp_path / "qm8.sdf.csv", QM8_HEADER[:13], y[:, :12])
    with pytest.raises(ValueError, match=r"must have 16 targets, .*, got 12: E1-CC2"):
        load("qm8", tmp_path)
    write_csv(tmp_path / "qm8.sdf.csv", QM8_HEADER, y[:17])
    with pytest.raises(ValueError, match=r"18 molecules and targets of shape \[17, 16\]"):
        load("qm8", tmp_path)
    write_csv(tmp_path / "qm8.sdf.csv", QM8_HEADER, y[:, :15])
    with pytest.raises(ValueError, match="must have 17 columns, got 16 in line 2"):
        load("qm8", tmp_path)
    y = y.astype(object)
    y[3, 5] = ""
    write_csv(tmp_path / "qm8.sdf.csv", QM8_HEADER, y)
    with pytest.raises(ValueError, match=r"without a value: e2_pbe0_svp \(1\)"):
        load("qm8", tmp_path)
    assert len(load("qm8", tmp_path, drop_missing=True)) == 17
    y[3, 5] = "none"
    write_csv(tmp_path / "qm8.sdf.csv", QM8_HEADER, y)
    with pytest.raises(ValueError, match=r"a cell that is not a number in line 5: .*none"):
        load("qm8", tmp_path)


def test_damaged_sdf(tmp_path):
    path = tmp_path / "x.sdf"
    write_sdf(path, molecules())
    whole = path.read_text()
    path.write_text(whole[:-200])
    with pytest.raises(
        ValueError, match=r"cut off: molecule 18 has no end|is cut off: molecule 17"
    ):
        structures.sdf(path)
    path.write_text(whole.replace(" C ", " Xx ", 1))
    with pytest.raises(ValueError, match=r"damaged at molecule 1: .*Xx"):
        structures.sdf(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no molecules"):
        structures.sdf(path)


def test_tables_with_blank_lines_and_other_encodings(tmp_path):
    """As with structures: what is blank is passed over, and errors name the line of the file."""
    path = tmp_path / "t.csv"
    path.write_bytes("\ufeff\r\nname,a,b\r\n\r\n \t\r\nx,1,2\r\n , \r\n\r\ny,,4".encode())
    header, values = structures.table(path)
    assert header == ["a", "b"]
    np.testing.assert_array_equal(values, [[1, 2], [np.nan, 4]])
    path.write_bytes("name,a\n\nÄthanol,1\n".encode("latin-1"))
    assert structures.table(path)[1].tolist() == [[1.0]]
    path.write_text("name,a\n\n\nx,1\ny,1,2\n")
    with pytest.raises(ValueError, match="must have 2 columns, got 3 in line 5"):
        structures.table(path)
    path.write_text(" \n")
    with pytest.raises(ValueError, match="has no header"):
        structures.table(path)


class Anything:
    """A class that no reader of tensors may load."""


def test_wrong_lists(tmp_path):
    path, atoms, y = tmp_path / qm8.FILE, molecules(), np.zeros((18, 16))
    write_list(path, atoms, y, extra=Anything())
    with pytest.raises(ValueError, match=r"holds more than tensors \(.*Anything\).*weights_only=F"):
        load("qm8", path)
    assert len(load("qm8", path, weights_only=False)) == 18
    os.remove(tmp_path / f"{qm8.FILE}.cache.npz")
    write_list(path, atoms, y[:, :15])
    with pytest.raises(ValueError, match="must have 16 targets, got 15 in molecule 0"):
        load("qm8", path)
    data = write_list(path, atoms, y)
    del data[4].pos
    torch.save(data, path)
    with pytest.raises(ValueError, match="z, pos and y; missing in molecule 4"):
        load("qm8", path)
    data[4].pos = torch.zeros(2, 3)
    torch.save(data, path)
    with pytest.raises(
        ValueError, match=r"pos of molecule 4 in .* must have shape \[\d+, 3\], got"
    ):
        load("qm8", path)
    torch.save({"z": 1}, path)
    with pytest.raises(ValueError, match="must hold a list of Data, got dict"):
        load("qm8", path)
    torch.save([], path)
    with pytest.raises(ValueError, match="holds no molecules"):
        load("qm8", path)
    write_list(path, atoms, y)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="cannot be read"):
        load("qm8", path)
    assert os.listdir(tmp_path) == [qm8.FILE]


def write_qm9(folder, atoms, skip=(2, 5)):
    """gdb9.sdf, its CSV and the list of molecules to leave out (numbers from 1 in the file)."""
    folder.mkdir(parents=True)
    write_sdf(folder / "gdb9.sdf", atoms)
    header = ["mol_id", "A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0"]
    header += ["u298", "h298", "g298", "cv", "u0_atom", "u298_atom", "h298_atom", "g298_atom"]
    values = np.round(np.random.default_rng(1).normal(size=(len(atoms), 19)), 4)
    write_csv(folder / "gdb9.sdf.csv", header, values)
    lines = ["text"] * 9 + [f"{i + 1:7d} C 1 2 3" for i in skip] + ["---", ""]
    (folder / "uncharacterized.txt").write_text("\n".join(lines))
    return header[1:], values


def test_qm9_raw_and_as_processed_by_torch_geometric(tmp_path):
    pytest.importorskip("rdkit")  # torch_geometric's own reading needs it, ours does not
    from torch_geometric.datasets import QM9

    atoms = molecules()
    header, values = write_qm9(tmp_path / "raw", atoms)
    theirs = QM9(str(tmp_path))
    kept = [a for i, a in enumerate(atoms) if i not in (2, 5)]
    data = load("qm9", tmp_path)
    assert same_structures(data.molecules, kept)
    column = dict(zip(header, np.delete(values, [2, 5], axis=0).T))
    for name, wanted in {
        "homo": column["homo"] * Hartree,
        "energy_u0": column["u0"] * Hartree,
        "atomization_energy_u0": column["u0_atom"] * kcal / mol,
        "rotational_constant_a": column["A"],
        "dipole_moment": column["mu"],
    }.items():
        assert np.allclose(data.molecules.y[:, data.target(name)], wanted, rtol=1e-14)
    y = torch.cat([one.y for one in theirs]).double()
    assert torch.allclose(data.molecules.y, y, rtol=1e-6)  # all 19, in their order
    for name in ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"):
        os.remove(tmp_path / "raw" / name)
    for path in (tmp_path, tmp_path / "processed" / "data_v3.pt"):
        stored = load("qm9", path)
        assert same_structures(stored.molecules, kept, rtol=1e-6)
        assert torch.equal(stored.molecules.y, y)
        assert indices(stored.split()) == indices(data.split())
    assert indices(data.split()) == random_split(kept, [12, 1, 3], qm9.SEEDS[0])


def test_qm9_list_of_dictionaries(tmp_path):
    """What torch_geometric downloads where there is no RDKit."""
    atoms, y = molecules(6), np.random.default_rng(0).random((6, 19))
    data = write_list(tmp_path / "qm9_v3.pt", atoms, y)
    torch.save([one.to_dict() for one in data], tmp_path / "qm9_v3.pt")
    found = load("qm9", tmp_path)
    assert same_structures(found.molecules, atoms, rtol=1e-6)
    assert np.allclose(found.molecules.y, y)


def test_qm9_download(tmp_path, monkeypatch):
    """Through torch_geometric's addresses, here pointed at files."""
    import zipfile

    from torch_geometric.datasets import QM9

    atoms = molecules(10)
    write_qm9(tmp_path / "source", atoms)
    with zipfile.ZipFile(tmp_path / "qm9.zip", "w") as archive:
        for name in ("gdb9.sdf", "gdb9.sdf.csv"):
            archive.write(tmp_path / "source" / name, name)
    monkeypatch.setattr(QM9, "raw_url", (tmp_path / "qm9.zip").as_uri())
    monkeypatch.setattr(QM9, "raw_url2", (tmp_path / "source/uncharacterized.txt").as_uri())
    with pytest.raises(FileNotFoundError, match=r"new does not exist; get qm9.zip"):
        load("qm9", tmp_path / "new")
    assert len(load("qm9", tmp_path / "new", download=True)) == 8
    assert len(load("qm9", tmp_path / "new")) == 8
    assert sorted(os.listdir(tmp_path / "new")) == [
        "gdb9.sdf",
        "gdb9.sdf.cache.npz",
        "gdb9.sdf.csv",
        "uncharacterized.txt",
    ]


def test_qm9_list_with_blank_lines(tmp_path):
    """What follows a blank line is in the list too; what follows a text is an error."""
    atoms = molecules(10)
    write_qm9(tmp_path / "raw", atoms)
    path = tmp_path / "raw/uncharacterized.txt"
    text = "\n" * 9 + "3 C\n\n \t\r\n6 C\n\n8\n---\n\n"
    path.write_bytes(text.encode() + b"caf\xe9\n")
    kept = [one for i, one in enumerate(atoms) if i not in (2, 5, 7)]
    assert same_structures(load("qm9", tmp_path).molecules, kept)
    path.write_text(text + "9 C\n")
    with pytest.raises(ValueError, match="got 9 in line 18 after the text in line 16"):
        load("qm9", tmp_path)


@pytest.mark.parametrize(("one", "other"), [((1, 6), (3, 4)), ((0, 4), (1, 3)), ((2,), (3,))])
def test_qm9_cache_is_of_the_list(tmp_path, one, other):
    """Lists of the same length and sum: the cache of one is not handed out for the other."""
    atoms = molecules(10)
    for skip in (one, other):
        if (tmp_path / "raw").exists():
            lines = ["text"] * 9 + [f"{i + 1:7d} C 1 2 3" for i in skip]
            (tmp_path / "raw/uncharacterized.txt").write_text("\n".join(lines))
        else:
            write_qm9(tmp_path / "raw", atoms, skip)
        kept = [a for i, a in enumerate(atoms) if i not in skip]
        assert same_structures(load("qm9", tmp_path).molecules, kept)


def test_qm9_wrong_files(tmp_path):
    atoms, raw = molecules(6), tmp_path / "raw"
    write_qm9(raw, atoms, skip=(9,))
    with pytest.raises(ValueError, match="lists molecule 10 of the 6"):
        load("qm9", tmp_path)
    (raw / "uncharacterized.txt").write_text("nothing\n")
    with pytest.raises(ValueError, match="must list molecules from its tenth line on"):
        load("qm9", tmp_path)
    (raw / "uncharacterized.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"uncharacterized.txt is empty; get qm9.zip"):
        load("qm9", tmp_path)
    write_csv(raw / "gdb9.sdf.csv", ["mol_id", "A"], np.zeros((6, 1)))
    (raw / "uncharacterized.txt").write_text("\n" * 9 + "1 x\n")
    with pytest.raises(ValueError, match=r"lacks the columns mu, alpha, homo, .*, B, C"):
        load("qm9", tmp_path)
    torch.save(({"z": torch.ones(3)}, {}), tmp_path / "data_v3.pt")
    with pytest.raises(ValueError, match=r"must be processed/data_v3.pt of torch_geometric"):
        load("qm9", tmp_path / "data_v3.pt")


def test_qmugs(tmp_path):
    atoms, rng = molecules(), np.random.default_rng(0)
    y = rng.normal(size=(18, 21))
    y[:, 18] = -0.3 + 0.05 * rng.normal(size=18)
    path = tmp_path / qmugs.FILE
    write_list(path, atoms, y[:, None, :])  # [1, 21] per molecule
    data = load("qmugs", tmp_path)
    assert same_structures(data.molecules, atoms, rtol=1e-6)
    factors = np.full(21, Hartree)
    factors[9:11] = 1  # dispersion coefficient and polarizability
    assert np.allclose(data.molecules.y, y * factors, rtol=1e-6)
    assert data.target("gfn2_homo") == 5 and data.target("dft_total_energy") == 11
    assert data.targets[18].name == "dft_homo" and data.targets[20].name == "dft_gap"
    assert indices(data.split()) == random_split(atoms, [14, 1, 3], 242566)
    with pytest.raises(ValueError, match=r"dft_homo in .* is not in eV; see energy_unit"):
        load("qmugs", path, energy_unit="eV")
    with pytest.raises(ValueError, match="energy_unit must be hartree or eV, got 'kcal'"):
        load("qmugs", path, energy_unit="kcal")
    y[:, 18] *= Hartree
    write_list(path, atoms, y)
    with pytest.raises(ValueError, match="not in hartree"):
        load("qmugs", path)
    assert np.allclose(load("qmugs", path, energy_unit="eV").molecules.y, y, rtol=1e-6)
    path.rename(tmp_path / "else.pt")
    with pytest.raises(FileNotFoundError, match=r"qmugs needs .*QMugs_3D.* OneDrive"):
        load("qmugs", tmp_path, download=True)
