"""Training of a backbone with a pooling in Lightning: ``PoolingTask`` with ``MoleculeData``.

::

    data = MoleculeData("qm7b", "qm7b.npz", targets=["homo_gw"], split=23887)
    task = PoolingTask("schnet", pooling="abp", targets=["homo_gw"])
    trainer = lightning.Trainer(use_distributed_sampler=False, callbacks=[...])
    trainer.fit(task, data)

The loss is taken of targets divided by their standard deviation over the molecules to train on;
every reported error is in the unit of its target.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, SumMetric

from .data import Batch, MoleculeData
from .model import PooledModel
from .molecules import Molecules, Target
from .schedules import SCHEDULES, Cosine, carry_over, checked_options

__all__ = ["MoleculeData", "PoolingTask"]

LOSSES = {"l1": torch.abs, "mse": torch.square}


class Errors(torch.nn.Module):
    """Loss and errors over all molecules of all processes since the last ``compute``."""

    def __init__(self, targets: int) -> None:
        super().__init__()
        # By default these leave NaN out. MeanMetric loses its weights where it does not.
        self.loss = SumMetric(nan_strategy="disable")
        self.molecules = SumMetric(nan_strategy="disable")
        self.mae = MeanAbsoluteError(num_outputs=targets)
        self.rmse = MeanSquaredError(squared=False, num_outputs=targets)
        self.forces = MeanAbsoluteError()
        self._in_float64()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Errors:
        super()._apply(fn, recurse)  # metrics follow ``.to(torch.bfloat16)``
        return self._in_float64()

    def _in_float64(self) -> Errors:
        for metric in self.children():
            assert isinstance(metric, Metric)
            metric.set_dtype(torch.float64)
        return self

    def update(self, batch: Batch, loss: Tensor, predicted: Tensor, forces: Tensor | None) -> None:
        molecules = batch.molecules
        assert molecules.y is not None
        self.loss.update(loss.detach() * batch.total)  # the loss is this process' part of a mean
        self.molecules.update(float(len(molecules)))
        self.mae.update(predicted, molecules.y)
        self.rmse.update(predicted, molecules.y)
        if forces is not None:
            assert molecules.forces is not None
            self.forces.update(forces, molecules.forces)

    def compute(self) -> dict[str, Tensor]:
        """loss [], molecules [], mae [T], rmse [T], and forces [] where there were any."""
        molecules = self.molecules.compute()
        found = {
            "loss": self.loss.compute() / molecules,
            "molecules": molecules,
            "mae": self.mae.compute().reshape(-1),
            "rmse": self.rmse.compute().reshape(-1),
        }
        if self.forces.update_called:
            found["forces"] = self.forces.compute()
        for metric in (self.loss, self.molecules, self.mae, self.rmse, self.forces):
            metric.reset()
        return found


class PoolingTask(LightningModule):
    r"""A pooled model, its loss and its errors.

    The loss is the mean of |Δ| ("l1") or Δ² ("mse") over molecules and targets,
    Δ = (prediction - target) / std. With ``forces``::

        energy_weight · loss of the energies + force_weight · loss of the forces

    where both are divided by the std of the energies, so that F = -∂E/∂r holds in the loss too.
    With pooling="orbital_weighted" (OWA)::

        coefficient_factor · mean Δ² + mean (a - coefficients)²

    where a are the weights of the atoms.

    Labels, mean and std, the last addition, the loss and the errors are float64 whatever the
    precision of the trainer: a total energy has more digits than a float32, what a network adds to
    it has not. With "bf16-true" a step of less than 1/512 of a weight is lost; "bf16-mixed" keeps
    the weights in float32. "16-true" is refused in training.

    A checkpoint resumes with the ``lr``, ``schedule`` and ``schedule_options`` of this object, not
    with those that it was written with, see ``schedules.carry_over``.

    Args:
        backbone: network that makes the atom vectors: schnet, schnetpack_schnet, dimenet,
            dimenet++, painn or esa.
        backbone_options: its options, as {name: value}.
        pooling: sum, mean, max, softmax, attentional, weighted, orbital_weighted, seed, abp or
            set_transformer.
        pooling_options: its options, as {name: value}.
        head: "molecule": what is pooled are atom vectors; "atom": atom predictions.
        targets: names of the targets, those of the data.
        lr: learning rate of Adam.
        loss: "l1" or "mse".
        schedule: of the learning rate: None, "plateau" (factor 0.8, patience 10, min_lr 1e-6;
            epochs without validation do not count) or "cosine" (to 0 over the epochs of the
            trainer).
        schedule_options: options of the schedule that differ from these.
        forces: train on forces too; there must be one target, the energy.
        energy_weight: of the loss of the energies.
        force_weight: of the loss of the forces.
        coefficient_factor: of the loss of the target beside that of the orbital coefficients.
        backend: None or the name of a backend for the attention, see ``explain``.
        atom_layers: widths of a perceptron between backbone and pooling; None: none.
        head_layers: hidden widths of the head; None: half of its input, twice.
    """

    def __init__(
        self,
        backbone: str = "schnet",
        backbone_options: dict[str, Any] | None = None,
        pooling: str = "abp",
        pooling_options: dict[str, Any] | None = None,
        head: str = "molecule",
        targets: Sequence[str] = (),
        *,
        lr: float = 1e-4,
        loss: Literal["l1", "mse"] = "l1",
        schedule: Literal["plateau", "cosine"] | None = None,
        schedule_options: dict[str, Any] | None = None,
        forces: bool = False,
        energy_weight: float = 0.01,
        force_weight: float = 0.99,
        coefficient_factor: float = 0.1,
        backend: str | None = None,
        atom_layers: Sequence[int] | None = None,
        head_layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if schedule is not None and schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if not targets:
            raise ValueError("targets must name at least one target, got none")
        if forces and len(targets) != 1:
            raise ValueError(f"targets must be one energy with forces, got {len(targets)} targets")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {lr}")
        for name, weight in (
            ("energy_weight", energy_weight),
            ("force_weight", force_weight),
            ("coefficient_factor", coefficient_factor),
        ):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
        targets = list(targets)
        self.save_hyperparameters()
        self.lr, self.loss, self.forces = lr, loss, forces
        self.energy_weight, self.force_weight = energy_weight, force_weight
        self.schedule = schedule
        self.schedule_options = checked_options(schedule, schedule_options or {}, lr)
        self.coefficient_factor = coefficient_factor
        pooling_options = dict(pooling_options or {})
        if backend is not None:
            pooling_options["backend"] = backend
        self.model = PooledModel.from_config(
            {
                "backbone": backbone,
                "backbone_options": dict(backbone_options or {}),
                "pooling": pooling,
                "pooling_options": pooling_options,
                "head": head,
                "targets": len(targets),
                "atom_layers": atom_layers,
                "head_layers": head_layers,
            }
        )
        for name in ("mean", "std", "atomref"):
            setattr(self.model, name, getattr(self.model, name).double())
        self.targets = tuple(Target(name, "") for name in targets)  # units come with the data
        self.elements: list[int] = []
        self.trained_on: dict[str, Any] = {}
        self.val_errors, self.test_errors = Errors(len(targets)), Errors(len(targets))
        self.results: list[dict[str, Any]] = []
        self.tested = 0  # molecules behind the results
        self._validated = False  # since the last epoch
        self._generators: dict[str, Tensor] | None = None  # of the checkpoint that is resumed

    def forward(self, molecules: Molecules) -> Tensor:
        """Predictions [B, T] in the units of the targets."""
        return self.model(molecules)

    def check(self, data: MoleculeData) -> None:
        """ValueError where the data are not those that the model and its loss need."""
        data.setup()
        given, wanted = ([t.name for t in x] for x in (data.targets, self.targets))
        if given != wanted:
            raise ValueError(
                f"targets of the data must be those of the model, {', '.join(wanted)}, "
                f"got {', '.join(given)}"
            )
        if self.forces and data.ready.forces is None:
            raise ValueError("forces must be in the data to train on them, got none")
        if self.weighs_orbitals and data.ready.coefficients is None:
            raise ValueError("coefficients must be in the data for orbital_weighted, got none")

    def setup(self, stage: str) -> None:
        data = self._datamodule()
        self.check(data)
        self.targets = data.targets
        if stage == "fit":
            mean, std = data.statistics
            self.model.set_statistics(mean, std, atoms=data.atoms)
            self.elements = data.elements

    @property
    def weighs_orbitals(self) -> bool:
        return self.hparams["pooling"] == "orbital_weighted"

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = self._predicted(batch)[0] * self.trainer.world_size  # gradients are averaged
        self.log(
            "train/loss",
            loss.detach(),
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=batch.total,
            sync_dist=True,
        )
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        self.val_errors.update(batch, *self._predicted(batch))

    def test_step(self, batch: Batch, index: int) -> None:
        self.test_errors.update(batch, *self._predicted(batch))

    def on_validation_epoch_end(self) -> None:
        found = self.val_errors.compute()
        self._validated = not self.trainer.sanity_checking
        self.log("val/loss", found["loss"], prog_bar=True, sync_dist=True)
        for target, error in zip(self.targets, found["mae"]):
            self.log(f"val/mae/{target.name}", error, sync_dist=True)
        if self.forces:
            self.log("val/mae/forces", found["forces"], sync_dist=True)

    def on_test_epoch_end(self) -> None:
        found = self.test_errors.compute()
        self.tested = int(found["molecules"])
        self.results = [
            {"target": t.name, "unit": t.unit, "mae": float(mae), "rmse": float(rmse)}
            for t, mae, rmse in zip(self.targets, found["mae"], found["rmse"])
        ]
        if self.forces:
            unit = f"{self.targets[0].unit}/Å"
            row: dict[str, Any] = {
                "target": "forces",
                "unit": unit,
                "mae": float(found["forces"]),
                "rmse": None,
            }
            self.results.append(row)
        for row in self.results:
            self.log(f"test/mae/{row['target']}", row["mae"], sync_dist=True)

    def _predicted(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """This process' share of the loss, predictions [B, T], and forces."""
        molecules = batch.molecules
        forces = weights = None
        if self.weighs_orbitals:
            predicted, weights = self.model.with_weights(molecules)
        elif self.forces:
            energy, forces = self.model.energy_and_forces(molecules, create_graph=self.training)
            predicted = energy[:, None]
        else:
            predicted = self.model(molecules)
        error = LOSSES["mse" if self.weighs_orbitals else self.loss]
        std = self.model.std
        loss = error((predicted - _given(molecules.y)) / std).sum() / (batch.total * len(std))
        if forces is not None:
            force_loss = error((forces - _given(molecules.forces)) / std).sum() / (3 * batch.atoms)
            loss = self.energy_weight * loss + self.force_weight * force_loss
        if weights is not None:
            share = (weights - _given(molecules.coefficients)).square().sum() / batch.atoms
            loss = self.coefficient_factor * loss + share
        return loss, predicted, forces

    def _datamodule(self) -> MoleculeData:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, MoleculeData):
            raise TypeError(f"datamodule must be a MoleculeData, got {type(data).__name__}")
        return data

    def configure_optimizers(self) -> Any:
        if self.trainer.precision == "16-true":
            raise ValueError(
                "precision must not be '16-true' to train: squares of small gradients are 0 in "
                "float16, and Adam divides by them; take '16-mixed' or 'bf16-true'"
            )
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr)
        if self.schedule is None:
            return optimizer
        if self.schedule == "plateau":
            if not self.trainer.limit_val_batches:
                raise ValueError(
                    "limit_val_batches must not be 0 with schedule='plateau', which follows the "
                    "validation loss"
                )
            plateau = ReduceLROnPlateau(optimizer, **self.schedule_options)
            # Never by Lightning: ``on_train_epoch_end`` does it.
            schedule = {"scheduler": plateau, "monitor": "val/loss", "frequency": sys.maxsize}
            return {"optimizer": optimizer, "lr_scheduler": schedule}
        epochs = self.trainer.max_epochs or -1
        if epochs < 1:
            raise ValueError("max_epochs must be given with schedule='cosine'")
        return {
            "optimizer": optimizer,
            "lr_scheduler": Cosine(optimizer, epochs, **self.schedule_options),
        }

    def on_train_start(self) -> None:
        if self._generators is not None:  # dropout goes on where it was
            _set_generators(self._generators, self.device)

    def on_train_epoch_end(self) -> None:
        # Lightning does this after the checkpoint of the epoch, which a resumed training would
        # lack, and in epochs without validation with a loss of earlier weights.
        schedule = self.lr_schedulers()
        if isinstance(schedule, ReduceLROnPlateau) and self._validated:
            schedule.step(self.trainer.callback_metrics["val/loss"])
        self._validated = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["zoo"] = {
            "targets": [[t.name, t.unit] for t in self.targets],
            "elements": list(self.elements),
            "data": self._datamodule().description,
            "generators": _generators(self.device),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = checkpoint["zoo"]
        self.targets = tuple(Target(name, unit) for name, unit in found["targets"])
        self.elements, self.trained_on = list(found["elements"]), dict(found["data"])
        self._generators = found.get("generators")  # older checkpoints have none
        carry_over(checkpoint, self.lr, self.schedule)


def _generators(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators of random numbers, by kind of device."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def _set_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _given(values: Tensor | None) -> Tensor:
    assert values is not None  # checked in ``setup``
    return values
