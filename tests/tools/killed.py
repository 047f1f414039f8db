"""Kills trainings at random moments, resumes them, and compares them with one that nobody killed.

    PYTHONPATH=.:tests python -m tools.killed                    20 moments and 4 half-written files
    PYTHONPATH=.:tests python -m tools.killed --moments 3 --writes 1

Trainings are children made by fork, so that none of them has to import torch, and die of SIGKILL,
which no code of theirs sees. In the middle of a checkpoint the system kills: from an epoch on the
process may write files of a part of a checkpoint only, and dies where it writes more.
Weights, optimizer, schedule and the best checkpoint must be those of the unbroken training, bit for
bit. Exit status 1 where they are not.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from attnpool_kernels.zoo import predict, run
from attnpool_kernels.zoo.data import MoleculeData
from attnpool_kernels.zoo.task import PoolingTask
from attnpool_kernels.zoo.trainer import TrainerOptions
from tools import tiny

FILES = ("best.ckpt", "last.ckpt")


class Limited(PoolingTask):
    """From an epoch on, may write files of so many bytes only, and dies of more."""

    limit: tuple[int, int] | None = None

    def on_train_epoch_start(self):
        if self.limit and self.current_epoch == self.limit[0]:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit[1], resource.RLIM_INFINITY))


def train(folder: Path, epochs: int, limit: tuple[int, int] | None = None) -> None:
    """Begins or resumes the training of a folder, with dropout and a schedule."""
    torch.manual_seed(0)
    options = {"pooling": "abp", "pooling_options": {**tiny.ABP, "dropout": 0.2}, "lr": 1e-2}
    options |= {"schedule": "plateau", "schedule_options": {"patience": 0, "threshold": 0.1}}
    task = Limited("schnet", tiny.SCHNET, targets=["energy"], **options)
    task.limit = limit
    data = MoleculeData(tiny.molecule_set(), targets=["energy"], batch_size=8, seed=1)
    begun = any((folder / name).exists() for name in FILES)
    given = TrainerOptions("cpu", max_epochs=epochs)
    run.fit(task, data, given, "", str(folder), "last" if begun else None, epochs)


def child(folder: Path, epochs: int, limit: tuple[int, int] | None = None) -> int:
    """The process id of a training."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train(folder, epochs, limit)
        status = 0
    except BaseException as error:
        print(f"the training failed: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Waits; the exit status, or the negative number of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(folder: Path, epochs: int) -> str:
    """Lets a training end undisturbed; what went wrong."""
    status = ended(child(folder, epochs))
    return f"the resumed training ended with {status}" if status else ""


def difference(a: Path, b: Path) -> str:
    """What differs between the checkpoints of two folders."""
    for name in FILES:
        one, two = (predict.read_checkpoint(folder / name) for folder in (a, b))
        for part in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
            if not same(one[part], two[part]):
                return f"{part} of {name} differs"
        if not same(one["zoo"]["generators"], two["zoo"]["generators"]):
            return f"the random numbers after {name} differ"
    left = [path.name for path in b.iterdir() if path.name.startswith(".")]
    return f"left behind: {', '.join(left)}" if left else ""


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def epoch_of(folder: Path) -> str:
    path = folder / "last.ckpt"
    return f"epoch {predict.read_checkpoint(path)['epoch']}" if path.exists() else "no checkpoint"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20, help="of SIGKILL")
    parser.add_argument("--writes", type=int, default=4, help="killed in a checkpoint's write")
    parser.add_argument("--epochs", type=int, default=24, help="of a whole training")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    draw, wrong = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory() as place:
        with redirect_stdout(StringIO()):  # imports everything, which the children then have
            train(Path(place, "first"), epochs=1)
        whole = Path(place, "whole")
        began = time.monotonic()
        if problem := finish(whole, given.epochs):
            print(problem)
            return 1
        took = time.monotonic() - began
        size = (whole / "last.ckpt").stat().st_size
        print(f"unbroken: {took:.2f} s, checkpoints of {size} bytes", flush=True)
        kills = number = 0
        while kills < given.moments:
            number += 1
            folder = Path(place, f"killed{number}")
            notes = []
            for _ in range(min(draw.choice((1, 2, 5)), given.moments - kills)):
                pid, moment = child(folder, given.epochs), draw.uniform(0, 0.8 * took)
                time.sleep(moment)
                os.kill(pid, signal.SIGKILL)
                if ended(pid) == -signal.SIGKILL:
                    kills += 1
                notes.append(f"{moment:.2f} s ({epoch_of(folder)})")
            problem = finish(folder, given.epochs) or difference(whole, folder)
            wrong += bool(problem)
            print(f"killed after {', '.join(notes)}: {problem or 'the same'}", flush=True)
        for number in range(given.writes):
            folder = Path(place, f"cut{number}")
            epoch = 0 if number == 1 else draw.randrange(1, given.epochs)
            limit = int(size * draw.uniform(0.3, 0.95))
            status = ended(child(folder, given.epochs, (epoch, limit)))
            note = f"{epoch_of(folder)} is left"
            problem = ""
            if status != -signal.SIGXFSZ:
                problem = f"the training ended with {status}, not while it wrote"
            problem = problem or finish(folder, given.epochs) or difference(whole, folder)
            wrong += bool(problem)
            print(
                f"killed in the write of epoch {epoch} after {limit} bytes, {note}: "
                f"{problem or 'the same'}",
                flush=True,
            )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
