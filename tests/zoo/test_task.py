"""Batches, loss, errors and schedules of the training."""

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from tools import tiny

from attnpool_kernels.zoo.data import Batches
from attnpool_kernels.zoo.task import MoleculeData, PoolingTask


def task(**options):
    options = {
        "backbone_options": tiny.SCHNET,
        "pooling_options": tiny.ABP,
        "targets": ["energy"],
        "lr": 1e-3,
        **options,
    }
    return PoolingTask("schnet", **options)


def run(task, data, epochs=2, **options):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*LeafSpec")
        trainer.fit(task, data)
    return trainer


def order(data, epoch, rank=0, world=1):
    class At:
        seed = data.seed

    At.epoch = epoch
    batches = Batches(
        data.ready, data.parts["train"], data.batch_size, data=At, rank=rank, world=world
    )
    return list(batches), len(batches)


def test_every_epoch_has_its_own_order_and_all_molecules():
    data = MoleculeData(tiny.molecule_set(), batch_size=8, seed=3)
    first, count = order(data, 0)
    assert count == len(first) == 4 and [b.total for b in first] == [8, 8, 8, 4]
    y = [torch.cat([b.molecules.y for b in order(data, e)[0]]) for e in (0, 0, 1)]
    assert torch.equal(y[0], y[1]) and not torch.equal(y[0], y[2])
    wanted = data.ready.y[:28]
    assert all(torch.equal(a.sort(0)[0], wanted.sort(0)[0]) for a in y)
    data.seed = 4
    assert not torch.equal(torch.cat([b.molecules.y for b in order(data, 0)[0]]), y[0])


def test_processes_share_the_batches_of_one():
    data = MoleculeData(tiny.molecule_set(train=25), batch_size=8)
    whole, _ = order(data, 1)
    assert [b.total for b in whole] == [8, 8, 8, 1]
    shares = [order(data, 1, rank, 3)[0] for rank in range(3)]
    assert [len(s) for s in shares] == [3, 3, 3]  # the last would leave a process without any
    for batch, *parts in zip(whole, *shares):
        assert [len(p.molecules) for p in parts] == [3, 3, 2]
        assert all(p.total == batch.total and p.atoms == batch.atoms for p in parts)
        got = torch.cat([p.molecules.y for p in parts])
        assert torch.equal(got.sort(0)[0], batch.molecules.y.sort(0)[0])
    assert whole[0].atoms == len(whole[0].molecules.z)


def test_statistics_are_those_of_the_training_molecules():
    given = tiny.molecule_set()
    given.molecules.y[28:] += 1e6
    data = MoleculeData(given, targets=["homo"])
    data.setup()
    mean, std = data.statistics
    y = given.molecules.y[:28, 1].numpy()
    assert np.isclose(mean, y.mean()) and np.isclose(std, y.std())
    assert data.atoms == given.molecules.ptr[28] / 28
    assert [t.name for t in data.targets] == ["homo"] and data.elements == [1, 6, 8]


def spoiled(what):
    given = tiny.molecule_set()
    if what == "nan":
        given.molecules.y[2, 0] = torch.nan
    elif what == "constant":
        given.molecules.y[:28, 0] = 1.5
    elif what == "no test":
        given = tiny.molecule_set(val=12)
    return given


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("", {"targets": ["gap"]}, "target must be one of energy, homo, got 'gap'"),
        ("", {"split": 8}, "split seed must be one of 7, got 8"),
        ("", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("nan", {}, r"labels must be finite, got nan for energy of molecule 2 \(train\)"),
        ("constant", {}, "energy must differ between .* the same in all 28"),
        ("no test", {}, "split must have molecules to test on, got none"),
    ],
)
def test_data_that_cannot_be(given, options, message):
    def statistics():
        data = MoleculeData(spoiled(given), **options)
        data.setup()
        return data.statistics

    with pytest.raises(ValueError, match=message):
        statistics()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "huber"}, "loss must be one of l1, mse, got 'huber'"),
        ({"schedule": "step"}, "schedule must be one of plateau, cosine, got 'step'"),
        ({"targets": []}, "targets must name at least one"),
        ({"forces": True, "targets": ["a", "b"]}, "targets must be one energy .* got 2"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"pooling": "nix", "pooling_options": {}}, "pooling must be one of .* got 'nix'"),
        ({"backend": "nix"}, "nix"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_errors_are_those_of_the_predictions(loss):
    made, data = task(loss=loss, targets=["energy", "homo"]), MoleculeData(tiny.molecule_set())
    data.batch_size = 4  # 6 molecules for validation: batches of 4 and 2
    trainer = run(made, data)
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    given = data.ready.select(range(28, 34))
    with torch.no_grad():
        delta = made(given) - given.y
    mean, std = data.statistics
    wanted = (delta / std).abs() if loss == "l1" else (delta / std).square()
    assert found["val/loss"] == pytest.approx(float(wanted.mean()), rel=1e-5)
    for i, name in enumerate(("energy", "homo")):
        assert found[f"val/mae/{name}"] == pytest.approx(float(delta[:, i].abs().mean()), rel=1e-5)
    assert torch.equal(made.model.mean, mean) and torch.equal(made.model.std, std)
    trainer.test(made, data, verbose=False)
    given = data.ready.select(range(34, 40))
    with torch.no_grad():
        delta = (made(given) - given.y)[:, 1]
    row = made.results[1]
    assert row["target"] == "homo" and row["unit"] == "eV"
    assert row["mae"] == pytest.approx(float(delta.abs().mean()), rel=1e-5)
    assert row["rmse"] == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-5)


def test_training_lowers_the_loss():
    data = MoleculeData(tiny.molecule_set(), batch_size=8)
    made = task(lr=5e-3, pooling="sum", pooling_options={}, targets=["energy", "homo"])
    losses = [float(run(made, data, n).callback_metrics["train/loss"]) for n in (1, 30)]
    assert losses[1] < 0.7 * losses[0]


def test_forces_train_with_their_weight():
    data = MoleculeData(tiny.molecule_set(forces=True), targets=["energy"], batch_size=28)
    made = task(forces=True, loss="mse", energy_weight=0.2, force_weight=0.8)
    trainer = run(made, data, 1)
    (batch,) = data.train_dataloader()
    loss = made.train()._predicted(batch)[0]
    energy, forces = made.model.energy_and_forces(batch.molecules, create_graph=True)
    std = made.model.std
    of_energy = ((energy[:, None] - batch.molecules.y) / std).square().mean()
    of_forces = ((forces - batch.molecules.forces) / std).square().mean()
    wanted = 0.2 * of_energy + 0.8 * of_forces
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    got = torch.autograd.grad(loss, list(made.model.parameters()), allow_unused=True)
    want = torch.autograd.grad(wanted, list(made.model.parameters()), allow_unused=True)
    assert all((a is None) == (b is None) for a, b in zip(got, want))
    for a, b in zip(got, want):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    trainer.test(made, data, verbose=False)
    given = data.ready.select(range(34, 40))
    _, forces = made.model.energy_and_forces(given)
    mae = (forces - given.forces).abs().mean()
    assert made.results[1] == {
        "target": "forces",
        "unit": "eV/Å",
        "mae": pytest.approx(mae.item(), rel=1e-5),
        "rmse": None,
    }


def test_orbital_coefficients_train_the_weights():
    data = MoleculeData(tiny.molecule_set(), targets=["homo"], batch_size=28)
    made = task(pooling="orbital_weighted", pooling_options={}, targets=["homo"])
    run(made, data, 1)
    (batch,) = data.train_dataloader()
    wanted = made.model.orbital_loss(batch.molecules, factor=0.1)
    assert made._predicted(batch)[0].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_data_must_have_what_the_loss_needs():
    given = tiny.molecule_set()
    given.molecules.coefficients = None
    owa = task(pooling="orbital_weighted", pooling_options={})
    with pytest.raises(ValueError, match="forces must be in the data"):
        run(task(forces=True), MoleculeData(given, targets=["energy"]))
    with pytest.raises(ValueError, match="coefficients must be in the data"):
        run(owa, MoleculeData(given, targets=["energy"]))
    with pytest.raises(ValueError, match="must be those of the model, energy, got energy, homo"):
        run(task(), MoleculeData(given))


def test_total_energies_keep_their_digits():
    given = tiny.molecule_set(targets=("energy",))
    given.molecules.y -= 1e7
    data = MoleculeData(given)
    made = task()
    run(made, data, 1)
    with torch.no_grad():
        found = made(data.ready)
    assert found.dtype == torch.float64  # float32 has steps of 1 at 1e7
    assert (found + 1e7).abs().max() < 10 and len((found % 1).unique()) == len(found)


def test_schedules():
    data = MoleculeData(tiny.molecule_set(), targets=["energy"])
    options = {"patience": 0, "threshold": 1e9, "factor": 0.5}
    made = task(schedule="plateau", schedule_options=options)
    trainer = run(made, data, 4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**4)
    trainer = run(task(schedule="cosine"), data, 4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="max_epochs must be given with schedule='cosine'"):
        run(task(schedule="cosine"), data, -1)


def test_a_nan_is_not_left_out():
    given = tiny.molecule_set()
    data = MoleculeData(given, targets=["energy"], batch_size=4)
    made = task()
    run(made, data, 1)
    data.ready.pos[given.molecules.ptr[33]] = torch.nan  # in the last batch for validation
    made.model.backbone._check = lambda z, pos: None  # as on a GPU, where it is not seen
    found = run(made, data, 1).callback_metrics
    assert not bool(torch.as_tensor(float(found["val/loss"])).isfinite())
    assert not bool(torch.as_tensor(float(found["val/mae/energy"])).isfinite())
