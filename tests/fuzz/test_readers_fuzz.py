"""Damaged files: an error of the documented types, or everything that the file says."""

import contextlib
import io
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from ase.data import atomic_numbers
from hypothesis import strategies as st
from tools.drawn import drawn

pytest.importorskip("torch_geometric")

from attnpool_kernels.zoo import sdf
from attnpool_kernels.zoo.datasets import load, structures
from attnpool_kernels.zoo.lines import lines
from attnpool_kernels.zoo.molecule_files import read_molecules
from fuzz import files
from fuzz.mutations import binary_damages, damaged, damages

REFUSED = (ValueError, OSError)


@contextlib.contextmanager
def quiet():
    """Warnings and progress are not what is looked at."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def read(call):
    """What a reader gives, None where it refuses."""
    with quiet(), contextlib.suppress(*REFUSED):
        return call()


@drawn(60, format=st.sampled_from(["xyz", "extxyz"]), steps=damages)
def test_xyz(format, steps):
    data = damaged(files.xyz_file(format), steps)
    path = files.folder() / "m.xyz"
    path.write_bytes(data)
    found, said = read(lambda: read_molecules(path)), files.said_by_xyz(data)
    if found is None:
        assert not must_be_read(said), "refused"
        return
    assert said is not None, "read what is no xyz file"
    assert [len(x) for x in found] == [len(symbols) for _, symbols, _ in said]
    for atoms, (_, symbols, pos) in zip(found, said):
        if pos is not None:
            assert atoms.get_chemical_symbols() == [x.capitalize() for x in symbols]
            assert np.array_equal(atoms.positions, pos)


def must_be_read(said):
    """Whether nothing speaks against the file, by its letter."""

    def fine(comment, symbols, pos):
        known = all(x.capitalize() in atomic_numbers for x in symbols)
        plain = not comment.strip() or comment.strip().replace(" ", "").isalnum()
        apart = pos is not None and len(pos) and np.isfinite(pos).all()
        return known and plain and apart and (len(pos) == 1 or bool(np.ptp(pos, 0).any()))

    return bool(said) and all(fine(*frame) for frame in said)


@drawn(60, steps=damages, whole=st.booleans())
def test_sdf(steps, whole):
    data = damaged(files.sdf_file(), steps)
    path = files.folder() / "m.sdf"
    path.write_bytes(data)
    if whole:  # as a data set
        found = read(lambda: structures.sdf(path))
        found = found and np.split(found["pos"], np.cumsum(found["counts"])[:-1])
    else:
        found = read(lambda: read_molecules(path))
        found = found and [atoms.positions for atoms in found]
    said = files.said_by_sdf(data)
    if found is None:
        return
    assert said is not None, "read what is no SDF file"
    assert len(found) == len(said) and all(map(np.array_equal, found, said))
    texts = ["$$$$", *files.text_lines(data)]  # the line after these is a title: anything
    ends = [x.startswith("M  END") and before != "$$$$" for before, x in pairwise(texts)]
    assert sum(ends) <= len(said)


@drawn(60, steps=damages)
def test_csv(steps):
    data = damaged(files.qm8_files()["qm8.sdf.csv"], steps)
    path = files.folder() / "m.csv"
    path.write_bytes(data)
    found, said = read(lambda: structures.table(path)), files.said_by_csv(data)
    if found is None:
        return
    _, values = found
    if b'"' in data:  # quotes may hide separators, but no line
        blank = [not x.replace(",", "").replace('"', "").strip() for x in files.text_lines(data)]
        assert len(values) == len(blank) - sum(blank) - 1
        return
    assert said is not None, "read what is no table"
    assert np.array_equal(values, np.array(said).reshape(values.shape), equal_nan=True)


@drawn(
    40,
    name=st.sampled_from(["qm8", "qm9"]),
    which=st.integers(0, 2),
    steps=damages,
    drop=st.booleans(),
)
def test_structures_with_a_table(name, which, steps, drop):
    """Only as many molecules as structures and rows of the table say."""
    whole = files.qm8_files() if name == "qm8" else files.qm9_files()
    names = list(whole)
    place = files.folder() / name
    place.mkdir(exist_ok=True)
    stated = whole | {names[which % len(names)]: damaged(whole[names[which % len(names)]], steps)}
    for file, data in stated.items():
        (place / file).write_bytes(data)
    found = read(lambda: load(name, place, cache=False, drop_missing=drop))
    if found is None:
        return
    records, rows = (files.said_by_sdf(stated[names[0]]), files.said_by_csv(stated[names[1]]))
    skip = uncharacterized(stated[names[2]]) if name == "qm9" else set()
    if records is not None and rows is not None:
        kept = [i for i in range(len(rows)) if i not in skip]
        if drop:
            kept = [i for i in kept if np.isfinite(rows[i]).all()]
        assert len(records) == len(rows) and len(found) == len(kept)
        assert [len(records[i]) for i in kept] == found.molecules.ptr.diff().tolist()
    assert found.molecules.pos.isfinite().all() and found.molecules.y.isfinite().all()


def uncharacterized(data):
    listed = set()
    for line in files.text_lines(data)[9:]:
        first = (line.split() or [""])[0]
        if first and not (first.isascii() and first.isdigit()):
            break
        if first:
            assert int(first) > 0, "molecules count from 1"
            listed.add(int(first) - 1)
    return listed


CHANGES = {
    "drop": lambda x, n: None,
    "float": lambda x, n: x + 0.5,
    "complex": lambda x, n: x + 1j,
    "text": lambda x, n: x.astype(str),
    "object": lambda x, n: x.astype(object),
    "bool": lambda x, n: x.astype(bool),
    "half": lambda x, n: x.astype(np.float16),
    "bytes": lambda x, n: x.astype("S5"),
    "time": lambda x, n: x.astype(np.int64).astype("M8[s]"),
    "unsigned": lambda x, n: x.astype(np.int64).astype(np.uint64),
    "fields": lambda x, n: np.zeros(x.shape, [("a", "f8"), ("b", "i4")]),
    "flat": lambda x, n: x.reshape(-1),
    "turned": lambda x, n: x.T,
    "dimension": lambda x, n: x[None],
    "scalar": lambda x, n: x.reshape(-1)[0],
    "empty": lambda x, n: x[:0],
    "shorter": lambda x, n: x[:-1],
    "longer": lambda x, n: np.concatenate([x, x[-1:]]),
    "narrow": lambda x, n: x[..., :-1],
    "reversed": lambda x, n: x[::-1],
    "nan": lambda x, n: put(x.astype(float), n, np.nan),
    "inf": lambda x, n: put(x.astype(float), n, np.inf),
    "huge": lambda x, n: put(x, n, 2**62),
    "negative": lambda x, n: put(x, n, -1),
    "zero": lambda x, n: put(x, n, 0),
    "large": lambda x, n: put(x, n, 300),
}


def put(x, n, value):
    x = x.copy()
    if x.size:
        x.reshape(-1)[n % x.size] = value
    return x


array_changes = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from(sorted(CHANGES)), st.integers(0, 999)),
    min_size=1,
    max_size=2,
)


def changed_arrays(arrays, changes):
    out = dict(arrays)
    for field, change, number in changes:
        name = sorted(arrays)[field % len(arrays)]
        if out.get(name) is not None:
            with (
                np.errstate(all="ignore"),
                contextlib.suppress(Exception),
            ):  # NumPy has no such array
                out[name] = CHANGES[change](out[name], number)
    return {name: np.asarray(x) for name, x in out.items() if x is not None}


@drawn(60, name=st.sampled_from(["qm7b", "md17"]), changes=array_changes)
def test_arrays_of_other_kinds(name, changes):
    """Nothing is rounded, cut or read as something else on the way in."""
    whole = files.qm7b_arrays() if name == "qm7b" else files.md17_arrays()
    given = changed_arrays(whole, changes)
    path = files.folder() / f"{name}_changed.npz"
    np.savez(path, **given)
    found = read(lambda: load_npz(name, path))
    if found is None:
        return
    molecules = found.molecules
    if name == "qm7b":
        assert len(found) == len(given["ptr"]) - 1 == len(given["y"])
        assert np.array_equal(molecules.ptr.numpy(), given["ptr"])
        z, pos = given["z"], given["pos"] * 0.52917721067
    else:
        assert len(found) == len(given["R"]) == given["E"].size
        z, pos = np.tile(given["z"], len(found)), given["R"].reshape(-1, 3)
        energy = given["E"].reshape(-1).astype(float)
        assert np.allclose(molecules.y[:, 0].numpy(), energy * 0.0433641, rtol=1e-4)
    assert np.array_equal(molecules.z.numpy(), z), "other elements"
    assert np.allclose(molecules.pos.numpy(), np.asarray(pos, float), rtol=1e-6)


def load_npz(name, path):
    options = {} if name == "qm7b" else {"train": 5, "val": 2}
    return load(name, path, **options)


def same(found, wanted):
    fields = ("z", "pos", "ptr", "y", "forces", "coefficients")
    pairs = ((getattr(found.molecules, f), getattr(wanted.molecules, f)) for f in fields)
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs), "other numbers"


@drawn(80, name=st.sampled_from(["qm7b", "md17"]), steps=binary_damages, text=st.booleans())
def test_damaged_npz(name, steps, text):
    """Archives have checksums: what is read without an error is what was written."""
    arrays = files.qm7b_arrays() if name == "qm7b" else files.md17_arrays()
    data = files.npz(arrays)
    path = files.folder() / f"{name}_damaged.npz"
    path.write_bytes(data)
    with quiet():
        wanted = load_npz(name, path)
    path.write_bytes(in_headers(data, steps) if text else damaged(data, steps))
    found = read(lambda: load_npz(name, path))
    if found is not None:
        same(found, wanted)


def in_headers(data, steps):
    """Damage to the descriptions of the arrays: types, orders, shapes."""
    old, new = [
        (b"<f8", b"<f4"),
        (b"<i8", b"<i4"),
        (b"<f8", b">f8"),
        (b"<i8", b"<u8"),
        (b"False", b"True "),
        (b"(12, 14)", b"(12, 7) "),
        (b"(12, 3, 3)", b"(6, 3, 3) "),
        (b"(12,)", b"(6,) "),
        (b"(13,)", b"(7,) "),
        (b"'<f8'", b"'|O' "),
        (b"3)", b"2)"),
        (b"'shape': (", b"'shape': (9999999999,"),
    ][steps[0][1] % 12]
    at = [i for i in range(len(data)) if data.startswith(old, i)]
    if not at:
        return data
    place = at[steps[-1][1] // 12 % len(at)]
    return data[:place] + new + data[place + len(old) :]


@drawn(40, steps=binary_damages, whole=st.booleans())
def test_damaged_lists_of_torch(steps, whole):
    data = files.pt(files.data_list("qmugs"))
    path = files.folder() / "qmugs.pt"
    path.write_bytes(data)
    with quiet():
        wanted = load("qmugs", path, cache=False)
    path.write_bytes(damaged(data, steps))
    found = read(lambda: load("qmugs", path, cache=False))
    if found is not None:
        same(found, wanted)


ITEMS = [
    None,
    3,
    "text",
    [],
    {},
    {"z": 1},
    [1, 2],
    (),
    torch.zeros(3),
    torch.zeros(0),
    {"z": torch.zeros(2), "pos": torch.zeros(2, 3), "y": torch.zeros(21)},
]
FIELDS = [
    None,
    3,
    "text",
    torch.zeros(0),
    torch.tensor(1.0),
    torch.tensor([6.5]),
    torch.full((5,), 2**62),
    torch.zeros(5, 3, dtype=torch.complex64),
    torch.zeros(5, 3).to_sparse(),
    torch.zeros(5, 3, device="meta"),
    torch.full((5, 3), torch.nan),
    torch.zeros(5, 3, dtype=torch.bfloat16),
    torch.tensor([True] * 5),
    torch.full((21,), torch.inf),
    torch.zeros(20),
]


@drawn(
    50,
    name=st.sampled_from(["qm8", "qm9", "qmugs"]),
    item=st.integers(0, 12),
    field=st.sampled_from(["", "whole", "z", "pos", "y"]),
    value=st.integers(0, 99),
)
def test_lists_of_torch_with_other_contents(name, item, field, value):
    given = [dict(x) for x in files.data_list(name)]
    if field == "whole":
        given = ITEMS[value % len(ITEMS)]
    elif item < len(given) and field:
        given[item][field] = FIELDS[value % len(FIELDS)]
    elif item < len(given):
        given[item] = ITEMS[value % len(ITEMS)]
    names = {"qm8": "QM8_3D_torch_geometric.pt", "qm9": "data_v3.pt", "qmugs": "qmugs.pt"}
    path = files.folder() / names[name]
    path.write_bytes(files.pt(given))
    found = read(lambda: load(name, path, cache=False))
    if found is None:
        return
    assert len(found) == len(given) and found.molecules.y.isfinite().all()
    for i, one in enumerate(given):
        rows = slice(*found.molecules.ptr[i : i + 2].tolist())
        assert torch.equal(found.molecules.z[rows].double(), one["z"].double()), "other elements"


@drawn(40, steps=binary_damages, split=st.booleans())
def test_damaged_databases(steps, split):
    """A database has no checksums, but it never loses a molecule without a word."""
    place = files.folder() / "oe62"
    place.mkdir(exist_ok=True)
    stated = {"dataset_OE62_all.db": files.database(), "split_5_1_2_0.npz": files.oe62_split()}
    name = list(stated)[split]
    for file, data in stated.items():
        (place / file).write_bytes(damaged(data, steps) if file == name else data)
    found = read(lambda: load("oe62", place, cache=False))
    if found is not None:
        assert len(found) == 8
    copy = place / "copy.db"
    copy.write_bytes((place / "dataset_OE62_all.db").read_bytes())
    frames = read(lambda: read_molecules(copy))
    assert frames is None or len(frames) == 8


@drawn(25, steps=binary_damages, text=st.booleans())
def test_damaged_caches(steps, text):
    """What is kept beside a file is made anew where it is damaged."""
    place = files.folder() / "cached"
    place.mkdir(exist_ok=True)
    for file, data in files.qm8_files().items():
        if not (place / file).exists():
            (place / file).write_bytes(data)
    cache = place / "qm8.sdf.cache.npz"
    with quiet():
        cache.unlink(missing_ok=True)
        wanted = load("qm8", place)
        data = cache.read_bytes()
        cache.write_bytes(in_headers(data, steps) if text else damaged(data, steps))
        same(load("qm8", place), wanted)


@drawn(
    40,
    steps=damages,
    name=st.sampled_from(
        ["m.pdb", "m.cif", "m.json", "m.gro", "m.vasp", "m", "m.txt", "m.traj", "m.xyz.gz", "m.com"]
    ),
    source=st.sampled_from(["xyz", "extxyz", "sdf", "db"]),
)
def test_other_formats_by_their_names(steps, name, source):
    """Whatever ASE makes of a file, it comes out as molecules or as an error of ours."""
    data = {"sdf": files.sdf_file, "db": files.database}.get(
        source, lambda: files.xyz_file(source)
    )()
    path = files.folder() / name
    path.write_bytes(damaged(data, steps))
    found = read(lambda: read_molecules(path))
    assert found is None or (found and all(len(x) for x in found))


def test_records_of_lines():
    """The counting of ``files`` agrees with the readers on what is not damaged."""
    path = files.folder() / "whole.sdf"
    path.write_bytes(files.sdf_file())
    assert len(list(sdf.blocks(lines(path)))) == len(files.said_by_sdf(files.sdf_file())) == 4
    for format in ("xyz", "extxyz"):
        assert len(files.said_by_xyz(files.xyz_file(format))) == 4
    assert len(files.said_by_csv(files.qm9_files()["gdb9.sdf.csv"])) == 8
