"""Trained models from their checkpoints, and tables of what they predict for files."""

from __future__ import annotations

import csv
import io
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .molecules import Molecules

if TYPE_CHECKING:
    import ase

    from .task import PoolingTask

BEST = "best.ckpt"


def checkpoint_file(path: str | Path) -> Path:
    """The file itself, or the best checkpoint of the folder of a run; FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        if not (path / BEST).is_file():
            raise FileNotFoundError(f"ckpt_path must have a {BEST}, got the folder {path} without")
        return path / BEST
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path must be a file or the folder of a run, got {path}")
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this program as ``torch.load`` gives it, without running code from it.

    Raises ValueError for files that are damaged or of another program.
    """
    file = checkpoint_file(path)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} is damaged or no checkpoint: {reason}") from error
    wanted = {"zoo", "hyper_parameters", "state_dict"}
    missing = wanted - found.keys() if isinstance(found, dict) else wanted
    if missing:
        raise ValueError(
            f"{file} is a checkpoint of another program: it has no {', '.join(sorted(missing))}"
        )
    return found


def load_task(path: str | Path) -> PoolingTask:
    """The model of a checkpoint, in evaluation mode, on the CPU.

    Raises ValueError for files that are damaged, of another program or of another model.
    """
    from .task import PoolingTask

    file, found = checkpoint_file(path), read_checkpoint(path)
    try:
        task = PoolingTask(**found["hyper_parameters"])
        task.load_state_dict(found["state_dict"])
    except (TypeError, RuntimeError) as error:
        lines = str(error).splitlines()
        raise ValueError(
            f"{file} holds the weights of another model: {' '.join(x.strip() for x in lines[:2])}"
        ) from error
    task.on_load_checkpoint(found)
    return task.eval()


def read_molecules(path: str | Path) -> list[ase.Atoms]:
    """All molecules of a file that ASE reads (.xyz, extended xyz, ...), or of an SDF file.

    Raises ValueError for files without molecules, for molecules without atoms, for periodic
    structures, and for files that cannot be read.
    """
    import ase.io

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file must exist, got {path}")
    if not path.read_bytes().strip():
        raise ValueError(f"{path} is empty")
    try:
        if path.suffix.lower() in (".sdf", ".sd"):
            found: Any = [ase.io.read(io.StringIO(x), format="sdf") for x in _records(path)]
        else:
            found = ase.io.read(path, index=":")
    except Exception as error:  # readers of ASE raise whatever a damaged line leads to
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason.splitlines()[0]}") from error
    frames = cast("list[ase.Atoms]", found)
    if not frames:
        raise ValueError(f"{path} has no molecules")
    for number, atoms in enumerate(frames):
        if not len(atoms):
            raise ValueError(f"{path}: molecule {number} has no atoms")
        if atoms.pbc.any():
            raise ValueError(
                f"{path}: molecule {number} is periodic, which no model here is; "
                'for a molecule write pbc="F F F"'
            )
        if not bool(torch.as_tensor(atoms.positions).isfinite().all()):
            raise ValueError(f"{path}: positions of molecule {number} must be finite")
    return frames


def _records(path: Path) -> Iterable[str]:
    """Molecules of an SDF file: ASE reads only the first."""
    lines: list[str] = []
    for line in path.read_text().splitlines(keepends=True):
        if line.startswith("$$$$"):
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    if "".join(lines).strip():
        yield "".join(lines)


def check_elements(frames: Sequence[ase.Atoms], known: Sequence[int]) -> None:
    """ValueError for the first molecule with an element the model has not been trained on."""
    from ase.data import chemical_symbols

    for number, atoms in enumerate(frames):
        unknown = sorted(set(atoms.numbers.tolist()) - set(known))
        if unknown:
            names = ", ".join(chemical_symbols[z] for z in unknown)
            trained = ", ".join(chemical_symbols[z] for z in known)
            raise ValueError(
                f"molecule {number} ({atoms.get_chemical_formula()}) has {names}; the model was "
                f"trained on {trained}"
            )


def predicted(
    task: PoolingTask, frames: Sequence[ase.Atoms], batch_size: int = 128
) -> torch.Tensor:
    """Predictions [B, T], float64, in the units of ``task.targets``."""
    molecules = Molecules.from_ase(frames)
    parts = torch.arange(len(molecules)).split(batch_size)
    with torch.no_grad():
        found = [task(molecules.select(part).to(task.device)) for part in parts]
    return torch.cat(found).double().cpu()


def table(task: PoolingTask, frames: Sequence[ase.Atoms], values: torch.Tensor) -> list[list[str]]:
    """Header and rows: number, formula, atoms, and a column for each target with its unit."""
    rows = [["molecule", "formula", "atoms", *(f"{t.name} [{t.unit}]" for t in task.targets)]]
    for number, (atoms, row) in enumerate(zip(frames, values.tolist())):
        found = [f"{value:.8g}" for value in row]
        rows.append([str(number), atoms.get_chemical_formula(), str(len(atoms)), *found])
    return rows


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
