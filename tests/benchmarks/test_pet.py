"""The study of PET: structures, the comparison before the clock, and a run at toy sizes."""

import pytest
import torch

pytest.importorskip("metatrain", reason="metatrain is not installed")
pytest.importorskip("ase")

from ase.neighborlist import neighbor_list

from benchmarks.measuring import memory, sheet
from benchmarks.studies import pet

TINY = {"d_pet": 16, "d_node": 16, "d_head": 8, "d_feedforward": 8, "num_heads": 2}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(pet, "HYPERS", dict(TINY))
    yield
    memory.stop()


@pytest.mark.parametrize("name", pet.WORKLOADS)
def test_structures(name):
    """As many atoms as the name says (or systems), none too near, and edges of the cutoff."""
    make, size, _ = pet.WORKLOADS[name]
    number = int("".join(c for c in name if c.isdigit()))
    found = make(size)
    assert number in (len(found), sum(map(len, found)))
    for atoms in found[:2]:
        assert neighbor_list("d", atoms, 1.5).min(initial=9.0) > 0.75


def test_padding_is_counted():
    batch = pet.load("copper256", warm=True)
    assert (batch.atoms, batch.types) == (4, [29])
    assert batch.edges / 4 <= batch.longest <= 42


def test_a_wrong_model_is_not_timed(monkeypatch):
    def other(model):
        with torch.no_grad():
            next(model.backend.gnn_layers.parameters()).mul_(1.1)
        return model

    monkeypatch.setattr(pet, "use_attnpool", other)
    monkeypatch.setitem(pet.WORKLOADS, "salt216", (pet.salt, 1, 1))
    rows = pet.run("salt216", "md", 0.1, 1, 60.0)
    assert {row.status for row in rows} == {"wrong"} and "forces differ by" in rows[0].reason


def test_a_run_and_its_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(pet.WORKLOADS, "molecules60", (pet.small_molecules, 3, 1))
    path = tmp_path / "pet.csv"
    options = ["--workloads", "molecules60", "--samples", "2", "--budget", "0.1"]
    options += ["--threads", "1", "--clock", "cpu"]
    assert pet.main([*options, "--output", str(path)]) == 0
    rows, runs = sheet.read(path)
    assert [(r.what, r.contender) for r in rows] == [
        (f"{what} step", contender) for what in pet.STEPS for contender in pet.CONTENDERS
    ]
    for row in rows:
        assert row.ok and row.samples >= 2 and row.error < 1e-4 and row.dim == 8
    assert "metatrain" in runs[0]["versions"] and str(tmp_path) not in path.read_text()
    assert "faster" in capsys.readouterr().out
    assert pet.main([*options, "--steps", "md", "--resume", "--output", str(path)]) == 0
    rows, runs = sheet.read(path)
    assert len(runs) == 2 and [r.run for r in rows] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "gold"], "got 'gold'"),
        (["--steps", "md,energy"], "got 'energy'"),
        (["--threads", "2", "--clock", "cpu"], "it needs --threads 1"),
        (["--budget", "0"], "--budget must be positive, got 0"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    assert pet.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_what_it_needs_is_said(monkeypatch, capsys):
    monkeypatch.setattr(pet, "version", lambda name: "")
    assert pet.main([]) == 2
    assert "this study needs metatrain: pip install metatrain" in capsys.readouterr().err
