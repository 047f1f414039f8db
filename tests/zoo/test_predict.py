"""Files of molecules, tables, and checkpoints that are none."""

import io

import ase.io
import pytest
import torch
from ase import Atoms
from tools import tiny

from attnpool_kernels.zoo import molecule_files, predict, tables
from attnpool_kernels.zoo.molecules import Molecules, Target
from attnpool_kernels.zoo.task import PoolingTask

WATER = Atoms("OH2", [[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
METHANE = Atoms(
    "CH4",
    0.6 * torch.tensor([[0, 0, 0], [1, 1, 1], [-1, -1, 1], [1, -1, -1], [-1, 1, -1]]).double(),
)


@pytest.fixture
def task():
    made = PoolingTask("schnet", tiny.SCHNET, "abp", tiny.ABP, targets=["a", "b"])
    made.targets = (Target("a", "eV"), Target("b", "D"))
    made.model.set_statistics(torch.tensor([-1e5, 0.0]), torch.tensor([2.0, 1.0]))
    made.elements = [1, 6, 8]
    return made.eval()


@pytest.mark.parametrize("name", ["m.xyz", "m.extxyz", "m.sdf"])
def test_every_molecule_of_a_file(tmp_path, name):
    path = tmp_path / name
    if name == "m.sdf":
        text = io.StringIO()
        for atoms in (WATER, METHANE, WATER):
            ase.io.write(text, atoms, format="sdf")
        path.write_text(text.getvalue())
    else:
        ase.io.write(path, [WATER, METHANE, WATER], format="xyz" if name == "m.xyz" else "extxyz")
    found = molecule_files.read_molecules(path)
    assert [a.get_chemical_formula() for a in found] == ["H2O", "CH4", "H2O"]
    assert abs(found[1].positions - METHANE.positions).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xyz", "", "a.xyz is empty"),
        ("a.xyz", "\n \n", "a.xyz is empty"),
        ("a.xyz", "3\nwater\nO 0 0 0\nH 0 0 1\n", "a.xyz cannot be read"),
        ("a.xyz", "1\n\nXx 0 0 0\n", "cannot be read|has X"),
        ("a.xyz", "hello\n", "a.xyz cannot be read"),
        ("a.xyz", "1\n\nH 0 0 nan\n", "positions of molecule 0 must be finite"),
        (
            "a.xyz",
            '1\nLattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3\nH 0 0 0\n',
            "molecule 0 is periodic",
        ),
        (
            "a.sdf",
            "x\n\n\n  0  0  0  0  0  0  0  0  0  0999 V2000\nM  END\n$$$$\n",
            "molecule 0 has no atoms",
        ),
        ("a.sdf", "hello\n", "a.sdf cannot be read"),
    ],
)
def test_files_that_cannot_be(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        predict.check_elements(molecule_files.read_molecules(path), [1])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="file must exist"):
        molecule_files.read_molecules(tmp_path / "no.xyz")


def test_elements_the_model_has_not_seen():
    frames = [WATER, Atoms("CH3Br", torch.rand(5, 3))]
    with pytest.raises(ValueError, match=r"molecule 1 \(CH3Br\) has Br; .* trained on H, C, O"):
        predict.check_elements(frames, [1, 6, 8])
    predict.check_elements(frames, [1, 6, 8, 35])


def test_table(task):
    frames = [WATER, METHANE, WATER, METHANE, WATER]
    values = predict.predicted(task, frames, batch_size=2)
    alone = torch.cat([task(Molecules.from_ase([a])) for a in frames]).detach()
    torch.testing.assert_close(values, alone, rtol=1e-6, atol=1e-5)
    table = tables.Csv(task)
    rows = table.rows(frames, values, first=7)
    assert rows[1][:3] == ["8", "CH4", "5"]
    assert abs(float(rows[1][3]) - float(values[1, 0])) < 1e-2
    assert table.head == "molecule,formula,atoms,a [eV],b [D]\n"
    lines = tables.aligned([table.columns, *rows]).splitlines()
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1
    assert tables.aligned([["a", "name"], ["1.5", "x"]]) == "  a  name\n1.5  x\n"


def test_checkpoints_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="a file or the folder of a run"):
        predict.load_task(tmp_path / "no.ckpt")
    with pytest.raises(FileNotFoundError, match=r"must have a best.ckpt, got the folder"):
        predict.load_task(tmp_path)
    path = tmp_path / "best.ckpt"
    for content in (b"", b"hello", b"PK\x03\x04 and no more"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"best\.ckpt is damaged or no checkpoint"):
            predict.load_task(tmp_path)
    torch.save({"state_dict": {}, "epoch": 1}, path)
    with pytest.raises(ValueError, match="of another program: it has no hyper_parameters, zoo"):
        predict.load_task(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="of another program"):
        predict.load_task(tmp_path)


class Command:
    def __reduce__(self):
        return (print, ("code of a checkpoint ran",))


def test_checkpoints_run_no_code(tmp_path, capsys):
    path = tmp_path / "best.ckpt"
    torch.save({"zoo": Command()}, path)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        predict.load_task(path)
    assert "ran" not in capsys.readouterr().out


def test_weights_of_another_model(tmp_path, task):
    path = tmp_path / "best.ckpt"
    zoo = {"targets": [["a", "eV"], ["b", "D"]], "elements": [1], "data": {}}
    good = {"zoo": zoo, "hyper_parameters": dict(task.hparams), "state_dict": task.state_dict()}
    torch.save(good, path)
    found = predict.load_task(path)
    assert found.targets == task.targets and found.elements == [1] and not found.training
    for options in ({"pooling": "sum", "pooling_options": {}}, {"targets": ["a"]}, {"nix": 1}):
        torch.save(good | {"hyper_parameters": good["hyper_parameters"] | options}, path)
        with pytest.raises(ValueError, match="another model"):
            predict.load_task(path)
