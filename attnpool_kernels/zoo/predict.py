"""Trained models from their checkpoints, and tables of what they predict for files."""

from __future__ import annotations

import csv
import io
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from . import sdf, xyz
from .defaults import plain_defaults
from .lines import lines
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

    In float32, or in float64 where its weights are so, whatever the process's default dtype is.

    Raises ValueError for files that are damaged, of another program or of another model.
    """
    from .task import PoolingTask

    file, found = checkpoint_file(path), read_checkpoint(path)
    try:
        with plain_defaults():
            task = PoolingTask(**found["hyper_parameters"])
        state = found["state_dict"]
        if any(name in state and state[name].dtype == torch.float64 for name in _weights(task)):
            task = task.double()
        task.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        lines = str(error).splitlines()
        raise ValueError(
            f"{file} holds the weights of another model: {' '.join(x.strip() for x in lines[:2])}"
        ) from error
    task.on_load_checkpoint(found)
    return task.eval()


def _weights(task: torch.nn.Module) -> list[str]:
    """Names of the parameters: the statistics beside them are in float64 in any model."""
    return [name for name, _ in task.named_parameters()]


def read_molecules(path: str | Path) -> list[ase.Atoms]:
    """All molecules of a file: xyz and extended xyz, SDF and MOL (V2000), or what else ASE reads.

    A name that ends with .gz, .bz2 or .xz is read decompressed. In titles and comments bytes that
    are not UTF-8 do no harm.

    Raises ValueError for files without molecules, for molecules without atoms or with all atoms at
    one place, for periodic structures, for drawings, and for files that cannot be read to their
    end, naming the line in xyz and SDF. A drawing is an SDF record with "2D" in its second line
    and every z 0: its bonds have any length, so a prediction would have no meaning.

    Warns, once for a file, where a prediction may be that of another molecule. Hydrogens are
    missing where the bonds of an SDF leave room for some at C, N and O, or where a molecule without
    bonds in its file has carbon and no hydrogen; the latter may be right (CO2), so it is read. An
    SDF record with every z 0 and neither "2D" nor "3D" may be a drawing. Of formats in which ASE
    reads one molecule it is said that there may be more. Charges and spins are put in
    ``atoms.info``, where ``Molecules.from_ase`` warns of them.
    """
    import ase.io
    from ase.io.formats import UnknownFileTypeError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file must exist, got {path}")
    if not path.read_bytes().strip():
        raise ValueError(f"{path} is empty")
    records: list[sdf.Record] = []
    try:
        kind, single = _format(path)
        if kind == "xyz":
            frames = xyz.read(lines(path))
        elif kind == "sdf":
            records = [sdf.parsed(block) for block in sdf.blocks(lines(path))]
            frames = [_atoms(record) for record in records]
        else:
            found: Any = ase.io.read(path, index=":", format=kind, do_not_split_by_at_sign=True)
            frames = cast("list[ase.Atoms]", found)
    except UnknownFileTypeError as error:
        raise ValueError(
            f"{path} cannot be read: neither its name nor its beginning is of a "
            "format that ASE knows"
        ) from error
    except Exception as error:  # readers of ASE raise whatever a damaged line leads to
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason.splitlines()[0]}") from error
    if not frames:
        raise ValueError(f"{path} has no molecules")
    for number, atoms in enumerate(frames):
        _check(path, f"molecule {number}", atoms)
    if single:
        warnings.warn(
            f"{path}: of the format {kind} ASE reads one molecule; if the file has more, they are "
            "not read",
            stacklevel=2,
        )
    _doubtful(path, frames, records)
    return frames


def _format(path: Path) -> tuple[str, bool]:
    """ "xyz", "sdf" or the name of another format of ASE, and whether that holds one molecule."""
    from ase.io.formats import UnknownFileTypeError, filetype, get_compression, ioformats

    bare, _ = get_compression(str(path))
    suffix = Path(bare).suffix.lower()
    if suffix in (".xyz", ".extxyz"):
        return "xyz", False
    if suffix in (".sdf", ".sd", ".mol", ".mdl"):
        return "sdf", False
    kind = filetype(str(path))
    if kind in ("xyz", "extxyz"):
        return "xyz", False
    if kind in ("sdf", "mol"):
        return "sdf", False
    if kind not in ioformats:  # then it is the end of the name
        raise UnknownFileTypeError(kind)
    return kind, ioformats[kind].single


def _atoms(record: sdf.Record) -> ase.Atoms:
    import ase

    info = {}
    if record.charge:
        info["charge"] = record.charge
    if record.unpaired:
        info["multiplicity"] = record.unpaired + 1
    return ase.Atoms(record.z, record.pos, info=info)


def _check(path: Path, name: str, atoms: ase.Atoms) -> None:
    """ValueError for what no model can take."""
    if not len(atoms):
        raise ValueError(f"{path}: {name} has no atoms")
    if atoms.pbc.any():
        raise ValueError(
            f'{path}: {name} is periodic, which no model here is; for a molecule write pbc="F F F"'
        )
    if not bool(np.isfinite(atoms.positions).all()):
        raise ValueError(f"{path}: positions of {name} must be finite")
    if len(atoms) > 1 and not (atoms.positions - atoms.positions[0]).any():
        raise ValueError(
            f"{path}: {name} has no coordinates, its {len(atoms)} atoms are at one place"
        )


def _doubtful(path: Path, frames: Sequence[ase.Atoms], records: Sequence[sdf.Record]) -> None:
    """ValueError for drawings, warnings for what may not be the whole molecule."""
    known = [r.implied for r in records] if records else [None] * len(frames)
    missing = {}
    for number, (atoms, implied) in enumerate(zip(frames, known)):
        if implied:
            missing[number] = f"its bonds leave room for {implied}"
        elif implied is None and 6 in atoms.numbers and 1 not in atoms.numbers:
            missing[number] = "it has carbon and no hydrogen"
    flat = []
    for number, record in enumerate(records):
        if record.flat and record.dimension.upper() == "2D":
            raise ValueError(
                f'{path}: molecule {number} is a drawing: its second line says "2D" and every z is '
                '0; make 3-D coordinates first, or write "3D" if the molecule is flat'
            )
        if record.flat and record.dimension.upper() != "3D":
            flat.append(number)
    if missing:
        number, text = next(iter(missing.items()))
        warnings.warn(
            f"{path}: {len(missing)} of {len(frames)} molecules seem to lack hydrogens (molecule "
            f"{number}, {frames[number].get_chemical_formula()}: {text}); the models know the "
            "atoms that are listed only",
            stacklevel=3,
        )
    if flat:
        warnings.warn(
            f"{path}: {len(flat)} of {len(frames)} molecules may be drawings (molecule {flat[0]}: "
            'every z is 0, and the second line says neither "2D" nor "3D")',
            stacklevel=3,
        )


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
    parts = torch.arange(len(molecules), device="cpu").split(batch_size)
    with torch.no_grad():
        found = [task(molecules.select(part).to(task.device)) for part in parts]
    return torch.cat(found).double().cpu()


def table(task: PoolingTask, frames: Sequence[ase.Atoms], values: torch.Tensor) -> list[list[str]]:
    """Header and rows: number, formula, atoms, and a column for each target with its unit."""
    rows = [["molecule", "formula", "atoms", *(f"{t.name} [{t.unit}]" for t in task.targets)]]
    widths = task.model.std.tolist()
    for number, (atoms, row) in enumerate(zip(frames, values.tolist())):
        found = [f"{value:.{_digits(value, std)}g}" for value, std in zip(row, widths)]
        rows.append([str(number), atoms.get_chemical_formula(), str(len(atoms)), *found])
    return rows


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
