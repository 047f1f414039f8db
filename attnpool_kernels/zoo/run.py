"""The commands of ``python -m attnpool_kernels.zoo``: fit, test, predict.

The folder of a run holds ``config.yaml``, ``best.ckpt`` (by the validation loss), ``last.ckpt``,
``logs/version_N`` (metrics.csv and TensorBoard), ``versions.json`` (of each start: packages, commit
and a digest of the data) and, once tested, ``test.csv``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .checkpoints import alone_in, write_whole
from .data import MoleculeData
from .datasets.files import replacing
from .predict import BEST, checkpoint_file, load_task, read_checkpoint
from .provenance import provenance
from .ranks import ranks
from .resume import Resume, check_resumable, finished
from .streaming import Stream, to_file, to_stdout
from .tables import FORMATS, aligned, as_csv
from .task import PoolingTask
from .trainer import OptionError, TrainerOptions, check_validates, of_options

LAST, VERSIONS = "last.ckpt", "versions.json"
FIT_ONLY = {"max_epochs", "max_time", "accumulate_grad_batches", "gradient_clip_val"}


class RunFolder(Callback):
    """Writes configuration and versions once model and data are known to be in order."""

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, config

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if batches_of_a_trial(trainer):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder / "config.yaml", self.config)
        stated = self.folder / VERSIONS
        starts = []
        if stated.is_file():  # a run that resumes may do so with other versions
            with contextlib.suppress(ValueError):
                starts = json.loads(stated.read_text(encoding="utf-8"))
        starts.append(provenance(trainer.datamodule))  # type: ignore[attr-defined]
        write(stated, json.dumps(starts, indent=1) + "\n")


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
) -> Path | None:
    """Trains; returns the file of the best checkpoint, None where fast_dev_run keeps none.

    A training that resumes does so with the options given now, and the options are what its
    checkpoints and config.yaml say. Model, data and loss must be the same. ``trainer.max_epochs``
    are epochs in all. Another ``task.lr`` or ``task.schedule`` acts from there on, see
    ``schedules.carry_over``, and gives early stopping all of its patience again. Where nothing is
    left to do, it says so and does nothing.

    Args:
        task: the model.
        data: its molecules.
        trainer: how.
        config: text of all options.
        output: folder of the run; default runs/DATASET_BACKBONE_POOLING_SPLIT.
        ckpt_path: resume from this checkpoint; "last": the last one of the output folder.
        patience: stop after so many epochs with validation and without a better loss.
    """
    if patience < 0:
        raise OptionError(f"patience must be at least 0, got {patience}")
    if task.schedule is None and task.hparams["schedule_options"]:
        raise OptionError("schedule_options must be empty without a schedule")
    epochs = (trainer.options or {}).get("max_epochs", trainer.max_epochs)
    if task.schedule == "cosine" and epochs in (None, -1):
        raise OptionError(
            f"trainer.max_epochs must be given with task.schedule='cosine', got {epochs}"
        )
    folder = run_folder(task, data, output)
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"output must be a folder, got the file {folder}")
    with alone_in(folder) if first_process() else contextlib.nullcontext():
        return _fit(task, data, trainer, folder, config, ckpt_path, patience)


def _fit(
    task: PoolingTask,
    data: MoleculeData,
    trainer: TrainerOptions,
    folder: Path,
    config: str,
    ckpt_path: str | None,
    patience: int,
) -> Path | None:
    own = ckpt_path is not None and in_folder(ckpt_path, folder)
    if not own and first_process() and any((folder / name).exists() for name in (BEST, LAST)):
        raise ValueError(
            f"output must be a new folder, got {folder} with a run in it; to resume that one: "
            "--ckpt_path last"
        )
    csv = CSVLogger(folder, name="logs")
    logs = [csv, TensorBoardLogger(folder, name="logs", version=csv.version)]
    stopping = EarlyStopping(  # not strict: max_steps may end before the first validation
        "val/loss", patience=patience, mode="min", check_finite=True, strict=False
    )
    best = ModelCheckpoint(
        folder,
        filename=Path(BEST).stem,
        monitor="val/loss",
        mode="min",
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    last = ModelCheckpoint(  # of every epoch
        folder, filename=Path(LAST).stem, enable_version_counter=False, save_on_train_epoch_end=True
    )
    callbacks = [RunFolder(folder, config), Resume(folder, own, patience), stopping, best, last]
    made = trainer.make(callbacks=callbacks, logger=logs)
    check_validates(made)
    write_whole(made)
    steps = 0
    if ckpt_path is not None:
        ckpt_path = str(checkpoint_file(newest(folder) if ckpt_path == "last" else ckpt_path))
        found = read_checkpoint(ckpt_path)
        check_resumable(ckpt_path, found, task, data)
        done = finished(found, made, task, patience)
        if done:
            if made.is_global_zero:
                print(f"nothing left to do for {ckpt_path}: {done}")
            return folder / BEST
        steps = found["global_step"]
        if made.is_global_zero:
            say_what_changed(ckpt_path, dict(found["hyper_parameters"]), task)
    if not data.download or (trainer.devices, trainer.num_nodes) == (1, 1):
        # Before Lightning makes folders; with several processes only one may download.
        with of_options(ValueError):
            data.prepare_data()
            task.check(data)
            _ = data.statistics
    try:
        made.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    except (MisconfigurationException, ValueError) as error:
        if made.global_step == steps:  # nothing has been trained
            raise OptionError(str(error)) from error
        raise
    closing(made, best, folder / BEST, made.global_step - steps)
    return None if batches_of_a_trial(made) else folder / BEST


def closing(made: Trainer, best: ModelCheckpoint, file: Path, steps: int) -> None:
    """Says how a training of so many steps ended; ValueError where it gave no model."""
    loss = made.callback_metrics.get("val/loss")
    if loss is not None and not math.isfinite(loss):
        raise ValueError(
            f"training ended with a validation loss of {float(loss)}; a lower task.lr helps"
        )
    trial = batches_of_a_trial(made)
    if trial:
        if made.is_global_zero:
            print(f"fast_dev_run: tried {trial} of the batches of each kind; nothing is kept")
    elif loss is None and file.is_file():
        if made.is_global_zero:
            print(f"stopped after {steps} steps, before a validation; {file} is as it was")
    elif loss is None:
        raise ValueError(f"training stopped after {steps} steps, before the first validation")
    elif made.is_global_zero:
        score = math.nan if best.best_model_score is None else float(best.best_model_score)
        print(
            f"stopped after epoch {made.current_epoch - 1}; best by the validation loss: epoch "
            f"{read_checkpoint(file)['epoch']} with {score:.5g}, {file}"
        )


def batches_of_a_trial(trainer: Trainer) -> int:
    """0 where the training is not a trial."""
    return int(getattr(trainer, "fast_dev_run", 0))


def run_folder(task: PoolingTask, data: MoleculeData, output: str | None) -> Path:
    """The folder of a run, by default named by what it trains on what."""
    if output:
        return Path(output)
    hparams = task.hparams
    seed = "" if data.split_seed is None else f"_{data.split_seed}"
    name = data.dataset if isinstance(data.dataset, str) else data.dataset.name
    return Path("runs", f"{name}_{hparams['backbone']}_{hparams['pooling']}{seed}")


def in_folder(ckpt_path: str, folder: Path) -> bool:
    """Whether a run that resumes from this checkpoint is the one that wrote it."""
    path = Path(ckpt_path)
    return ckpt_path == "last" or folder.resolve() in (path.resolve(), path.resolve().parent)


def newest(folder: Path) -> Path:
    """The checkpoint to go on from: a run killed in its first epoch may have the best only."""
    return folder / (BEST if (folder / BEST).is_file() and not (folder / LAST).is_file() else LAST)


def say_what_changed(path: str, there: dict[str, Any], task: PoolingTask) -> None:
    """Prints the options of the learning rate that are not those of the checkpoint."""
    for name in ("lr", "schedule", "schedule_options"):
        old, new = there.get(name), task.hparams[name]
        if (old or None) != (new or None):
            print(f"{path} had task.{name} {old!r}; from here on it is {new!r}")


def first_process() -> bool:
    """Whether this is the process that writes, known before there are others."""
    return getattr(rank_zero_only, "rank", 0) == 0


def evaluate(
    trainer: TrainerOptions,
    ckpt_path: str,
    path: str | None = None,
    download: bool = False,
    batch_size: int = 128,
    output: str | None = None,
    trust_data: bool = False,
) -> list[dict[str, Any]]:
    """Tests; returns the errors of the targets, in their units.

    Args:
        trainer: how.
        ckpt_path: folder of a run, for its best checkpoint, or a checkpoint.
        path: file or folder of the data set; default: where it was in training.
        download: get the files of the data set from their source if they are missing.
        batch_size: molecules at a time.
        output: CSV file of the errors; default: test.csv beside the checkpoint.
        trust_data: let the checkpoint say that the data are pickles, whose loading can run code.
    """
    file = checkpoint_file(ckpt_path)
    task = load_task(file)
    if not trust_data:
        check_harmless(file, task.trained_on.get("options") or {})
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, got {batch_size}")
    check_output(output)
    described = dict(task.trained_on)
    if path is not None:
        described["path"] = path
    try:
        data = MoleculeData(**described, download=download, batch_size=batch_size)
    except TypeError as error:
        raise ValueError(f"{file} says of its data what cannot be: {error}") from error
    made = trainer.make(logger=False, enable_checkpointing=False)
    if not made.limit_test_batches:
        raise OptionError("limit_test_batches must not be 0: errors need molecules")
    with of_options(MisconfigurationException):
        made.test(task, data, verbose=False)
    if made.is_global_zero:
        target = Path(output) if output else file.with_name("test.csv")
        names = ("target", "unit", "mae", "rmse")
        shown = [[number(row[name]) for name in names] for row in task.results]
        print(
            f"{file}, {task.tested} molecules of {described['dataset']}, split {described['split']}"
        )
        print(aligned([list(names), *shown]), end="")
        rows = [[row[n] for n in names] for row in task.results]
        with_file = [[*row, task.tested, str(file)] for row in rows]
        write(target, as_csv([[*names, "molecules", "checkpoint"], *with_file]))
        print(f"written to {target}")
    return task.results


def check_harmless(file: Path, options: dict[str, Any]) -> None:
    """OptionError where a checkpoint, which may be anybody's, has its data loaded as pickles."""
    for name, harmless in (("weights_only", True), ("allow_pickle", False)):
        if options.get(name, harmless) is not harmless:
            raise OptionError(
                f"{file} asks for data.options.{name}={options[name]!r}, and loading such data can "
                "run code of whoever made them: --trust_data true does"
            )


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
    part_size: int = 1024,
) -> None:
    """Writes a table: a row per molecule, in the order of the file, a column per target.

    Memory does not grow with the file. Under torchrun the processes share the molecules out. What
    has been computed is kept in OUTPUT.parts until the table is whole, and the same command goes on
    from there after an interruption.

    Args:
        file: molecules as .xyz, extended xyz (several frames), SDF, or what else ASE reads.
        ckpt_path: folder of a run, for its best checkpoint, or a checkpoint.
        output: table, .csv, .extxyz (.xyz) or .parquet by its name; default: print it as CSV.
        batch_size: molecules at a time.
        device: "cpu", "cuda", ...; "cuda" under torchrun: a device for each process.
        part_size: molecules that are computed and kept together.
    """
    for name, value in (("batch_size", batch_size), ("part_size", part_size)):
        if value < 1:
            raise OptionError(f"{name} must be at least 1, got {value}")
    kind = FORMATS.get(Path(output or "stdout.csv").suffix.lower())
    if kind is None:
        raise OptionError(f"output must end with one of {', '.join(FORMATS)}, got {output}")
    check_output(output)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    checkpoint = checkpoint_file(ckpt_path)
    task = load_task(checkpoint).to(device)
    stream = Stream(Path(file), part_size, batch_size)
    with ranks() as own:
        if output is None:
            if own.world > 1:
                raise OptionError(f"output must be given with {own.world} processes")
            count = to_stdout(task, stream)
        else:
            count = to_file(task, checkpoint, stream, kind(task), Path(output), own)
        if own.first:
            print(f"{checkpoint}, {count} molecules", file=sys.stderr)
            if output is not None:
                print(f"written to {output}", file=sys.stderr)


def check_output(output: str | None) -> None:
    """Before anything is computed: ValueError, FileNotFoundError for what cannot be written."""
    if output and not Path(output).absolute().parent.is_dir():
        raise FileNotFoundError(f"output must be in a folder that exists, got {output}")
    if output and Path(output).is_dir():
        raise ValueError(f"output must be a file, got the folder {output}")


def check_device(device: str) -> None:
    """OptionError where nothing can be computed on a device, in float64 as energies are."""
    try:
        float(torch.zeros((), device=device, dtype=torch.float64))
    except Exception as error:  # each device has errors of its own
        reason = str(error).strip().splitlines()[0]
        raise OptionError(
            f"device must be one of this machine, 'cpu', 'cuda', 'cuda:1', ..., got {device!r}: "
            f"{reason}"
        ) from error
