"""Lightning's Trainer from plain options, and what of them cannot be."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class OptionError(ValueError):
    """An option that cannot be, in contrast to a file that cannot be read or a failed training."""

    exit_code = 2  # of the command line, as for options that do not exist


@contextmanager
def of_options(*kinds: type[Exception], what: str = "") -> Iterator[None]:
    """Says of errors of these kinds that an option is to blame."""
    try:
        yield
    except OptionError:
        raise
    except kinds as error:
        raise OptionError(f"{what}{error}") from error


@dataclasses.dataclass
class TrainerOptions:
    """Lightning's Trainer.

    Args:
        accelerator: "auto", "cpu", "gpu", ...
        devices: processes, each with a device of its own; "auto": all that there are. They share
            the batches of data.batch_size. Under torchrun the default is its processes.
        strategy: "auto", "ddp", "ddp_find_unused_parameters_true", ...
        num_nodes: machines; under torchrun the default is its number of machines.
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
        """The trainer; OptionError for what cannot be, before anything is read or written."""
        given = dataclasses.asdict(self)
        further = given.pop("options") or {}
        bar = given.pop("progress")
        bar = sys.stdout.isatty() if bar is None else bar
        callbacks = [*options.pop("callbacks", []), Bars() if bar else Lines()]
        check(further, given | further)
        if (given["devices"], given["num_nodes"]) == (1, 1):
            given |= started_processes()
        check_processes(given["devices"])
        fixed = {
            "use_distributed_sampler": False,  # MoleculeData deals the molecules out
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": bar,
            "callbacks": callbacks,
        }
        defaults = dataclasses.asdict(TrainerOptions())
        shown = {k: x for k, x in (given | further).items() if x != defaults.get(k)}
        text = ", ".join(f"{name}={value!r}" for name, value in shown.items()) or "the defaults"
        with of_options(Exception, what=f"no trainer can be made with {text}: "):
            return Trainer(**given | fixed | options | further)


def check(further: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """OptionError for values that Lightning takes and that cannot be, or fails with much later."""
    known = inspect.signature(Trainer).parameters
    for name, value in further.items():
        if name not in known:
            raise OptionError(
                f"trainer.options must be options of lightning.pytorch.Trainer, got {name!r}"
            )
        if name == "callbacks" or (name == "logger" and not isinstance(value, bool)):
            raise OptionError(f"trainer.options must not have {name}: those of a run are fixed")
        kind = known[name].annotation
        if kind in (bool, bool | None) and not isinstance(value, bool | None):
            raise OptionError(f"{name} must be true or false, got {value!r}")
    for name, least, endless in (
        ("max_epochs", 1, True),
        ("max_steps", 1, True),
        ("accumulate_grad_batches", 1, False),
        ("check_val_every_n_epoch", 1, False),
        ("num_sanity_val_steps", 0, True),
        ("log_every_n_steps", 0, False),
    ):
        value = given.get(name)
        if value is None or (endless and value == -1):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            wanted = f"an int of at least {least}" + (" or -1" if endless else "")
            raise OptionError(f"{name} must be {wanted}, got {value!r}")
    clip, interval = given.get("gradient_clip_val"), given.get("val_check_interval")
    if clip is not None and not (isinstance(clip, int | float) and 0 <= clip < math.inf):
        raise OptionError(f"gradient_clip_val must be at least 0 and finite, got {clip!r}")
    if isinstance(interval, int | float) and not interval > 0:
        raise OptionError(f"val_check_interval must be positive, got {interval!r}")


def check_validates(trainer: Trainer) -> None:
    """OptionError for a trainer that never trains or never validates, which a run must do."""
    for name in ("limit_train_batches", "limit_val_batches"):
        if not getattr(trainer, name):
            raise OptionError(
                f"{name} must not be 0 to fit a model and to choose the best by its validation "
                f"loss, got {getattr(trainer, name)}"
            )
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is not None and epochs is not None and 0 < epochs < every:
        raise OptionError(
            f"check_val_every_n_epoch must be at most max_epochs, {epochs}, for a validation loss "
            f"to choose the best model by, got {every}"
        )


def started_processes() -> dict[str, int]:
    """Devices and machines that torchrun has started processes for, if it has."""
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if "TORCHELASTIC_RUN_ID" not in os.environ or world == 1:
        return {}
    return {"devices": local, "num_nodes": world // local}


def check_processes(devices: int | str) -> None:
    """OptionError for far more processes than a CPU has cores: Lightning would start them all."""
    most = max(8, os.cpu_count() or 1)
    started = "LOCAL_WORLD_SIZE" in os.environ
    if started or torch.accelerator.is_available():
        return
    if str(devices).isdecimal() and int(devices) > most:
        raise OptionError(f"devices must be at most {most} on this machine, got {devices}")


class Remaining:
    """The time that is left to max_epochs, by the epochs of this start."""

    def __init__(self) -> None:
        self.began: tuple[float, int] | None = None

    def start(self, trainer: Trainer) -> None:
        self.began = time.monotonic(), trainer.current_epoch

    def text(self, trainer: Trainer, done: int) -> str:
        """As H:MM:SS after ``done`` epochs in all, or "" where the end is not known."""
        if self.began is None or (trainer.max_epochs or -1) < 0:
            return ""
        began, first = self.began
        if done <= first:
            return ""
        each = (time.monotonic() - began) / (done - first)
        left = each * (trainer.max_epochs - done)
        return str(datetime.timedelta(seconds=round(left)))


class Bars(RichProgressBar):
    """Lightning's bar of an epoch, with the time that is left to max_epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.remaining = Remaining()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.remaining.start(trainer)

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        found = super().get_metrics(trainer, pl_module)
        found.pop("v_num", None)
        left = self.remaining.text(trainer, trainer.current_epoch)
        return {**found, "to max_epochs": left} if left else found


class Lines(Callback):
    """A line per epoch, where a progress bar would fill a file."""

    def __init__(self) -> None:
        self.remaining = Remaining()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.remaining.start(trainer)

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = {k: f"{float(v):.5g}" for k, v in sorted(trainer.callback_metrics.items())}
        text = "  ".join(f"{name} {value}" for name, value in found.items())
        left = self.remaining.text(trainer, trainer.current_epoch + 1)
        print(f"epoch {trainer.current_epoch}  {text}{left and f'  left {left}'}", flush=True)
