"""What a reader hands over, and the checks that hold for every data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ase.units
import numpy as np
import torch

from ..molecules import Molecules, MoleculeSet, Split, Target
from .splits import kept

# CODATA 2014, as ASE has it: 27.211386024 eV, 0.0433641039 eV and 0.5291772106 Å.
HARTREE = ase.units.Hartree
KCAL_PER_MOL = ase.units.kcal / ase.units.mol
BOHR = ase.units.Bohr


@dataclasses.dataclass
class Contents:
    """Molecules, targets and splits of a file, as it holds them, but in Å and eV."""

    path: Path
    molecules: Molecules
    targets: tuple[Target, ...]
    splits: dict[int, Split]


def packed(
    path: Path,
    z: np.ndarray,
    pos: np.ndarray,
    counts: np.ndarray,
    y: np.ndarray,
    forces: np.ndarray | None = None,
    coefficients: np.ndarray | None = None,
) -> Molecules:
    """Molecules from arrays of all atoms and the number of atoms [B] of each molecule."""
    if len(counts) == 0:
        raise ValueError(f"{path} holds no molecules")
    if y.ndim != 2 or len(y) != len(counts):
        raise ValueError(f"{path} has {len(counts)} molecules and targets of shape {list(y.shape)}")

    def of(values: np.ndarray, dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))

    ptr = np.concatenate([[0], np.cumsum(whole(path, "the numbers of atoms", counts))])
    try:
        return Molecules(
            of(whole(path, "z", z), np.int64),
            of(pos, np.float64),
            of(ptr, np.int64),
            of(y, np.float64),
            None if forces is None else of(forces, np.float64),
            None if coefficients is None else of(coefficients, np.float64),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def whole(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """The values as int64; ValueError where that changes one."""
    with np.errstate(invalid="ignore"):
        out = np.asarray(values).astype(np.int64)
    if not np.array_equal(out, values):
        raise ValueError(f"{name} of {path} must be whole numbers, got others")
    return out


def checked(name: str, contents: Contents, drop_missing: bool) -> MoleculeSet:
    """The data set; ValueError for atoms or targets that cannot be, naming file, field and count.

    drop_missing: leave out molecules of which a target is missing (NaN or infinite), from the
    splits too, which otherwise stay the published ones.
    """
    molecules, targets, path = contents.molecules, contents.targets, contents.path
    splits = contents.splits
    empty = int((molecules.ptr.diff() == 0).sum())
    if empty:
        raise ValueError(f"{path} has {empty} molecules without atoms")
    wrong = int(((molecules.z < 1) | (molecules.z > 118)).sum())
    if wrong:
        raise ValueError(f"{path} has {wrong} atoms whose atomic number is not from 1 to 118")
    for field in ("pos", "forces", "coefficients"):
        values = getattr(molecules, field)
        if values is not None and not values.isfinite().all():
            count = int((~values.isfinite()).sum())
            raise ValueError(f"{path} has {count} values in {field} that are not finite")
    assert molecules.y is not None
    if molecules.y.shape[1] != len(targets):
        raise ValueError(f"{path} must have {len(targets)} targets, got {molecules.y.shape[1]}")
    missing = ~molecules.y.isfinite()
    if missing.any():
        counts = {t.name: int(n) for t, n in zip(targets, missing.sum(0)) if n}
        if not drop_missing:
            listed = ", ".join(f"{target} ({n})" for target, n in counts.items())
            raise ValueError(
                f"{path} has molecules without a value: {listed}; drop_missing=True leaves "
                f"these {int(missing.any(1).sum())} molecules out"
            )
        keep = ~missing.any(1)
        if not keep.any():
            raise ValueError(f"{path} has no molecule with a value for every target")
        molecules, splits = molecules.select(keep.nonzero()[:, 0]), kept(splits, keep)
    return MoleculeSet(name, molecules, targets, splits)
