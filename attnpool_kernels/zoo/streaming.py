"""Predictions for a file of any number of molecules: in parts, shared out, and resumed.

Molecules are taken ``size`` at a time. A part is written to its own file in ``TABLE.parts`` when it
has been computed; part i is computed by process i mod N, and one that is there already by none. So
memory does not grow with the file, the numbers do not depend on the number of processes, and a
prediction that was interrupted goes on with the parts that are missing. At the end the first
process joins the parts to one table in the order of the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import progress
from .checkpoints import alone_in
from .datasets.files import digest, replacing
from .molecule_files import MoleculeFile
from .molecules import charge_and_spin, charges_text
from .predict import check_elements, predicted
from .ranks import Ranks
from .tables import Csv, Table

if TYPE_CHECKING:
    import ase
    import torch

    from .task import PoolingTask


@dataclasses.dataclass(frozen=True)
class Stream:
    """The molecules of a file in parts.

    file: the molecules. size: of a part. batch_size: molecules that are computed at a time.
    """

    file: Path
    size: int
    batch_size: int

    def count(self, molecules: int) -> int:
        """Parts of so many molecules."""
        return -(-molecules // self.size)

    def predicted(
        self, task: PoolingTask, mine: Callable[[int], bool], took: Callable[[int, Any], None]
    ) -> int:
        """Computes the parts i for which mine(i), and gives each to took(i, (frames, values)).

        Returns the number of all molecules of the file. Raises ValueError for a file that cannot
        be read and for elements that the model has not been trained on.
        """
        source = MoleculeFile(self.file, lambda number: mine(number // self.size))
        charges, first, total = 0, None, 0
        for part, begin, frames in self._parts(source):
            total = begin + len(frames)
            found = [atoms for atoms in frames if atoms is not None]
            if not found:
                continue
            check_elements(found, task.elements, begin)
            for number, atoms in enumerate(found, begin):
                if text := charge_and_spin(atoms):
                    charges, first = charges + 1, first or (number, text)
            took(part, (found, predicted(task, found, self.batch_size)))
        if first is not None:
            warnings.warn(charges_text(first, charges, total), stacklevel=2)
        return total

    def _parts(self, source: MoleculeFile) -> Iterator[tuple[int, int, list[ase.Atoms | None]]]:
        """Number, first molecule and molecules of each part."""
        frames: list[ase.Atoms | None] = []
        part = 0
        with progress.of_file(source.path, "predicting") as shown:
            for atoms in source:
                frames.append(atoms)
                if len(frames) == self.size:
                    yield part, part * self.size, frames
                    part, frames = part + 1, []
                    shown(source.position, part * self.size)
        if frames:
            yield part, part * self.size, frames


class Parts:
    """The folder of the parts of a table, beside it."""

    def __init__(self, target: Path) -> None:
        self.folder = target.with_name(target.name + ".parts")

    def path(self, part: int) -> Path:
        return self.folder / f"{part:08d}"

    def claim(self, about: dict[str, Any]) -> None:
        """Makes the folder, or takes what is there if it is of the same prediction; ValueError."""
        stated = self.folder / "about.json"
        if stated.is_file():
            there = json.loads(stated.read_text(encoding="utf-8"))
            differences = [k for k in about if there.get(k) != about[k]]
            if differences:
                raise ValueError(
                    f"{self.folder} has parts of another prediction ({', '.join(differences)} "
                    "differ): remove it, or choose another output"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(stated) as temporary:
            temporary.write_text(json.dumps(about, indent=1), encoding="utf-8")


def to_file(
    task: PoolingTask, checkpoint: Path, stream: Stream, table: Table, target: Path, own: Ranks
) -> int:
    """Writes the table of a file; returns the number of molecules. Called by all processes."""
    if not stream.file.is_file():
        raise FileNotFoundError(f"file must exist, got {stream.file}")
    parts = Parts(target)
    with alone_in(parts.folder) if own.first else contextlib.nullcontext():
        return _shared_out(task, checkpoint, stream, table, parts, target, own)


def _shared_out(
    task: PoolingTask,
    checkpoint: Path,
    stream: Stream,
    table: Table,
    parts: Parts,
    target: Path,
    own: Ranks,
) -> int:
    if own.first:
        about = {
            "file": digest(stream.file),
            "checkpoint": digest(checkpoint),
            "format": type(table).__name__,
            "part_size": stream.size,
            "batch_size": stream.batch_size,
        }
        parts.claim(about)
    own.wait()

    def mine(part: int) -> bool:
        return part % own.world == own.rank and not parts.path(part).exists()

    def took(part: int, found: tuple[list[ase.Atoms], torch.Tensor]) -> None:
        table.write(parts.path(part), *found, first=part * stream.size)

    total = stream.predicted(task, mine, took)
    own.wait()
    if own.first:
        table.join(map(parts.path, range(stream.count(total))), target)
        shutil.rmtree(parts.folder)
    own.wait()
    return total


def to_stdout(task: PoolingTask, stream: Stream) -> int:
    """Prints the table of a file as CSV, part by part; returns the number of molecules."""
    table = Csv(task)

    def took(part: int, found: tuple[list[ase.Atoms], torch.Tensor]) -> None:
        head = table.head if part == 0 else ""
        sys.stdout.write(head + table.text(*found, first=part * stream.size))

    return stream.predicted(task, lambda part: True, took)
