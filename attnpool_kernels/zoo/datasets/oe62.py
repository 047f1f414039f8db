"""OE62: 61480 organic molecules, orbital energies, and orbital coefficients of the atoms.

Stuke et al., Sci. Data 7, 58 (2020); database with coefficients of Chen et al., Chem. Sci. 14, 4913
(2023); splits of Buterez et al., Commun. Chem. 2023.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import torch

from ..molecules import Split, Target
from ..progress import over
from .contents import BOHR, HARTREE, KCAL_PER_MOL, Contents, packed, whole
from .files import Folder, arrays, check_database

SEEDS = (0, 1, 2, 3, 4)  # the number at the end of the name of a split file
FILE = "dataset_OE62_all.db"
# Properties of the database that become targets, where it has them; all in eV.
PROPERTIES = {"HOMO": "homo", "LUMO": "lumo", "GAP": "gap", "IP": "ip"}
TARGETS = tuple(Target(name, "eV") for name in PROPERTIES.values())
ORBITALS = {"homo": "coeff", "lumo": "coeff_lumo"}
UNITS = {
    "eV": 1.0,
    "Ha": HARTREE,
    "Hartree": HARTREE,
    "hartree": HARTREE,
    "kcal/mol": KCAL_PER_MOL,
    "Ang": 1.0,
    "Angstrom": 1.0,
    "Bohr": BOHR,
    "bohr": BOHR,
    "a0": BOHR,
}
WHERE = (
    f"get {FILE} from the GitLab repository kchen/localized-intensive-property-prediciton of "
    "gitlab.mpcdf.mpg.de, and the folder SchNet_OE62/splits of "
    "davidbuterez/attention-based-pooling-for-quantum-properties on GitHub"
)


def read(
    folder: Folder, *, orbital: str | None = "homo", coefficients: str | None = None
) -> Contents:
    """OE62 from SchNetPack's database (ASE, SQLite) and the five split files.

    Args:
        folder: with ``dataset_OE62_all.db`` and, there or in ``splits/``,
            ``split_32000_19480_10000_{0..4}.npz`` (train_idx, val_idx, test_idx); or the .db file.
        orbital: whose coefficients become ``Molecules.coefficients``: "homo", "lumo", or None for
            none. The database has them of one orbital, ``coeff``; Chen et al. study the HOMO.
        coefficients: name of the property instead. The published programs used ``coeff`` with the
            LUMO too; orbital="lumo", coefficients="coeff" restates that.

    Targets are HOMO, LUMO, GAP and IP, as far as the database has them. Without units in its
    metadata (SchNetPack 1) they are in eV and positions in Å; against a column ``HOMO_au`` that is
    checked.
    """
    if orbital is not None and orbital not in ORBITALS:
        raise ValueError(f"orbital must be one of {', '.join(ORBITALS)} or None, got {orbital!r}")
    path = folder.file or folder.need(FILE)
    folder.check(path)
    key = None if orbital is None else coefficients or ORBITALS[orbital]
    found = folder.cached(path, 1, lambda: _database(path))
    names = [p for p in PROPERTIES if p in found]
    if not names:
        raise ValueError(f"{path} has none of the properties {', '.join(PROPERTIES)}")
    if "HOMO" in found and "HOMO_au" in found:
        ratio = float(np.nanmedian(found["HOMO"] / found["HOMO_au"])) / HARTREE
        if abs(ratio - 1) > 0.01:
            raise ValueError(f"HOMO in {path} is not in eV: it is {ratio:.4g} times HOMO_au in eV")
    if key is not None and f"atoms/{key}" not in found:
        held = ", ".join(n.removeprefix("atoms/") for n in found if n.startswith("atoms/"))
        raise ValueError(
            f"{path} has no coefficients {key!r} of the {orbital}, it has: {held or 'none'}; "
            "coefficients= names the property, orbital=None goes without"
        )
    y = np.stack([found[name] for name in names], axis=1)
    molecules = packed(
        path,
        found["z"],
        found["pos"],
        found["counts"],
        y,
        coefficients=None if key is None else found[f"atoms/{key}"],
    )
    targets = tuple(Target(PROPERTIES[name], "eV") for name in names)
    return Contents(path, molecules, targets, _splits(folder, path, len(molecules)))


def _database(path: Path) -> dict[str, np.ndarray]:
    """Structures, properties of molecules by name, and of atoms as ``atoms/<name>``."""
    from ase.db import connect

    z, pos, periodic = [], [], 0
    values: dict[str, list[np.ndarray]] = {}
    check_database(path)
    try:
        with connect(str(path), type="db", use_lock_file=False) as database:
            metadata = database.metadata
            units = dict(metadata.get("_property_unit_dict", {}))
            length = metadata.get("_distance_unit", "Ang")
            rows = database.select()
            for row in over(rows, f"reading {path.name}", len(database)):
                periodic += bool(np.any(row.pbc))
                z.append(row.numbers)
                pos.append(row.positions)
                for name, value in row.data.items():
                    values.setdefault(name, []).append(np.asarray(value, np.float64).reshape(-1))
    except Exception as error:  # a damaged file raises whatever its bytes spell
        raise ValueError(f"{path} cannot be read as a database of ASE: {error!r}") from error
    if not z:
        raise ValueError(f"{path} holds no molecules")
    if periodic:
        warnings.warn(
            f"{path}: {periodic} of {len(z)} structures are periodic; they are read as molecules, "
            "without images",
            stacklevel=4,
        )
    counts = np.array([len(atoms) for atoms in z])
    found = {"z": np.concatenate(z), "pos": np.concatenate(pos), "counts": counts}
    found["pos"] = found["pos"] * _factor(path, "positions", length)
    for name, listed in values.items():
        sizes = np.array([len(value) for value in listed])
        if len(sizes) != len(counts):
            raise ValueError(f"{path} has {name} for {len(sizes)} of {len(counts)} molecules")
        if name in PROPERTIES or name in ("HOMO_au",):
            if (sizes != 1).any():
                raise ValueError(f"{name} of {path} must be a number for every molecule")
            factor = _factor(path, name, units.get(name)) if name in PROPERTIES else 1.0
            found[name] = np.concatenate(listed) * factor
        elif (sizes == counts).all():
            found[f"atoms/{name}"] = np.concatenate(listed)
        elif "coeff" in name:
            raise ValueError(f"{name} of {path} must be a number for every atom")
    return found


def _factor(path: Path, name: str, unit: str | None) -> float:
    if unit is None:
        return 1.0
    if unit not in UNITS:
        raise ValueError(f"unit of {name} in {path} must be one of {', '.join(UNITS)}, got {unit}")
    return UNITS[unit]


def _splits(folder: Folder, path: Path, count: int) -> dict[int, Split]:
    splits: dict[int, Split] = {}
    files: dict[int, Path] = {}
    for place in (path.parent, path.parent / "splits"):
        for file in sorted(place.glob("split_*.npz")):
            number = re.search(r"_(\d+)\.npz$", file.name)
            if number is None:
                continue
            folder.check(file)
            seed, split = int(number[1]), _split(file, count)
            if seed in splits and not _equal(splits[seed], split):
                raise ValueError(
                    f"{files[seed]} and {file} are both split {seed}, and they differ: one must go"
                )
            files[seed], splits[seed] = file, split
    if not splits:
        raise FileNotFoundError(
            f"no split_*_<number>.npz beside {path} or in {path.parent / 'splits'}; {WHERE}"
        )
    return dict(sorted(splits.items()))


def _equal(one: Split, other: Split) -> bool:
    parts = ((one.train, other.train), (one.val, other.val), (one.test, other.test))
    return all(torch.equal(a, b) for a, b in parts)


def _split(path: Path, count: int) -> Split:
    stored = arrays(path, ("train_idx", "val_idx", "test_idx"))
    parts = [whole(path, f"{x}_idx", stored[f"{x}_idx"]) for x in ("train", "val", "test")]
    if any(part.ndim != 1 for part in parts):
        raise ValueError(f"{path} must hold vectors of indices")
    together = np.concatenate(parts)
    if len(together) and (together.min() < 0 or together.max() >= count):
        raise ValueError(
            f"{path} must hold indices from 0 to {count - 1}, got {together.min()} to "
            f"{together.max()}"
        )
    if len(np.unique(together)) != len(together):
        raise ValueError(f"{path} has molecules in two parts of the split, or twice in one")
    return Split(*(torch.from_numpy(part) for part in parts))
