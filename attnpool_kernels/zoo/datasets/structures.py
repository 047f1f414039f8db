"""Structures and tables of several sources: SDF with CSV, and lists of torch_geometric's Data."""

from __future__ import annotations

import csv
import pickle
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import sdf as reader
from ..lines import as_number, lines
from ..molecules import warn_of_charges
from ..progress import over
from .contents import whole
from .files import check_archive

Arrays = dict[str, np.ndarray]


def sdf(path: Path, skip: Collection[int] = ()) -> Arrays:
    """z, pos in Å and counts of an SDF file (V2000), without the records of ``skip``, from 0.

    Every record must end with $$$$. Where the file is read, and not its cache, warns once of
    records that state a charge or a spin, once of those whose bonds leave room for hydrogens that
    are not there, and once of those that are flat and not marked as "3D": data sets have flat
    molecules, so these are no error here.
    """
    z, pos = [], []
    charged, open_, flat = {}, [], []
    blocks = reader.blocks(lines(path))
    for number, block in enumerate(over(blocks, f"reading {path.name}")):
        if not block.ended:
            raise ValueError(f"{path} is cut off: molecule {number + 1} has no end ($$$$)")
        if number in skip:
            continue
        try:
            record = reader.parsed(block)
        except ValueError as error:
            raise ValueError(f"{path} is damaged at molecule {number + 1}: {error}") from error
        z.append(record.z)
        pos.append(record.pos)
        if record.charge or record.unpaired:
            charged[number + 1] = f"charge {record.charge}, {record.unpaired} unpaired electrons"
        if record.implied:
            open_.append(number + 1)
        if record.flat and record.dimension.upper() != "3D":
            flat.append(number + 1)
    if not z:
        raise ValueError(f"{path} holds no molecules")
    warn_of_charges(charged, len(z), f"{path}: ", stacklevel=3)
    for numbers, text in (
        (open_, "seem to lack hydrogens, by their bonds"),
        (flat, 'have 0 for every z and are not marked as "3D": they may be drawings'),
    ):
        if numbers:
            warnings.warn(
                f"{path}: {len(numbers)} of {len(z)} molecules {text} (molecule {numbers[0]})",
                stacklevel=2,
            )
    counts = np.array([len(atoms) for atoms in z])
    return {"z": np.concatenate(z), "pos": np.concatenate(pos), "counts": counts}


def table(path: Path) -> tuple[list[str], np.ndarray]:
    """Header and values of a CSV file whose first column is a name; empty cells are NaN.

    Blank lines are passed over. A row is a line: no quote may hide the end of one.
    """
    rows = csv.reader(lines(path), strict=True)
    header: list[str] = []
    numbers = []
    for row in _single_lines(path, rows):
        if not "".join(row).strip():
            continue
        if not header:
            header = row
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{path} must have {len(header)} columns, got {len(row)} in line {rows.line_num}"
            )
        try:
            numbers.append([as_number(cell) if cell.strip() else np.nan for cell in row[1:]])
        except ValueError as error:
            raise ValueError(
                f"{path} has a cell that is not a number in line {rows.line_num}: {error}"
            ) from error
    if not header:
        raise ValueError(f"{path} has no header")
    return header[1:], np.array(numbers, np.float64).reshape(len(numbers), len(header) - 1)


def _single_lines(path: Path, rows: Any) -> Iterator[list[str]]:
    last = 0
    try:
        for row in rows:
            if rows.line_num > last + 1:
                raise csv.Error("a quote that is not closed in its line")
            last = rows.line_num
            yield row
    except csv.Error as error:
        raise ValueError(f"{path} is no table, in line {last + 1}: {error}") from error


def load_pt(path: Path, weights_only: bool) -> Any:
    """What torch saved in a file; with ``weights_only`` tensors and torch_geometric's Data only.

    ValueError: the file is damaged, or it needs more than that.
    """
    from torch_geometric.data import data, storage

    modules = ((data, ("Data", "DataEdgeAttr", "DataTensorAttr")), (storage, ("GlobalStorage",)))
    known = torch.serialization.get_safe_globals()  # what is of them, the context would remove
    safe = [getattr(module, n) for module, names in modules for n in names if hasattr(module, n)]
    safe = [one for one in safe if one not in known]
    check_archive(path)
    try:
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error):
            raise ValueError(f"{path} cannot be read: {error}") from error
        found = str(error).split("GLOBAL ")[-1].split(" was")[0]
        raise ValueError(
            f"{path} holds more than tensors ({found}); loading it can run code of whoever made "
            "it: weights_only=False does"
        ) from error
    except Exception as error:  # a damaged file raises whatever its bytes spell
        raise ValueError(f"{path} cannot be read by torch.load: {error}") from error


def data_list(path: Path, targets: int, weights_only: bool = True) -> Arrays:
    """z, pos, counts and y [B, targets] of a list of ``Data(z, pos, y)`` (or of dictionaries)."""
    loaded = load_pt(path, weights_only)
    if not isinstance(loaded, Sequence) or isinstance(loaded, str):
        raise ValueError(f"{path} must hold a list of Data, got {type(loaded).__name__}")
    if not len(loaded):
        raise ValueError(f"{path} holds no molecules")
    z, pos, y = [], [], []
    for number, item in enumerate(over(loaded, f"reading {path.name}")):
        try:
            fields = [item[name] for name in ("z", "pos", "y")]
        except Exception as error:  # whatever else it may hold
            raise ValueError(
                f"{path} must hold Data with z, pos and y; missing in molecule {number}: {error}"
            ) from error
        try:
            arrays = [numbers_of(field) for field in fields]
        except TypeError as error:
            raise ValueError(
                f"{path} must hold tensors z, pos and y, not so in molecule {number}: {error}"
            ) from error
        own_z, own_pos, own_y = arrays
        if own_z.ndim != 1:
            raise ValueError(
                f"z of molecule {number} in {path} must have one dimension, got {own_z.ndim}"
            )
        if own_pos.shape != (len(own_z), 3):
            raise ValueError(
                f"pos of molecule {number} in {path} must have shape [{len(own_z)}, 3], "
                f"got {list(own_pos.shape)}"
            )
        if own_y.size != targets:
            raise ValueError(
                f"{path} must have {targets} targets, got {own_y.size} in molecule {number}"
            )
        z.append(whole(path, "z", own_z))
        pos.append(own_pos)
        y.append(own_y.reshape(1, -1))
    return {
        "z": np.concatenate(z),
        "pos": np.concatenate(pos),
        "counts": np.array([len(atoms) for atoms in z]),
        "y": np.concatenate(y),
    }


def numbers_of(field: object) -> np.ndarray:
    """A tensor of real numbers as NumPy has it; TypeError for anything else."""
    if not isinstance(field, torch.Tensor):
        raise TypeError(f"got {type(field).__name__}")
    plain = field.layout == torch.strided and field.device.type == "cpu" and not field.is_quantized
    if not plain or field.is_complex() or field.dtype in (torch.bool, torch.bfloat16):
        raise TypeError(f"got {field.dtype}, {field.layout} on {field.device}")
    return field.detach().numpy()


def in_angstrom(path: Path, arrays: Arrays, sample: int = 200) -> None:
    """ValueError where the atoms are as far apart as if the unit of the positions were bohr.

    The nearest neighbour of most atoms is 0.96 to 1.5 Å away, 1.8 to 2.9 bohr.
    """
    pos, ends = arrays["pos"], np.cumsum(arrays["counts"])
    nearest = []
    for end, n in list(zip(ends, arrays["counts"]))[:sample]:
        if n > 1:
            one = pos[end - n : end].astype(np.float64)
            squares = ((one[:, None] - one[None]) ** 2).sum(-1) + np.diag(np.full(n, np.inf))
            nearest.append(np.sqrt(squares.min(1)))
    typical = float(np.median(np.concatenate(nearest))) if nearest else 1.1
    if not 0.6 < typical < 1.7:
        raise ValueError(
            f"the nearest neighbours of the atoms in {path} are {typical:.3g} apart (median): the "
            'positions are not in Å; position_unit="bohr" converts them'
        )
