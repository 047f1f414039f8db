"""QM7b: the published numbers where the data is at hand, and the source's formats in small."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.units import Bohr, Hartree

from attnpool_kernels.zoo.datasets import DATASETS, load, qm7b

DATA = Path(__file__).parents[3] / ".." / "shared" / "data"
real = pytest.mark.skipif(
    not (DATA / "qm7b.npz").exists(), reason="../shared/data/qm7b.npz is not there"
)


def source(count=30, seed=0):
    """Molecules as rows of the source: z, pos in bohr, 14 targets."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        n = int(rng.integers(1, 8))
        z = rng.choice([1, 6, 7, 8, 16, 17], n).astype(np.int16)
        rows.append((z, rng.normal(size=(n, 3)), rng.normal(size=14)))
    return rows


def write_npz(path, rows, **changed):
    fields = {
        "z": np.concatenate([r[0] for r in rows]),
        "pos": np.concatenate([r[1] for r in rows]),
        "ptr": np.cumsum([0] + [len(r[0]) for r in rows]),
        "y": np.stack([r[2] for r in rows]),
    }
    np.savez(path, **{k: v for k, v in (fields | changed).items() if v is not None})
    return path


def sklearn_order(n, seed):
    """Train, val and test rows, spelled out as the documentation of the split has it."""

    def split(rows, fraction):
        order = np.random.RandomState(seed).permutation(len(rows))
        k = int(np.ceil(fraction * len(rows)))
        return rows[order[k:]], rows[order[:k]]

    train, rest = split(np.arange(n), 0.2)
    return train, *split(rest, 0.5)


def write_source(folder, rows, seeds=qm7b.SEEDS):
    """The 15 files of object arrays: formula, z, pos, y, names."""
    for seed in seeds:
        (folder / str(seed)).mkdir(parents=True)
        for part, index in zip(qm7b.PARTS, sklearn_order(len(rows), seed)):
            table = np.empty((len(index), 5), dtype=object)
            for i, row in enumerate(index):
                z, pos, y = rows[row]
                table[i] = ["X", z, pos, y.astype(object), [t.name for t in qm7b.TARGETS]]
            np.save(folder / str(seed) / f"{part}.npy", table, allow_pickle=True)
    return folder


@real
def test_published_numbers():
    data = load("qm7b", DATA)
    assert len(data) == 7211 and data.molecules.z.shape[0] == 111180
    assert data.elements == (1, 6, 7, 8, 16, 17)
    homo = data.molecules.y[:, data.target("homo_gw")]
    assert abs(float(homo[7190]) + 14.13) < 0.01  # methane
    energy = data.molecules.y[7190, data.target("atomization_energy_pbe0")] / 0.0433641
    assert abs(float(energy) + 420.9) < 0.1
    methane = data.molecules.select([7190])
    assert ((methane.pos[1:] - methane.pos[0]).norm(dim=1) - 1.09).abs().max() < 0.02
    yardstick = [0.02000, 0.01917, 0.01931, 0.01975, 0.02048]
    for seed, wanted in zip(qm7b.SEEDS, yardstick):
        mean, _ = data.statistics("homo_gw", seed)
        error = (homo[data.split(seed).test] - mean).abs().mean() / Hartree
        assert abs(float(error) - wanted) < 1e-5


@real
@pytest.mark.parametrize("seed", qm7b.SEEDS)
def test_published_splits(seed):
    split = load("qm7b", DATA / "qm7b.npz").split(seed)
    published = np.load(DATA / "qm7b_splits.npz")
    for part in ("train", "val", "test"):
        assert np.array_equal(getattr(split, part).numpy(), published[f"{seed}_{part}"])


def test_npz_in_angstrom_and_electronvolt(tmp_path):
    rows = source()
    data = load("qm7b", write_npz(tmp_path / "qm7b.npz", rows))
    molecules = data.molecules
    assert molecules.pos.dtype == molecules.y.dtype == torch.float64
    for i, (z, pos, y) in enumerate(rows):
        one = molecules.select([i])
        assert one.z.tolist() == z.tolist()
        assert np.allclose(one.pos, pos * Bohr, rtol=1e-14)
        energies = [t.unit == "eV" for t in data.targets]
        assert np.allclose(one.y[0], np.where(energies, y * Hartree, y), rtol=1e-14)
    assert [data.targets[i].unit for i in (7, 12, 13)] == ["arbitrary", "Å³", "Å³"]
    assert sum(energies) == 11
    mean, std = data.statistics("homo_gw")
    train = np.stack([rows[i][2][4] for i in data.split().train]) * Hartree
    assert np.allclose([mean, std], [train.mean(), train.std()])


def test_the_numbers_of_the_source(tmp_path):
    rows = source()
    data = load("qm7b", write_npz(tmp_path / "qm7b.npz", rows), raw_units=True)
    assert np.array_equal(data.molecules.pos, np.concatenate([r[1] for r in rows]))
    assert np.array_equal(data.molecules.y, np.stack([r[2] for r in rows]))
    assert data.targets[4].unit == "hartree" and data.targets[12].unit == "Å³"


@pytest.mark.parametrize("seeds", [qm7b.SEEDS, qm7b.SEEDS[2:3]])
def test_split_files_of_the_source(tmp_path, seeds):
    rows = source()
    folder = write_source(tmp_path / "splits", rows, seeds)
    with pytest.raises(ValueError, match="allow_pickle=True"):
        load("qm7b", folder)
    data = load("qm7b", folder, allow_pickle=True)
    same = load("qm7b", write_npz(tmp_path / "qm7b.npz", rows))
    for field in ("z", "pos", "ptr", "y"):
        assert torch.equal(getattr(data.molecules, field), getattr(same.molecules, field))
    for seed in qm7b.SEEDS:
        train, val, test = sklearn_order(len(rows), seed)
        split = data.split(seed)
        assert np.array_equal(split.train, train)
        assert np.array_equal(split.val, val) and np.array_equal(split.test, test)


def test_split_files_that_disagree(tmp_path):
    write_source(tmp_path, source(seed=0), qm7b.SEEDS[:1])
    write_source(tmp_path, source(seed=1), qm7b.SEEDS[1:2])
    with pytest.raises(ValueError, match="386333 do not hold the molecules of split 23887"):
        load("qm7b", tmp_path, allow_pickle=True)
    (tmp_path / "386333" / "test.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"386333/test.npy"):
        load("qm7b", tmp_path, allow_pickle=True)
    (tmp_path / "386333" / "test.npy").write_bytes(b"\x93NUMPY nothing")
    with pytest.raises(ValueError, match=r"test.npy cannot be read as .npy"):
        load("qm7b", tmp_path, allow_pickle=True)


def test_coulomb_matrices_have_no_positions(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    scipy.savemat(tmp_path / "qm7b.mat", {"X": np.zeros((2, 23, 23)), "T": np.zeros((2, 14))})
    with pytest.raises(ValueError, match="Coulomb matrices and no positions"):
        load("qm7b", tmp_path)


def test_wrong_files(tmp_path):
    rows, path = source(), tmp_path / "qm7b.npz"
    with pytest.raises(FileNotFoundError, match=r"needs qm7b.npz or .* is not in .*GitHub"):
        load("qm7b", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*GitHub"):
        load("qm7b", tmp_path / "nowhere")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"qm7b.npz is empty"):
        load("qm7b", path)
    write_npz(path, rows)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be read as .npz"):
        load("qm7b", path)
    write_npz(path, rows, pos=None)
    with pytest.raises(ValueError, match=r"missing: pos"):
        load("qm7b", path)
    write_npz(path, rows, y=np.zeros((30, 13)))
    with pytest.raises(ValueError, match=r"must have 14 targets, got shape \[30, 13\]"):
        load("qm7b", path)
    write_npz(path, rows, y=np.zeros((29, 14)))
    with pytest.raises(ValueError, match=r"30 molecules and targets of shape \[29, 14\]"):
        load("qm7b", path)
    z = np.concatenate([r[0] for r in rows])
    z[3] = 0
    write_npz(path, rows, z=z)
    with pytest.raises(ValueError, match="1 atoms whose atomic number is not from 1 to 118"):
        load("qm7b", path)
    ends = np.cumsum([0] + [len(r[0]) for r in rows])
    for ptr, message in (
        (np.r_[ends[:3], ends[2:-2], ends[-1]], "1 molecules without atoms"),
        (np.r_[ends[:3], ends[1], ends[4:]], "ptr must"),
        (np.r_[ends[:-1], ends[-1] - 1], r"ptr\[-1\] must be the number of atoms"),
    ):
        write_npz(path, rows, ptr=ptr)
        with pytest.raises(ValueError, match=message):
            load("qm7b", path)
    write_npz(path, rows, ptr=np.cumsum([0] + [len(r[0]) for r in rows])[1:])
    with pytest.raises(ValueError, match="ptr must begin with 0"):
        load("qm7b", path)


def test_the_published_digest(tmp_path):
    rows = source(1) * qm7b.COUNT
    path = write_npz(tmp_path / "qm7b.npz", rows)
    with pytest.raises(ValueError, match="it was changed or damaged") as raised:
        load("qm7b", path)
    found = str(raised.value).split('sha256="')[1].split('"')[0]
    assert len(load("qm7b", path, sha256=found)) == qm7b.COUNT
    assert len(load("qm7b", path, sha256={"qm7b.npz": found})) == qm7b.COUNT
    with pytest.raises(ValueError, match=r"name files that are read, qm7b.npz; got qm7.npz"):
        load("qm7b", path, sha256={"qm7b.npz": found, "qm7.npz": found})
    with pytest.raises(ValueError, match=r"sha256 of .* must be 00, got"):
        load("qm7b", path, sha256="00")


def test_missing_values(tmp_path):
    rows = source()
    for i, target in ((3, 4), (7, 4), (7, 0)):
        rows[i][2][target] = np.nan
    path = write_npz(tmp_path / "qm7b.npz", rows)
    with pytest.raises(ValueError, match=r"first_excitation_zindo \(1\), homo_gw \(2\); drop_m"):
        load("qm7b", path)
    data = load("qm7b", path, drop_missing=True)
    assert len(data) == 28 and data.molecules.y.isfinite().all()
    kept = [i for i in range(30) if i not in (3, 7)]
    train, val, test = sklearn_order(30, 23887)
    split = data.split()
    for part, wanted in ((split.train, train), (split.val, val), (split.test, test)):
        assert [kept[i] for i in part] == [i for i in wanted if i in kept]
    rows[0][1][0, 0] = np.inf
    with pytest.raises(ValueError, match="1 values in pos that are not finite"):
        load("qm7b", write_npz(path, rows))


def test_names(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"name must be one of qm7b, .*, got 'qm6'"):
        load("qm6")
    with pytest.raises(ValueError, match=r"qm7b has no option 'unit'; its options: raw_units, al"):
        load("qm7b", tmp_path, unit="eV")
    data = load("qm7b", write_npz(tmp_path / "qm7b.npz", source()))
    with pytest.raises(ValueError, match=r"target must be one of .*homo_gw.*, got 'homo'"):
        data.statistics("homo")
    with pytest.raises(ValueError, match=r"split seed must be one of 23887, .*, got 1"):
        data.split(1)
    assert DATASETS["qm7b"].seeds == tuple(data.splits)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not in data/qm7b or data;"):
        load("qm7b")
    (tmp_path / "data").mkdir()
    (tmp_path / "qm7b.npz").rename(tmp_path / "data" / "qm7b.npz")
    assert len(load("qm7b")) == 30
