"""Tables of predictions: their formats, in parts, interrupted, and in constant memory."""

import csv
import io
import json
import tracemalloc
import warnings

import ase.io
import numpy as np
import pytest
import torch
from tools import tiny

from attnpool_kernels.zoo import __main__ as cli
from attnpool_kernels.zoo import predict, run, streaming, tables
from attnpool_kernels.zoo.molecules import Target
from attnpool_kernels.zoo.task import PoolingTask

COUNT = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint and a file of molecules."""
    folder = tmp_path_factory.mktemp("streaming")
    made = PoolingTask("schnet", tiny.SCHNET, "abp", tiny.ABP, targets=["energy", "homo"])
    made.targets = (Target("energy", "eV"), Target("homo", "eV"))
    made.elements = [1, 6, 8]
    zoo = {"targets": [["energy", "eV"], ["homo", "eV"]], "elements": [1, 6, 8], "data": {}}
    content = {"zoo": zoo, "hyper_parameters": dict(made.hparams)}
    torch.save(content | {"state_dict": made.state_dict()}, folder / "best.ckpt")
    ase.io.write(folder / "m.xyz", frames(), format="extxyz")
    return folder


def frames(count=COUNT):
    found = tiny.molecules(count)
    found.z[found.ptr[1:] - 1] = 1  # hydrogens that lack would be said
    parts = [slice(a, b) for a, b in zip(found.ptr[:-1], found.ptr[1:])]
    return [ase.Atoms(found.z[p].numpy(), found.pos[p].numpy()) for p in parts]


def values(place):
    return predict.predicted(predict.load_task(place), frames(), 8).numpy()


def written(path):
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["molecule"]) for r in rows] == list(range(len(rows)))
    return np.array([[float(r["energy [eV]"]), float(r["homo [eV]"])] for r in rows])


def test_every_format_has_the_same_numbers(place, tmp_path, capsys):
    wanted = values(place)
    for name in ("t.csv", "t.extxyz", "t.xyz"):
        run.predict(
            str(place / "m.xyz"), str(place), str(tmp_path / name), batch_size=8, part_size=16
        )
    np.testing.assert_allclose(written(tmp_path / "t.csv"), wanted, atol=1e-6)
    for name in ("t.extxyz", "t.xyz"):
        found = ase.io.read(tmp_path / name, index=":")
        assert [a.info["molecule"] for a in found] == list(range(COUNT))
        assert found[3].info["homo_unit"] == "eV"
        homo = [a.info["homo"] for a in found]
        np.testing.assert_allclose(homo, wanted[:, 1], atol=1e-6)
        energy = [a.get_potential_energy() if a.calc else a.info["energy"] for a in found]
        np.testing.assert_allclose(energy, wanted[:, 0], atol=1e-6)
    capsys.readouterr()
    run.predict(str(place / "m.xyz"), str(place), batch_size=8, part_size=16)
    assert capsys.readouterr().out == (tmp_path / "t.csv").read_text()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["t.csv", "t.extxyz", "t.xyz"]


def test_parquet(place, tmp_path):
    target = tmp_path / "t.parquet"
    try:
        import pyarrow.parquet
    except ImportError:
        assert cli.main(["predict", str(place / "m.xyz"), str(place), "--output", str(target)]) == 1
        return
    run.predict(str(place / "m.xyz"), str(place), str(target), batch_size=8, part_size=16)
    found = pyarrow.parquet.read_table(target).to_pydict()
    assert found["molecule"] == list(range(COUNT)) and found["formula"][0]
    np.testing.assert_allclose(found["homo [eV]"], values(place)[:, 1], atol=1e-6)


def test_parquet_needs_pyarrow(place, tmp_path, monkeypatch, capsys):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    argv = ["predict", str(place / "m.xyz"), str(place), "--output", str(tmp_path / "t.parquet")]
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "needs pyarrow: pip install pyarrow" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["t.json", "t", "no/t.csv"])
def test_outputs_that_cannot_be(place, tmp_path, name, capsys):
    argv = ["predict", str(place / "m.xyz"), str(place), "--output", str(tmp_path / name)]
    assert cli.main(argv) == (1 if "/" in name else 2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "output must" in err


def test_what_was_computed_is_not_computed_again(place, tmp_path, monkeypatch, capsys):
    target, sizes, fails = tmp_path / "t.csv", [], True
    given = (str(place / "m.xyz"), str(place), str(target))

    def counted(task, found, batch_size):
        sizes.append(len(found))
        if fails and len(sizes) == 4:
            raise RuntimeError("as if the power had failed")
        return predict.predicted(task, found, batch_size)

    monkeypatch.setattr(streaming, "predicted", counted)
    with pytest.raises(RuntimeError, match="the power"):
        run.predict(*given, batch_size=8, part_size=8)
    assert not target.exists()
    assert sorted(x.name for x in (tmp_path / "t.csv.parts").iterdir())[:3] == [
        "00000000",
        "00000001",
        "00000002",
    ]
    with pytest.raises(ValueError, match=r"of another prediction \(part_size differ\): remove it"):
        run.predict(*given, batch_size=8, part_size=16)
    fails, sizes[:] = False, []
    run.predict(*given, batch_size=8, part_size=8)
    assert sizes == [8, 8] and not (tmp_path / "t.csv.parts").exists()
    np.testing.assert_allclose(written(target), values(place), atol=1e-6)


def test_parts_say_what_they_are_of(place, tmp_path):
    parts = streaming.Parts(tmp_path / "t.csv")
    parts.claim({"file": "a"})
    parts.claim({"file": "a"})
    assert json.loads((parts.folder / "about.json").read_text()) == {"file": "a"}
    with pytest.raises(ValueError, match="file differ"):
        parts.claim({"file": "b"})


def test_memory_does_not_grow_with_the_file(place, tmp_path, monkeypatch):
    """Reading, parts and joining of 10 times as many molecules; the model itself is left out."""
    monkeypatch.setattr(
        streaming, "predicted", lambda task, found, size: torch.zeros(len(found), 2)
    )
    text, peaks = (place / "m.xyz").read_text(), []
    for times in (3, 3, 30):  # the first time imports what is needed
        (tmp_path / "m.xyz").write_text(text * times)
        tracemalloc.start()
        run.predict(str(tmp_path / "m.xyz"), str(place), str(tmp_path / "t.csv"), part_size=40)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 30 * COUNT + 1
    assert peaks[2] < 1.2 * peaks[1] + 50_000, peaks


def test_unwanted_molecules_are_not_parsed(place, monkeypatch):
    from attnpool_kernels.zoo import molecule_files, xyz

    numbers = []
    parsed = xyz.parsed
    monkeypatch.setattr(xyz, "parsed", lambda n, *rest: numbers.append(n) or parsed(n, *rest))
    found = list(molecule_files.MoleculeFile(place / "m.xyz", lambda number: number % 3 == 1))
    assert numbers == list(range(1, COUNT, 3)) and len(found) == COUNT
    assert [i for i, atoms in enumerate(found) if atoms is not None] == numbers


def test_charges_are_said_once_with_the_number_in_the_file(place, tmp_path):
    given = frames(20)
    for atoms in given[11:14]:
        atoms.info["charge"] = 1
    ase.io.write(tmp_path / "m.xyz", given, format="extxyz")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.predict(str(tmp_path / "m.xyz"), str(place), str(tmp_path / "t.csv"), part_size=4)
    [said] = [str(w.message) for w in found if "a charge" in str(w.message)]
    assert said.startswith("3 of 20 molecules state a charge or a spin (molecule 11: charge=1)")


def test_a_part_is_whole_or_not_there(place, tmp_path):
    table = tables.Csv(predict.load_task(place))
    with pytest.raises(AttributeError):
        table.write(tmp_path / "part", [None], torch.zeros(1, 2))
    assert not list(tmp_path.iterdir())
    assert table.text(frames(1), torch.zeros(1, 2), 5).startswith("5,")
    assert io.StringIO(table.head).readline().startswith("molecule,formula,atoms,")
