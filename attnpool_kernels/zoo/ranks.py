"""Processes that torchrun, SLURM or Ray has started together, for work without Lightning."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator

import torch.distributed

LONG = datetime.timedelta(days=7)  # one process may have the molecules that take longest


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process, from 0, and how many there are."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            torch.distributed.barrier()


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes by RANK and WORLD_SIZE, joined by gloo at MASTER_ADDR and MASTER_PORT."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():  # by Lightning
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return
    world = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if world == 1:
        yield Ranks()
        return
    torch.distributed.init_process_group("gloo", timeout=LONG)
    try:
        yield Ranks(torch.distributed.get_rank(), world)
    finally:
        torch.distributed.destroy_process_group()
