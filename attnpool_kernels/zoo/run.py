"""The commands of ``python -m attnpool_kernels.zoo``: fit, test, predict.

The folder of a run holds ``config.yaml``, ``best.ckpt`` (by the validation loss), ``last.ckpt``,
``logs/version_N`` (metrics.csv and TensorBoard) and, once tested, ``test.csv``.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .data import MoleculeData
from .datasets.files import replacing
from .predict import (
    BEST,
    aligned,
    as_csv,
    check_elements,
    checkpoint_file,
    load_task,
    predicted,
    read_checkpoint,
    read_molecules,
    table,
)  # fmt: skip
from .task import PoolingTask

LAST = "last.ckpt"
# Options that make the model and its data: a training resumes with the same ones only.
MODEL = ("backbone", "backbone_options", "pooling", "pooling_options", "head", "targets", "forces")
DATA = ("dataset", "options", "split", "limit")
FIT_ONLY = {"max_epochs", "max_time", "accumulate_grad_batches", "gradient_clip_val"}


@dataclasses.dataclass
class TrainerOptions:
    """Lightning's Trainer.

    Args:
        accelerator: "auto", "cpu", "gpu", ...
        devices: processes, each with a device of its own; "auto": all that there are. Under
            torchrun: its number of processes. They share the batches of data.batch_size.
        strategy: "auto", "ddp", "ddp_find_unused_parameters_true", ...
        num_nodes: machines.
        max_epochs: -1: until early stopping.
        max_time: as DD:HH:MM:SS.
        accumulate_grad_batches: batches of a step of the optimizer.
        gradient_clip_val: largest norm of the gradient.
        progress: show a bar; null: where the output is a terminal, else a line per epoch.
        options: further options of lightning.pytorch.Trainer.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    strategy: str = "auto"
    num_nodes: int = 1
    max_epochs: int = -1
    max_time: str | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    progress: bool | None = None
    options: dict[str, Any] | None = None

    def make(self, **options: Any) -> Trainer:
        given = dataclasses.asdict(self)
        further = given.pop("options") or {}
        bar = given.pop("progress")
        bar = sys.stdout.isatty() if bar is None else bar
        callbacks = [*options.pop("callbacks", []), TQDMProgressBar() if bar else Lines()]
        given |= {
            "use_distributed_sampler": False,  # MoleculeData deals the molecules out
            "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
            "enable_progress_bar": bar, "callbacks": callbacks,
        }  # fmt: skip
        return Trainer(**given | options | further)


class Lines(Callback):
    """A line per epoch, where a progress bar would fill a file."""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = {k: f"{float(v):.5g}" for k, v in sorted(trainer.callback_metrics.items())}
        text = "  ".join(f"{name} {value}" for name, value in found.items())
        print(f"epoch {trainer.current_epoch}  {text}", flush=True)


class RunFolder(Callback):
    """Writes the configuration once model and data are known to be in order."""

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, config

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder / "config.yaml", self.config)


def write(path: Path, text: str) -> None:
    """The whole file or none."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fit(
    task: PoolingTask,
    data: MoleculeData,
    trainer: TrainerOptions,
    config: str = "",
    output: str | None = None,
    ckpt_path: str | None = None,
    patience: int = 10,
) -> Path:
    """Trains; returns the file of the best checkpoint.

    Args:
        task: the model.
        data: its molecules.
        trainer: how.
        config: text of all options.
        output: folder of the run; default runs/DATASET_BACKBONE_POOLING_SPLIT.
        ckpt_path: resume from this checkpoint; "last": the last one of the output folder.
        patience: stop after so many epochs without a better validation loss.
    """
    folder = Path(output or default_folder(task, data))
    if ckpt_path == "last":
        ckpt_path = str(folder / LAST)
    if ckpt_path is not None:
        check_resumable(ckpt_path, task, data)
    elif first_process() and any((folder / name).exists() for name in (BEST, LAST)):
        raise ValueError(
            f"output must be a new folder, got {folder} with a run in it; to resume that one: "
            "--ckpt_path last"
        )
    if not data.download or (trainer.devices, trainer.num_nodes) == (1, 1):
        # Before Lightning makes folders; with several processes only one may download.
        data.prepare_data()
        task.check(data)
        _ = data.statistics
    csv = CSVLogger(folder, name="logs")
    logs = [csv, TensorBoardLogger(folder, name="logs", version=csv.version)]
    stopping = EarlyStopping("val/loss", patience=patience, mode="min", check_finite=True)
    best = ModelCheckpoint(
        folder, filename=Path(BEST).stem, monitor="val/loss", mode="min",
        enable_version_counter=False, save_on_train_epoch_end=True,
    )  # fmt: skip
    last = ModelCheckpoint(  # of every epoch
        folder, filename=Path(LAST).stem, enable_version_counter=False, save_on_train_epoch_end=True
    )
    made = trainer.make(callbacks=[RunFolder(folder, config), stopping, best, last], logger=logs)
    made.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    loss = float(made.callback_metrics.get("val/loss", math.nan))
    if not math.isfinite(loss):
        raise ValueError(f"training ended with a validation loss of {loss}; a lower task.lr helps")
    if made.is_global_zero:
        found = read_checkpoint(folder / BEST)
        print(
            f"stopped after epoch {made.current_epoch - 1}; best by the validation loss: epoch "
            f"{found['epoch']} with {float(best.best_model_score or math.nan):.5g}, {folder / BEST}"
        )
    return folder / BEST


def default_folder(task: PoolingTask, data: MoleculeData) -> Path:
    hparams = task.hparams
    seed = "" if data.split_seed is None else f"_{data.split_seed}"
    name = data.dataset if isinstance(data.dataset, str) else data.dataset.name
    return Path("runs", f"{name}_{hparams['backbone']}_{hparams['pooling']}{seed}")


def first_process() -> bool:
    """Whether this is the process that writes, known before there are others."""
    return getattr(rank_zero_only, "rank", 0) == 0


def check_resumable(path: str, task: PoolingTask, data: MoleculeData) -> None:
    """ValueError with what differs where a checkpoint is of another model or other data."""
    found = read_checkpoint(path)
    there, here = dict(found["hyper_parameters"]), dict(task.hparams)
    pairs = [(name, there.get(name), here[name]) for name in MODEL]
    described = data.description
    pairs += [(name, found["zoo"]["data"].get(name), described[name]) for name in DATA]
    differences = [
        f"{name} is {old!r} there and {new!r} here"
        for name, old, new in pairs
        if (old or None) != (new or None) and not (name == "split" and new is None)
    ]
    if differences:
        raise ValueError(f"{path} is the checkpoint of another model: {'; '.join(differences)}")


def evaluate(
    trainer: TrainerOptions,
    ckpt_path: str,
    path: str | None = None,
    download: bool = False,
    batch_size: int = 128,
    output: str | None = None,
) -> list[dict[str, Any]]:
    """Tests; returns the errors of the targets, in their units.

    Args:
        trainer: how.
        ckpt_path: folder of a run, for its best checkpoint, or a checkpoint.
        path: file or folder of the data set; default: where it was in training.
        download: get the files of the data set from their source if they are missing.
        batch_size: molecules at a time.
        output: CSV file of the errors; default: test.csv beside the checkpoint.
    """
    file = checkpoint_file(ckpt_path)
    task = load_task(file)
    described = dict(task.trained_on)
    if path is not None:
        described["path"] = path
    data = MoleculeData(**described, download=download, batch_size=batch_size)
    made = trainer.make(logger=False, enable_checkpointing=False)
    made.test(task, data, verbose=False)
    if made.is_global_zero:
        target = Path(output) if output else file.with_name("test.csv")
        names = ("target", "unit", "mae", "rmse")
        shown = [[number(row[name]) for name in names] for row in task.results]
        print(f"{file}, {len(data.parts['test'])} molecules of {described['dataset']}, "
              f"split {described['split']}")  # fmt: skip
        print(aligned([list(names), *shown]), end="")
        count, rows = len(data.parts["test"]), [[row[n] for n in names] for row in task.results]
        with_file = [[*row, count, str(file)] for row in rows]
        write(target, as_csv([[*names, "molecules", "checkpoint"], *with_file]))
        print(f"written to {target}")
    return task.results


def number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def predict(
    file: str,
    ckpt_path: str,
    output: str | None = None,
    batch_size: int = 128,
    device: str = "cpu",
) -> None:
    """Writes a CSV table: a row per molecule, a column per target.

    Args:
        file: molecules as .xyz, extended xyz (several frames), SDF, or what else ASE reads.
        ckpt_path: folder of a run, for its best checkpoint, or a checkpoint.
        output: CSV file; default: print the table.
        batch_size: molecules at a time.
        device: "cpu", "cuda", ...
    """
    checkpoint = checkpoint_file(ckpt_path)
    task = load_task(checkpoint).to(device)
    frames = read_molecules(file)
    check_elements(frames, task.elements)
    text = as_csv(table(task, frames, predicted(task, frames, batch_size)))
    print(f"{checkpoint}, {len(frames)} molecules", file=sys.stderr)
    if output is None:
        print(text, end="")
    else:
        write(Path(output), text)
        print(f"written to {output}", file=sys.stderr)
