"""What a training may resume from, whether anything is left to do, and with which options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from .data import MoleculeData
from .schedules import changed, epochs_done
from .task import PoolingTask

# Options that make the model and its data: a training resumes with the same ones only.
MODEL = ["backbone", "backbone_options", "pooling", "pooling_options", "head", "targets", "forces"]
MODEL += ["atom_layers", "head_layers"]
DATA = ("dataset", "options", "split", "limit")
# Options that make its loss: the best model and early stopping compare losses before and after.
LOSS = ("loss", "energy_weight", "force_weight", "coefficient_factor")


def check_resumable(
    path: str, found: Mapping[str, Any], task: PoolingTask, data: MoleculeData
) -> None:
    """ValueError with what differs where a checkpoint is of another model, loss or other data."""
    there, here = dict(found["hyper_parameters"]), dict(task.hparams)
    described = data.description
    pairs = [(name, there.get(name), here.get(name)) for name in MODEL]
    pairs += [(name, found["zoo"]["data"].get(name), described[name]) for name in DATA]
    for kind, compared in (
        ("of another model", pairs),
        ("of another loss", [(name, there.get(name, here[name]), here[name]) for name in LOSS]),
    ):
        differences = [
            f"{name} is {old!r} there and {new!r} here"
            for name, old, new in compared
            if (old or None) != (new or None) and not (name == "split" and new is None)
        ]
        if differences:
            raise ValueError(f"{path} is the checkpoint {kind}: {'; '.join(differences)}")


def finished(
    found: Mapping[str, Any], trainer: Trainer, task: PoolingTask, patience: int
) -> str | None:
    """Why a training that resumes from a checkpoint has nothing to do, if that is so."""
    epochs, steps = epochs_done(found), found["global_step"]
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs:
        return f"{epochs} epochs are done, trainer.max_epochs is {trainer.max_epochs}"
    if 0 <= trainer.max_steps <= steps:
        return f"{steps} steps are done, max_steps is {trainer.max_steps}"
    waited = [x["wait_count"] for x in _states(found, "EarlyStopping")]
    if any(x >= max(1, patience) for x in waited) and not changed(found, task.lr, task.schedule):
        return (
            f"it stopped after {max(waited)} epochs without a better validation loss, patience is "
            f"{patience}"
        )
    return None


def _states(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """States of the callbacks of a class."""
    return [x for key, x in found.get("callbacks", {}).items() if key.split("{")[0] == name]


class Resume(Callback):
    """Lets the options of a resumed run act, and keeps its best model where the folder has moved.

    Lightning restores the patience of early stopping with its count, and forgets which model was
    the best where the path of the folder is another.
    """

    def __init__(self, folder: Path, own: bool, patience: int) -> None:
        self.folder, self.own, self.patience = folder, own, patience

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, PoolingTask)
        for state in _states(checkpoint, "EarlyStopping"):
            state["patience"] = self.patience
            if changed(checkpoint, pl_module.lr, pl_module.schedule):
                state["wait_count"] = 0  # the new rate has all the patience
        if not self.own:
            return  # the best model of another run is not in this folder
        for state in _states(checkpoint, "ModelCheckpoint"):
            state["dirpath"] = str(self.folder.resolve())
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[name] = self._here(state[name])
            state["best_k_models"] = {self._here(k): x for k, x in state["best_k_models"].items()}

    def _here(self, path: str) -> str:
        return str(self.folder.resolve() / Path(path).name) if path else path
