"""What ``tests/fuzz`` found in the readers, case by case; see ``tests/LEDGER.md``."""

import io
import sqlite3
import zipfile

import ase.db
import numpy as np
import pytest
import torch
from tools import small, tiny

from attnpool_kernels.zoo import predict, sdf, xyz
from attnpool_kernels.zoo.datasets import load, qm9, structures
from attnpool_kernels.zoo.datasets.files import Folder
from attnpool_kernels.zoo.molecule_files import read_molecules
from attnpool_kernels.zoo.task import PoolingTask

pytest.importorskip("torch_geometric")

# Python reads the first two as 10 and the third as 12.
ODD_NUMBERS = ["1_0", "1_0.0", "１２"]


@pytest.mark.parametrize("number", ODD_NUMBERS)
@pytest.mark.parametrize("comment", ["water", "Properties=species:S:1:pos:R:3"])
def test_numbers_that_only_python_reads_in_xyz(number, comment):
    frame = ["2\n", f"{comment}\n", "O 0 0 0\n", f"H 0 0 {number}\n"]
    with pytest.raises(ValueError, match="line 4 must be an atom"):
        xyz.read(frame)


@pytest.mark.parametrize("columns", ["62910000", "4", "6_2910000"])
def test_properties_of_more_columns_than_there_are(columns):
    """ASE makes room for all of them, 10 GB, and runs for minutes before it sees that."""
    rows = ["O 0 0 0\n", "H 0 0 1\n"]
    good = ["2\n", "Properties=species:S:1:pos:R:3 time=12:30:45\n", *rows]
    assert len(xyz.read(good)) == 1
    for quote in ("", '"'):
        comment = f"Properties={quote}species:S:1:pos:R:{columns}{quote}\n"
        with pytest.raises(ValueError, match="line 2 must be a comment whose Properties"):
            xyz.read(["2\n", comment, *rows])


@pytest.mark.parametrize("number", ODD_NUMBERS)
def test_numbers_that_only_python_reads_in_sdf(number):
    def lines(z, counts="  2  1", bond="  1  2  1"):
        atoms = ["    0.0000    0.0000    0.0000 O   0  0", f"    0.0    0.0    {z} H   0  0"]
        return ["", "", "", f"{counts}  0  0  0 V2000", *atoms, bond, "M  END"]

    assert len(sdf.parsed(sdf.Block(1, lines("1.0"), True)).z) == 2
    for wrong, line in (
        (lines(number), 6),
        (lines("1.0", counts="0_2  1"), 4),
        (lines("1.0", bond="  1  21_0"), 7),
    ):
        with pytest.raises(ValueError, match=f"line {line} must be"):
            sdf.parsed(sdf.Block(1, wrong, True))


@pytest.mark.parametrize("cell", ODD_NUMBERS)
def test_numbers_that_only_python_reads_in_tables(tmp_path, cell):
    path = tmp_path / "m.csv"
    path.write_text(f"name,a,b\ngdb_1,1,2\ngdb_2,{cell},2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="not a number in line 3"):
        structures.table(path)


@pytest.mark.parametrize(
    "rows",
    [
        '"gdb_1,1,2\ngdb_2",1,2\n',
        'gdb_1,1,"2\ngdb_2,1,2\n',
        '"gdb_1"x,1,2\n',
        "a,1," + "9" * 200000,
    ],
    ids=["two rows in one", "open to the end", "text behind a quote", "a cell without end"],
)
def test_no_quote_hides_a_row_of_a_table(tmp_path, rows):
    path = tmp_path / "m.csv"
    path.write_text(f"name,a,b\n{rows}")
    with pytest.raises(ValueError, match=r"m.csv is no table, in line \d"):
        structures.table(path)


def test_the_list_of_molecules_to_leave_out_counts_from_1(tmp_path):
    path = tmp_path / "uncharacterized.txt"
    path.write_text("\n" * 9 + "0 x\n3 y\n")
    with pytest.raises(ValueError, match="from 1 on, got 0 in line 10"):
        qm9._uncharacterized(path)


def changed_header(path, old, new):
    """The archive with other descriptions of its arrays, and none of its checksums."""
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(("old", "new"), [(b"<f8", b"<f4"), (b"(40, 3, 3)", b"(20, 3, 3)")])
def test_an_array_whose_header_asks_for_less(tmp_path, old, new):
    """NumPy reads so many bytes and no more, and never comes to the checksum."""
    path = tiny.write_md17(tmp_path / "m.npz")
    changed_header(path, old, new)
    with pytest.raises(ValueError, match="is damaged: the checksum of"):
        load("md17", path, train=5, val=2)


def test_a_cache_whose_header_asks_for_less_is_made_anew(tmp_path):
    path = tmp_path / "source"
    path.write_text("x")
    built = []

    def build():
        built.append({"pos": np.arange(6.0)})
        return built[-1]

    for old, new in ((b"<f8", b"<f4"), (b"(6,)", b"(3,)"), (b"<f8", b"|O8")):
        Folder("name", "", path).cached(path, 1, build)
        count = len(built)
        found = Folder("name", "", path).cached(path, 1, build)
        assert len(built) == count and np.array_equal(found["pos"], np.arange(6.0))
        changed_header(path.with_name("source.cache.npz"), old, new)
        found = Folder("name", "", path).cached(path, 1, build)
        assert len(built) == count + 1 and np.array_equal(found["pos"], np.arange(6.0))


def in_kind(x, kind):
    return x.astype(np.int64).astype(kind)


def cases_of_arrays():
    z, pos, ptr, y = ["z", "pos", "ptr", "y"]
    yield z, lambda x: x + 0.5, "z of .* must be whole numbers"
    yield ptr, lambda x: x * 1.0 + 0.25 * (x == x[3]), "ptr of .* must be whole numbers"
    for name in (z, pos, ptr, y):
        yield name, lambda x: x.flat[0], f"{name} of .* must be an array, got one number"
        for kind in (np.complex128, "S5", bool, "M8[s]"):
            yield (
                name,
                lambda x, kind=kind: x.astype(np.int64).astype(kind),
                f"{name} of .* must be",
            )


@pytest.mark.parametrize(("name", "change", "message"), cases_of_arrays())
def test_arrays_that_are_no_real_numbers(tmp_path, name, change, message):
    path = tiny.write_qm7b(tmp_path / "qm7b.npz", 12)
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **arrays | {name: change(arrays[name])})
    with pytest.raises(ValueError, match=message):
        load("qm7b", path)


@pytest.mark.parametrize("name", ["R", "E", "F", "z"])
def test_trajectories_that_are_no_real_numbers(tmp_path, name):
    path = tiny.write_md17(tmp_path / "m.npz", 12)
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **arrays | {name: arrays[name] + 1j})
    with pytest.raises(ValueError, match=f"{name} of .* must be real numbers"):
        load("md17", path, train=5, val=2)


WRONG_FIELDS = [
    ("z", torch.tensor(1)),
    ("z", torch.full((5,), 6.5)),
    ("pos", torch.zeros(5, 3, dtype=torch.complex64)),
    ("pos", torch.zeros(5, 3, device="meta")),
    ("pos", torch.zeros(5, 3).to_sparse()),
    ("pos", torch.zeros(5, 3, dtype=torch.bfloat16)),
    ("y", torch.zeros(21, dtype=torch.bool)),
    ("y", 3),
]


def listed():
    y = torch.full((21,), -0.3)
    frames = [(torch.tensor(a.numbers), torch.tensor(a.positions)) for a in small.molecules(10)]
    return [{"z": z, "pos": pos, "y": y} for z, pos in frames]


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS)
def test_lists_of_torch_with_tensors_of_other_kinds(tmp_path, name, value):
    items = listed()
    items[0][name] = value
    torch.save(items, tmp_path / "q.pt")
    with pytest.raises(ValueError, match=r"q.pt"):
        load("qmugs", tmp_path / "q.pt")


def test_other_things_than_a_data_set_of_torch(tmp_path):
    for value in (torch.tensor(1.0), torch.zeros(3), {"z": 1}, 3, [torch.tensor(1)]):
        torch.save(value, tmp_path / "data_v3.pt")
        with pytest.raises(ValueError, match=r"data_v3.pt"):
            load("qm9", tmp_path / "data_v3.pt")


def flipped(path, member):
    """One bit of the data of a member of an archive."""
    with zipfile.ZipFile(path) as archive:
        (info,) = [x for x in archive.infolist() if x.filename.endswith(member)]
        wanted = archive.read(info)
    data = bytearray(path.read_bytes())
    data[data.index(wanted) + len(wanted) // 2] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_in_a_list_of_torch(tmp_path):
    path = tmp_path / "q.pt"
    torch.save(listed(), path)
    load("qmugs", path, cache=False)
    flipped(path, "data/1")
    with pytest.raises(ValueError, match="is damaged: the checksum of"):
        load("qmugs", path, cache=False)


@pytest.mark.parametrize(
    ("record", "member", "place", "message"),
    [
        (b"PK\x01\x02", b"q/data/1", 38, r"q/data/\d+ is marked as a folder"),
        (b"PK\x06\x07", b"", 16, "multiple disks"),
    ],
)
def test_a_flipped_bit_in_the_directory_of_an_archive(tmp_path, record, member, place, message):
    """torch reads nothing for a folder, and whatever memory held is a number then."""
    path = tmp_path / "q.pt"
    torch.save(listed(), path)
    data = bytearray(path.read_bytes())
    start = data.rindex(record, 0, data.rindex(member) if member else None)
    data[start + place] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"is damaged: .*{message}"):
        load("qmugs", path, cache=False)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as ``fit`` writes it, as far as ``load_task`` looks."""
    task = PoolingTask("schnet", tiny.SCHNET, "abp", tiny.ABP, targets=["energy", "homo"])
    found = {
        "zoo": {"targets": [["energy", "eV"], ["homo", "eV"]], "elements": [1, 8], "data": {}},
        "hyper_parameters": dict(task.hparams),
        "state_dict": task.state_dict(),
        "pytorch-lightning_version": "2.6",
    }
    torch.save(found, tmp_path / "a.ckpt")
    predict.load_task(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_a_flipped_bit_in_a_weight(checkpoint):
    """torch reads archives without their checksums: it would be a model of other predictions."""
    flipped(checkpoint, "data/3")
    with pytest.raises(ValueError, match="is damaged: the checksum of"):
        predict.load_task(checkpoint)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("zoo",), None),
        (("zoo",), {}),
        (("zoo", "targets"), None),
        (("zoo", "targets"), [["energy", "eV"]]),
        (("zoo", "targets"), [["energy", 3], ["homo", "eV"]]),
        (("zoo", "elements"), [1, "8"]),
        (("zoo", "elements"), 8),
        (("zoo", "data"), []),
        (("hyper_parameters",), [1]),
        (("hyper_parameters", "targets"), None),
        (("hyper_parameters", "backbone"), {}),
        (("hyper_parameters", "pooling_options"), 3),
        (("state_dict",), None),
        (("state_dict", "model.std"), 3),
        (("state_dict", "model.std"), torch.zeros(3)),
    ],
    ids=str,
)
def test_checkpoints_with_other_contents(checkpoint, path, value):
    found = torch.load(io.BytesIO(checkpoint.read_bytes()), weights_only=True)
    inside = found
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = value
    torch.save(found, checkpoint)
    with pytest.raises(ValueError, match=r"a.ckpt (holds|is a checkpoint of)"):
        predict.load_task(checkpoint)


def test_a_database_that_hides_a_row(tmp_path):
    """A page that counts a cell less: SQLite gives the others without a word."""
    path = tmp_path / "m.db"
    with ase.db.connect(path, type="db", use_lock_file=False) as file:
        for one in small.molecules(3):
            file.write(one)
    assert len(read_molecules(path)) == 3
    with sqlite3.connect(path) as database:
        query = "select rootpage from sqlite_master where name = 'systems'"
        (page,) = database.execute(query).fetchone()
        (size,) = database.execute("pragma page_size").fetchone()
    database.close()
    data, at = bytearray(path.read_bytes()), (page - 1) * size + 3
    assert data[at : at + 2] == b"\x00\x03"
    data[at + 1] = 2
    path.write_bytes(data)
    assert len(list(ase.db.connect(path, type="db", use_lock_file=False).select())) == 2
    with pytest.raises(ValueError, match="is a damaged database"):
        read_molecules(path)
    (tmp_path / "dataset_OE62_all.db").write_bytes(data)
    with pytest.raises(ValueError, match="is a damaged database"):
        load("oe62", tmp_path)
