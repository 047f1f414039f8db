"""Checkpoints that are whole or not there, and folders that one run has for itself."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer

from .datasets.files import replacing

LOCK = ".lock"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the old checkpoint and then takes its place.

    Lightning writes into the temporary folder of the system and moves the file, which is a copy
    where that is another file system: what is killed meanwhile leaves half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        """OSError, which names the file, where it cannot be written; the old one stays."""
        # Not into the file at once: where a disk is full, torch says less than the system does.
        whole = io.BytesIO()
        torch.save(checkpoint, whole)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(Path(path)) as temporary:
                temporary.write_bytes(whole.getbuffer())
        except OSError as error:
            raise OSError(f"{path} was not written: {error.strerror or error}") from error


def write_whole(trainer: Trainer) -> None:
    """Makes a trainer write its checkpoints so, unless its strategy has a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder, and holds it against other runs until the end of this one or its death.

    ValueError where another run has it. Removes what a run that was killed has left half-written,
    and, in the end, the folder if nothing came into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(lock, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"output must not be in use by another run, got {folder}"
                ) from error
            except OSError:  # a file system without locks
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    break  # else the run before has removed it since
        for left in folder.glob(".*.part"):
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
