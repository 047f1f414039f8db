"""Large offsets beside small signals: energies near -2038 eV in every precision of a training."""

import functools
import warnings

import pytest
import torch
from ase import Atoms
from lightning.pytorch import Trainer
from tools import tiny

from attnpool_kernels.zoo import predict
from attnpool_kernels.zoo.data import Batch
from attnpool_kernels.zoo.model import PooledModel
from attnpool_kernels.zoo.molecules import Target
from attnpool_kernels.zoo.run import fit
from attnpool_kernels.zoo.tables import Csv
from attnpool_kernels.zoo.task import Errors, MoleculeData, PoolingTask
from attnpool_kernels.zoo.trainer import TrainerOptions

OFFSET = -2038.123456
PRECISIONS = ["bf16-true", "bf16-mixed", "32-true", "64-true"]


def energies(offset=OFFSET, **options):
    given = tiny.molecule_set(targets=("energy",), **options)
    given.molecules.y = 0.05 * given.molecules.y + offset
    return given


def task(**options):
    torch.manual_seed(0)
    options = {"pooling": "abp", "pooling_options": tiny.ABP, "lr": 1e-3, **options}
    return PoolingTask("schnet", tiny.SCHNET, targets=["energy"], **options)


def trained(precision, given, epochs=3, **options):
    made, data = task(**options), MoleculeData(given, batch_size=8)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision=precision,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(made, data)
    return made, data, trainer


EXTENSIVE = {"pooling": "sum", "pooling_options": {}, "head": "atom"}


@functools.cache
def in_float64(head):
    options = EXTENSIVE if head == "atom" else {}
    return trained("64-true", energies(), **options)[2].callback_metrics


@pytest.mark.parametrize("options", [{}, EXTENSIVE])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains_on_total_energies(precision, options):
    given = energies()
    made, data, trainer = trained(precision, given, **options)
    mean, std = data.statistics
    assert torch.equal(data.ready.y, given.molecules.y)
    wanted = mean / data.atoms if options else mean
    assert torch.equal(made.model.mean, wanted) and torch.equal(made.model.std, std)
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    truth = in_float64("atom" if options else "molecule")
    for name in ("train/loss", "val/loss", "val/mae/energy"):  # 0 where labels are rounded
        assert found[name] == pytest.approx(float(truth[name]), rel=0.03), name
    assert found["val/mae/energy"] == pytest.approx(found["val/loss"] * float(std), rel=1e-9)
    fresh = task(**options).to(made.dtype)  # an update is lost where it is small beside its weight
    pairs = list(zip(made.parameters(), fresh.parameters()))
    assert sum(not torch.equal(a, b) for a, b in pairs) > 0.8 * len(pairs)
    part = data.ready.select(data.parts["val"])
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        y = made(part)
    assert y.dtype == torch.float64
    error = (y - part.y).abs().mean()
    assert found["val/mae/energy"] == pytest.approx(float(error), rel=1e-9)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_forces_in_every_precision(precision):
    given = energies(forces=True)
    found = trained(precision, given, forces=True)[2].callback_metrics
    truth = trained("32-true", given, forces=True)[2].callback_metrics
    for name in ("val/loss", "val/mae/energy", "val/mae/forces"):
        assert float(found[name]) == pytest.approx(float(truth[name]), rel=0.05), name


def test_float16_weights_are_refused_in_training():
    with pytest.raises(ValueError, match="precision must not be '16-true' to train"):
        trained("16-true", energies())
    made, data, _ = trained("32-true", energies())
    for precision in ("16-true", "bf16-true", "32-true"):  # as weights to test they will do
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            precision=precision,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.test(made, data, verbose=False)
        mae = made.results[0]["mae"]
        if precision == "16-true":
            first = mae
        assert mae > 1e-3 and mae == pytest.approx(first, rel=0.05)
    assert made.tested == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_leave_the_statistics(dtype):
    model = PooledModel.from_config(
        {
            "backbone": "schnet",
            "backbone_options": tiny.SCHNET,
            "pooling": "abp",
            "pooling_options": tiny.ABP,
        }
    )
    std = torch.tensor([0.1])
    model.set_statistics(torch.tensor([OFFSET]), std)
    model.set_atomref(torch.linspace(-900.0, -13.6, 100)[:, None])
    given = tiny.molecules(6)
    wanted, kept = model(given), [model.mean.clone(), model.std.clone(), model.atomref.clone()]
    found = model.to(dtype)(given)
    assert next(model.parameters()).dtype == dtype and found.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(kept, (model.mean, model.std, model.atomref)))
    # Of the network's digits dtype keeps 1/256; of the offset float32 keeps 1e-4.
    assert float((found - wanted).detach().abs().max()) < 0.05 * float(std) + 2e-3
    assert model.double()(given).dtype == torch.float64
    assert model.float()(given).dtype == torch.float32
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as Lightning does where a model is made inside of it
    try:
        made = PooledModel.from_config(model.config)
    finally:
        torch.set_default_dtype(default)
    assert made.mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_errors_are_summed_in_float64(dtype):
    errors = Errors(1).to(dtype)
    for _ in range(300):  # a sum of bfloat16 stays at 256
        molecules = tiny.molecules(1, 1)
        batch = Batch(molecules, 1, len(molecules.z))
        errors.update(batch, torch.tensor(1.0), molecules.y + 1e-3, None)
    found = errors.compute()
    assert found["molecules"] == 300 and found["loss"] == 1
    for name in ("mae", "rmse"):
        assert float(found[name]) == pytest.approx(1e-3, rel=1e-9)
    errors.update(batch, torch.tensor(1.0), molecules.y + 1e-3, None)  # reset to float64 too
    assert float(errors.compute()["mae"]) == pytest.approx(1e-3, rel=1e-9)


def test_molecules_far_from_the_origin():
    """A simulation box of 10 µm: its float32 positions have steps of 8 mÅ."""
    near, far = energies(), energies()
    far.molecules.pos += torch.tensor([1e5, -1e5, 1e5])
    found = [trained("32-true", x)[2].callback_metrics["val/loss"] for x in (near, far)]
    assert float(found[1]) == pytest.approx(float(found[0]), rel=1e-5)


def test_equal_labels_are_not_taken_for_a_signal():
    given = energies()
    given.molecules.y[:28] = OFFSET
    assert given.molecules.y[:28, 0].std(correction=0) > 0  # rounding
    with pytest.raises(ValueError, match="energy must differ between the molecules to train on"):
        _ = MoleculeData(given).statistics


def test_checkpoint_and_table_keep_the_digits(tmp_path):
    options = TrainerOptions("cpu", max_epochs=1, options={"precision": "bf16-true"})
    data = MoleculeData(energies(), batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(task(), data, options, output=str(tmp_path / "run"))
    read = predict.load_task(tmp_path / "run")
    assert torch.equal(read.model.mean, data.statistics[0])
    read.targets = (Target("energy", "eV"),)
    read.model.std.fill_(1e-2)
    values = torch.tensor([[OFFSET], [-97000.12345678], [1.5]], dtype=torch.float64)
    rows = Csv(read).rows([Atoms("H2", [[0, 0, 0], [0, 0, 1]])] * 3, values)
    assert [row[3] for row in rows] == ["-2038.123456", "-97000.12345678", "1.5"]
