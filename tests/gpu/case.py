"""What a block of evidence is: the protocol between ``evidence.py`` and ``blocks``.

A block is a module of ``gpu.blocks`` with

- ``NAME``: as on the command line, and ``WEIGHT``: its share of the minutes against the others;
- ``cases(settings) -> list[Case]``: what there is to do on this device, called in a process that
  never touches the GPU; a case that only CUDA can run is listed everywhere with ``needs_cuda``;
- ``run(case, settings, emit)``: does one case in a process that may die of it. ``emit(row)`` writes
  one JSON line at once; "what", "status" (default "ok") and "shape", "error", "budget", "seconds",
  "gb_s", "tflop_s", "floor" are the usual keys. Block, case, backend, dtype and versions are added.
  What it returns does not count. An exception is the case's last row;
- optionally ``PARALLEL(settings) -> int``: how many of its processes may run side by side (1);
- optionally ``BACKGROUND = True``: the next blocks start without waiting for it, except for cases
  that name it in ``after``;
- optionally ``table(rows) -> list[str]``: lines for the table at the end, from the block's rows.

A case whose ``shard`` is "" has a process of its own. Cases of a backend with the same shard share
one, in their order; a case that kills it costs itself, and a new process goes on behind it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
Emit = Callable[[dict[str, Any]], None]

# What a row can say. A case's own row has the worst of its rows.
GOOD = ("ok", "refused", "missing", "needs cuda")
BAD = ("wrong", "failed", "crashed", "hang")
UNFINISHED = ("no time",)
STATUSES = (*GOOD, *UNFINISHED, *BAD)  # from good to bad


class Outcome(Exception):
    """Ends a case with a status other than "failed": ``raise Outcome("missing", "no ncu")``."""

    def __init__(self, status: str, text: str) -> None:
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Case:
    """One piece of evidence; ``key`` names it in the rows and for ``--resume``."""

    block: str
    name: str
    backend: str = ""
    dtype: str = ""  # "bfloat16", ...
    seconds: float = 60.0  # after which it hangs; the start of its process comes on top
    needs_cuda: bool = False
    shard: str = ""
    after: str = ""  # a background block that has to be over before this starts
    environment: tuple[tuple[str, str], ...] = ()  # of its process; of a shard: the same for all

    @property
    def key(self) -> str:
        return "/".join((self.block, self.name, self.backend, self.dtype))


@dataclass(frozen=True)
class Settings:
    """What the command line asks for, as the blocks see it."""

    device: str  # "cuda" or "cpu"
    out: Path  # where files beside the rows go
    cache: Path  # of compilers; kept between runs
    backends: tuple[str, ...] = ()  # empty: all
    cores: int = 1
    deadline: float = 0.0  # of the block, as time.time() counts

    def wants(self, backend: str) -> bool:
        return not self.backends or backend in self.backends

    def left(self) -> float:
        """Seconds until the block must be over."""
        return self.deadline - time.time()


def pack(settings: Settings, cases: list[Case]) -> str:
    """For the standard input of a child."""
    known = asdict(settings) | {"out": str(settings.out), "cache": str(settings.cache)}
    return json.dumps({"settings": known, "cases": [asdict(case) for case in cases]})


def unpack(text: str) -> tuple[Settings, list[Case]]:
    found = json.loads(text)
    settings = Settings(**found["settings"])
    settings = replace(
        settings,
        out=Path(settings.out),
        cache=Path(settings.cache),
        backends=tuple(settings.backends),
    )
    cases = [
        Case(**case | {"environment": tuple(map(tuple, case["environment"]))})
        for case in found["cases"]
    ]
    return settings, cases
