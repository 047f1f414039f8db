"""Tables of predictions, a row a molecule, as CSV, extended xyz and Parquet, part by part."""

from __future__ import annotations

import csv
import io
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from .datasets.files import replacing

if TYPE_CHECKING:
    import ase

    from .task import PoolingTask


class Table:
    """A format of tables: parts are written one by one, and joined to one file in their order.

    columns: number of the molecule, formula, atoms, and one for each target with its unit.
    """

    def __init__(self, task: PoolingTask) -> None:
        self.targets = task.targets
        self.columns = ["molecule", "formula", "atoms"]
        self.columns += [f"{t.name} [{t.unit}]" for t in task.targets]
        self.std = task.model.std.tolist()

    def write(self, part: Path, frames: Sequence[ase.Atoms], values: torch.Tensor, first: int = 0):
        """Writes a part, the whole of it or nothing: values [B, T] of molecules from ``first``."""
        with replacing(part) as temporary:
            self._write(temporary, frames, values, first)

    def join(self, parts: Iterable[Path], target: Path) -> None:
        """Writes the table of the parts, the whole of it or nothing."""
        with replacing(target) as temporary:
            self._join(parts, temporary)

    def _write(self, path: Path, frames: Sequence[ase.Atoms], values: torch.Tensor, first: int):
        raise NotImplementedError

    def _join(self, parts: Iterable[Path], path: Path) -> None:
        with open(path, "wb") as file:
            file.write(self.head.encode())
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, file)

    @property
    def head(self) -> str:
        """Text before the first part."""
        return ""


class Csv(Table):
    @property
    def head(self) -> str:
        return as_csv([self.columns])

    def text(self, frames: Sequence[ase.Atoms], values: torch.Tensor, first: int = 0) -> str:
        """The lines of these molecules."""
        return as_csv(self.rows(frames, values, first))

    def rows(
        self, frames: Sequence[ase.Atoms], values: torch.Tensor, first: int = 0
    ) -> list[list[str]]:
        """The cells of these molecules: at least eight digits, see ``_digits``."""
        rows = []
        for number, (atoms, row) in enumerate(zip(frames, values.tolist()), first):
            found = [f"{value:.{_digits(value, std)}g}" for value, std in zip(row, self.std)]
            rows.append([str(number), atoms.get_chemical_formula(), str(len(atoms)), *found])
        return rows

    def _write(self, path: Path, frames: Sequence[ase.Atoms], values: torch.Tensor, first: int):
        path.write_text(self.text(frames, values, first), encoding="utf-8")


class ExtendedXyz(Table):
    """The molecules, with their predictions and the units of these in the comments."""

    def _write(self, path: Path, frames: Sequence[ase.Atoms], values: torch.Tensor, first: int):
        import ase
        import ase.io

        found = []
        for number, (atoms, row) in enumerate(zip(frames, values.tolist()), first):
            info: dict[str, Any] = {"molecule": number}
            for target, value in zip(self.targets, row):
                info |= {target.name: value, f"{target.name}_unit": target.unit}
            kept = {k: x for k, x in atoms.info.items() if isinstance(x, str | bool | int | float)}
            found.append(ase.Atoms(atoms.numbers, atoms.positions, info=kept | info))
        with open(path, "w", encoding="utf-8") as file:
            ase.io.write(file, found, format="extxyz")


class Parquet(Table):
    """The columns of the CSV with their types; a part becomes a row group."""

    def __init__(self, task: PoolingTask) -> None:
        super().__init__(task)
        self.arrow, self.parquet = _pyarrow()
        arrow = self.arrow
        kinds = [arrow.int64(), arrow.string(), arrow.int64()]
        kinds += [arrow.float64()] * len(task.targets)
        self.schema = arrow.schema(list(zip(self.columns, kinds)))

    def _write(self, path: Path, frames: Sequence[ase.Atoms], values: torch.Tensor, first: int):
        cells = [
            list(range(first, first + len(frames))),
            [atoms.get_chemical_formula() for atoms in frames],
            [len(atoms) for atoms in frames],
            *values.T.tolist(),
        ]
        table = self.arrow.table(dict(zip(self.columns, cells)), schema=self.schema)
        self.parquet.write_table(table, path)

    def _join(self, parts: Iterable[Path], path: Path) -> None:
        with self.parquet.ParquetWriter(path, self.schema) as writer:
            for part in parts:
                writer.write_table(self.parquet.read_table(part))


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"a table in Parquet needs pyarrow: pip install pyarrow ({error})"
        ) from error
    return pyarrow, pyarrow.parquet


FORMATS: dict[str, type[Table]] = {
    ".csv": Csv,
    ".extxyz": ExtendedXyz,
    ".xyz": ExtendedXyz,
    ".parquet": Parquet,
}


def _digits(value: float, std: float) -> int:
    """Significant digits: eight, and more where a millionth of the target's std needs them."""
    ratio = abs(value) / std
    return 8 if not 1 < ratio < math.inf else min(17, max(8, 6 + math.ceil(math.log10(ratio))))


def as_csv(rows: Iterable[Iterable[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as columns for reading: names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if _number(rows[-1][i]) else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
