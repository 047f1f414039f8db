"""The study of where seeds look: kinds of atoms, weights and a picture, on molecules of ASE."""

import csv

import pytest
import torch

pytest.importorskip("torch_geometric")
pytest.importorskip("matplotlib")
pytest.importorskip("ase")

from ase.build import molecule

from attnpool_kernels.zoo.molecules import Molecules, MoleculeSet, Split, Target
from benchmarks.studies import orbitals

NAMES = ("CH3CH2OH", "C2H4", "CH4", "H2O", "CH3SH", "C6H6", "HCN", "C2H6", "NH3", "CH3CN")


def molecules(count=10):
    return Molecules.from_ase([molecule(NAMES[i % 10]) for i in range(count)])


def test_kinds_of_atoms():
    found, chosen = orbitals.kinds(molecules()), molecules()
    by_name = {
        name: sorted(found[a:b]) for name, a, b in zip(NAMES, chosen.ptr[:-1], chosen.ptr[1:])
    }
    four, fewer = orbitals.SATURATED, orbitals.UNSATURATED
    assert by_name["C2H6"] == [four] * 2 + ["H"] * 6
    assert by_name["C2H4"] == [fewer] * 2 + ["H"] * 4
    assert by_name["C6H6"] == [fewer] * 6 + ["H"] * 6
    assert by_name["CH3CN"] == [fewer, four, "H", "H", "H", "N"]
    assert by_name["CH3SH"] == [four, "H", "H", "H", "H", "S"]
    assert orbitals.neighbours(chosen.select([0])).sum() == 2 * 8


def test_enrichment_is_one_for_equal_weights():
    chosen = molecules()
    counts = chosen.ptr.diff()
    equal = (1 / counts.double())[chosen.batch]
    found = orbitals.enrichment(equal, orbitals.kinds(chosen), chosen)
    assert all(ratio == pytest.approx(1.0) for ratio, *_ in found.values())
    assert found["O"][1:] == (2, 2) and sum(atoms for _, atoms, _ in found.values()) == counts.sum()
    on_oxygen = torch.tensor([float(z == 8) for z in chosen.z])
    assert orbitals.enrichment(on_oxygen, orbitals.kinds(chosen), chosen)["O"][0] == 6  # (9 + 3)/2


def test_study(tmp_path):
    given = molecules(40)
    y = torch.stack([given.ptr.diff().double(), -given.ptr.diff().double()], 1)
    y = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    labelled = Molecules(given.z, given.pos, given.ptr, y)
    i = torch.arange(40)
    split = Split(i[:24], i[24:30], i[30:])
    targets = tuple(Target(name, "eV") for name in orbitals.TARGETS)
    data = MoleculeSet("ten", labelled, targets, {23887: split})
    arguments = ["--width", "8", "--epochs", "2", "--out", str(tmp_path)]
    options = orbitals.parser().parse_args(arguments)
    assert orbitals.study(options, data) == 0
    with open(tmp_path / "orbitals.csv", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert {r["target"] for r in rows} == set(orbitals.TARGETS) and len(rows) == 2 * 6
    for name in orbitals.TARGETS:  # shares of the weights add up
        mine = [r for r in rows if r["target"] == name]
        assert all(0 < float(r["looked_at"]) < 10 for r in mine)
        assert sum(int(r["atoms"]) for r in mine) == int(given.ptr[-1] - given.ptr[30])
    assert (tmp_path / "orbitals.png").stat().st_size > 10_000


def test_weights_of_a_molecule_add_up_to_one():
    from attnpool_kernels.zoo.model import PooledModel

    torch.manual_seed(0)
    sizes = {"hidden_channels": 8, "num_filters": 8, "num_interactions": 1}
    abp = {"hidden": 8, "heads": 2, "seeds": 3}
    model = PooledModel.from_config(
        {"backbone": "schnet", "backbone_options": sizes, "pooling": "abp", "pooling_options": abp}
    ).double()
    chosen = molecules(4)
    found = orbitals.looked_at(model, chosen)
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, chosen.batch, found)
    torch.testing.assert_close(sums, torch.ones(4, dtype=torch.float64))
    alone = torch.cat([orbitals.looked_at(model, chosen.select([i])) for i in range(4)])
    torch.testing.assert_close(found, alone)
