"""Schedules of the learning rate, and what a resumed training takes over of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

SCHEDULES: dict[str, dict[str, Any]] = {
    "plateau": {"factor": 0.8, "patience": 10, "min_lr": 1e-6},
    "cosine": {"eta_min": 0.0},
}
# Further options of torch's ReduceLROnPlateau; its mode is not one: a loss is to be small.
_PLATEAU = ("threshold", "threshold_mode", "cooldown", "eps")
# What a plateau has seen so far; the rest of its state are options.
_SEEN = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")


class Cosine(LRScheduler):
    """From lr to ``eta_min`` along half a cosine over ``epochs``: a function of the epoch alone.

    So a training that resumes with more epochs goes on along the longer cosine and ends at
    ``eta_min`` too; torch's CosineAnnealingLR would go up again behind its first end.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, eta_min: float = 0.0) -> None:
        self.epochs, self.eta_min = epochs, eta_min
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        share = (1 + math.cos(math.pi * min(1.0, self.last_epoch / self.epochs))) / 2
        return [self.eta_min + (lr - self.eta_min) * share for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr):
            group["lr"] = lr


def checked_options(schedule: str | None, options: Mapping[str, Any], lr: float) -> dict[str, Any]:
    """The options with the defaults of the schedule; ValueError for what cannot be, by name."""
    if schedule is None:
        return {}
    known = [*SCHEDULES[schedule], *(_PLATEAU if schedule == "plateau" else ())]
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"options of schedule {schedule!r} are {', '.join(known)}, got {name!r}"
            )
        if name == "threshold_mode":
            wanted, fine = "'rel' or 'abs'", value in ("rel", "abs")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            wanted, fine = "a number", False
        elif name in ("patience", "cooldown"):
            wanted, fine = "an int of at least 0", isinstance(value, int) and value >= 0
        elif name == "factor":
            wanted, fine = "between 0 and 1", 0 < value < 1
        elif name == "eta_min":
            wanted, fine = f"from 0 to lr, {lr}", 0 <= value <= lr
        else:
            wanted, fine = "at least 0 and finite", 0 <= value < math.inf
        if not fine:
            raise ValueError(f"{name} of schedule {schedule!r} must be {wanted}, got {value!r}")
    return SCHEDULES[schedule] | dict(options)


def epochs_done(checkpoint: Mapping[str, Any]) -> int:
    """Whole epochs of training behind a checkpoint of Lightning."""
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def changed(checkpoint: Mapping[str, Any], lr: float, schedule: str | None) -> bool:
    """Whether a training with these resumes with another learning rate than it had."""
    there = checkpoint["hyper_parameters"]
    return (there.get("lr", lr), there.get("schedule")) != (lr, schedule)


def carry_over(checkpoint: dict[str, Any], lr: float, schedule: str | None) -> None:
    """Makes a checkpoint one that resumes with this learning rate and this schedule.

    Lightning would restore the rate and the schedule's options as they were, whatever is asked
    for, and hand the state of one schedule to another. Here a schedule takes over what it has seen
    and nothing else:

    - The cosine goes on at the epoch that was reached, of the epochs and from the rate given now.
    - The plateau goes on with its rate, its best loss and its count of epochs without a better one.
    - Where ``lr`` or ``schedule`` is another than that of the checkpoint, a plateau and a training
      without a schedule go on at ``lr``, and a plateau counts from 0.
    """
    if "optimizer_states" not in checkpoint:
        return
    states, anew = checkpoint.get("lr_schedulers", []), changed(checkpoint, lr, schedule)
    checkpoint["lr_schedulers"] = []
    if schedule == "cosine":
        checkpoint["lr_schedulers"] = [{"last_epoch": epochs_done(checkpoint)}]
    elif anew:
        for state in checkpoint["optimizer_states"]:
            for group in state["param_groups"]:
                group["lr"] = lr
    if schedule == "plateau" and checkpoint["hyper_parameters"].get("schedule") == "plateau":
        seen = {name: states[0][name] for name in _SEEN}
        if anew:
            seen |= {"num_bad_epochs": 0, "cooldown_counter": 0, "_last_lr": [lr]}
        checkpoint["lr_schedulers"] = [seen]
