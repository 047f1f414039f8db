"""The benchmarks of whole models: a training step, and learning forces, at toy sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("torch_geometric")
pytest.importorskip("ase")

from ase.calculators.emt import EMT

from attnpool_kernels import Ragged
from attnpool_kernels.zoo.datasets import load
from benchmarks.measuring import memory, sheet
from benchmarks.studies import forces, poolings, training

TINY = poolings.SIZES["tiny"]


@pytest.fixture(scope="module", autouse=True)
def _stop_server():
    yield
    memory.stop()


@pytest.fixture(scope="module")
def data():
    return training.load(None, 12)


def test_molecules_have_the_sizes_of_qm7b(data, monkeypatch, tmp_path):
    monkeypatch.setattr(training.molecules, "QM7B", tmp_path / "none")
    without = training.load(None, 300)
    assert without.source == "QM7b sizes" and abs(np.mean(without.sizes) - 15.4) < 0.5
    for made in (data, without.first(12)):
        assert len(made.z) == len(made.pos) == len(made.forces) == sum(made.sizes)
        assert max(made.sizes) <= poolings.LONGEST
        for i, size in enumerate(made.sizes):
            pos = made.pos[made.batch == i]
            assert len(pos) == size
            assert torch.pdist(pos).min() > 0.7


@pytest.mark.parametrize("what", poolings.STEPS)
@pytest.mark.parametrize("name", [c.name for c in poolings.CONTENDERS.values() if c.like])
def test_equal_weights_give_equal_numbers(data, name, what):
    contender = poolings.CONTENDERS[name]
    if what not in contender.steps:
        pytest.skip("not in this step")
    error, wrong = training.compare(contender, TINY, what, data)
    assert wrong == "" and 0 < error < 1e-4


def test_padding_without_masks_is_noticed(data):
    """The original's padding is not the masked model: the gate tells them apart."""
    abp, original = (poolings.CONTENDERS[name] for name in ("abp", "abp_original"))
    _, wrong = training.compare(replace(abp, like=original.pool), TINY, "energy", data)
    assert "energy: relative difference" in wrong and "gradients" in wrong


def test_padded_pooling_ignores_other_molecules():
    torch.manual_seed(0)
    pool = poolings.PaddedABP(8, 16, heads=2, seeds=2).double()
    x = torch.randn(9, 8, dtype=torch.float64)
    alone = pool(x[:3], Ragged.from_counts([3]))
    torch.testing.assert_close(pool(x, Ragged.from_counts([3, 6]))[:1], alone)


def test_a_run_and_its_file(tmp_path, capsys):
    path = tmp_path / "training.csv"
    arguments = ["--steps", "tiny:energy", "--contenders", "abp,st_pyg", "--molecules", "6"]
    arguments += ["--budget", "0.1", "--samples", "2"]
    assert training.main([*arguments, "--output", str(path)]) == 0
    rows, runs = sheet.read(path)
    assert [(r.contender, r.what) for r in rows] == [
        ("abp", "energy step"),
        ("st_pyg", "energy step"),
    ]
    for row in rows:
        assert row.ok and row.samples >= 1 and 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.peak_bytes is None or row.peak_bytes > 100_000, row.contender
        assert row.peak_bytes or not memory.Mark().exact, row.reason
    assert runs[0]["options"]["command"] == "python -m benchmarks.studies.training"
    assert str(tmp_path) not in path.read_text()
    assert "molecules/s" in capsys.readouterr().out


def test_a_wrong_contender_is_not_timed(data, monkeypatch):
    wrong = replace(poolings.CONTENDERS["abp"], like=poolings.CONTENDERS["abp_original"].pool)
    monkeypatch.setitem(poolings.CONTENDERS, "abp", wrong)
    (row,) = training.run(TINY, "energy", ["abp"], data, 0.01, 10.0, 2, float("inf"))
    assert row.status == "wrong" and row.p50_ms is None and "relative difference" in row.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "huge:energy"], "got 'huge:energy'"),
        (["--steps", "tiny:forward"], "steps energy, force, got 'tiny:forward'"),
        (["--contenders", "mean"], "got 'mean'"),
        (["--molecules", "0"], "--molecules must be positive, got 0"),
    ],
)
def test_wrong_options_of_training(arguments, message, capsys):
    assert training.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    path = tmp_path_factory.mktemp("frames") / "ethanol.npz"
    np.savez(path, **forces.simulate("CH3CH2OH", EMT(), 20, every=4, settle=20))
    return path


def test_frames_are_those_of_md17(frames):
    """The file, read as MD17, gives the energies and forces of the calculator in eV and Å."""
    from ase.build import molecule

    data = load("md17", frames, train=10, val=5).molecules
    assert len(data) == 20 and data.z.tolist()[:9] == molecule("CH3CH2OH").numbers.tolist()
    atoms = molecule("CH3CH2OH")
    atoms.calc = EMT()
    atoms.positions = data.pos[data.batch == 7].numpy()
    assert data.y[7].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    np.testing.assert_allclose(data.forces[data.batch == 7], atoms.get_forces(), atol=1e-8)
    assert data.pos.view(20, -1).std(0).max() > 0.01  # it moves


def test_forces_are_learned(frames, tmp_path, capsys):
    path = tmp_path / "forces.csv"
    arguments = ["--data", str(frames), "--steps", "30", "--batch", "4", "--output", str(path)]
    assert forces.main(arguments) == 0
    rows, runs = sheet.read(path)
    assert str(tmp_path) not in path.read_text() and runs[0]["options"]["steps"] == 30
    error = {
        who: [r.error for r in rows if r.contender == who and "validation" in r.workload]
        for who in ("abp", "abp_reference")
    }
    assert error["abp"][-1] < 0.9 < error["abp"][0]  # of predicting no force
    np.testing.assert_allclose(error["abp"], error["abp_reference"], rtol=0.02)
    assert sum("test" in r.workload for r in rows) == 2
    assert "reference over ours" in capsys.readouterr().out


def test_wrong_options_of_forces(capsys):
    assert forces.main(["--frames", "10", "--batch", "10"]) == 2
    assert "--frames must be over 5/3 of --batch" in capsys.readouterr().err
    assert forces.main(["--minutes", "0"]) == 2
    assert "--minutes must be positive, got 0" in capsys.readouterr().err
