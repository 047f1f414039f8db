"""QM9: 130831 molecules of up to 29 atoms, 19 properties (B3LYP/6-31G(2df,p)).

Ramakrishnan et al., Sci. Data 1, 140022 (2014). Splits of Buterez et al., Commun. Chem. 2023.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from ..lines import lines
from ..molecules import Target
from . import structures
from .contents import HARTREE, KCAL_PER_MOL, Contents, packed
from .files import Download, Folder
from .splits import eighty_ten_ten

SEEDS = (844249, 787755, 420455, 700990, 791796)
# Index i of torch_geometric, and of the published programs up to 11, is the i-th. The second
# entries are the columns of gdb9.sdf.csv and the factors from its units.
_COLUMNS = (
    (Target("dipole_moment", "D"), "mu", 1.0),
    (Target("polarizability", "a0³"), "alpha", 1.0),
    (Target("homo", "eV"), "homo", HARTREE),
    (Target("lumo", "eV"), "lumo", HARTREE),
    (Target("gap", "eV"), "gap", HARTREE),
    (Target("electronic_spatial_extent", "a0²"), "r2", 1.0),
    (Target("zpve", "eV"), "zpve", HARTREE),
    (Target("energy_u0", "eV"), "u0", HARTREE),
    (Target("energy_u298", "eV"), "u298", HARTREE),
    (Target("enthalpy_h298", "eV"), "h298", HARTREE),
    (Target("free_energy_g298", "eV"), "g298", HARTREE),
    (Target("heat_capacity", "cal/(mol K)"), "cv", 1.0),
    (Target("atomization_energy_u0", "eV"), "u0_atom", KCAL_PER_MOL),
    (Target("atomization_energy_u298", "eV"), "u298_atom", KCAL_PER_MOL),
    (Target("atomization_enthalpy_h298", "eV"), "h298_atom", KCAL_PER_MOL),
    (Target("atomization_free_energy_g298", "eV"), "g298_atom", KCAL_PER_MOL),
    (Target("rotational_constant_a", "GHz"), "A", 1.0),
    (Target("rotational_constant_b", "GHz"), "B", 1.0),
    (Target("rotational_constant_c", "GHz"), "C", 1.0),
)
TARGETS = tuple(target for target, _, _ in _COLUMNS)
PROCESSED = ("processed/data_v3.pt", "data_v3.pt", "qm9_v3.pt")
WHERE = (
    "get qm9.zip of MoleculeNet (gdb9.sdf, gdb9.sdf.csv) and uncharacterized.txt of QM9 on "
    "figshare, as torch_geometric.datasets.QM9 does; download=True does too"
)


def read(folder: Folder, *, weights_only: bool = True) -> Contents:
    """QM9 from ``gdb9.sdf``, ``gdb9.sdf.csv`` and ``uncharacterized.txt``, else from PyG's storage.

    Args:
        folder: with the files, or the root of ``torch_geometric.datasets.QM9``
            (``raw/``, ``processed/data_v3.pt``), which has the same molecules in the same order,
            but in float32: total energies of 10⁴ eV are rounded to 10⁻³ eV there.
        weights_only: of ``torch.load``; False loads any pickle, which can run code.

    The 3054 molecules that ``uncharacterized.txt`` lists are left out.
    """
    stored = None if folder.find("gdb9.sdf") is not None else folder.find(*PROCESSED) or folder.file
    if stored is not None:
        folder.check(stored)
        found = _stored(folder, stored, weights_only)
        y, path = found["y"], stored
    else:
        path, values, listed = _raw(folder)
        skip = _uncharacterized(listed)
        found = folder.cached(path, _version(skip), lambda: structures.sdf(path, skip))
        y = _targets(values, skip)
    molecules = packed(path, found["z"], found["pos"], found["counts"], y)
    return Contents(path, molecules, TARGETS, eighty_ten_ten(len(molecules), SEEDS))


def _raw(folder: Folder) -> list[Path]:
    sdf = listed = None
    if folder.download:
        from torch_geometric.datasets import QM9

        sdf = Download(QM9.raw_url, ("gdb9.sdf", "gdb9.sdf.csv"))
        listed = Download(QM9.raw_url2, ("uncharacterized.txt",))
    paths = [folder.need("gdb9.sdf", sdf), folder.need("gdb9.sdf.csv", sdf)]
    paths.append(folder.need("uncharacterized.txt", listed))
    for path in paths:
        folder.check(path)
    return paths


def _version(skip: set[int]) -> int:
    """Of the cache: that of the reader and of the list, 2 and 48 bits of a digest."""
    listed = hashlib.sha256(repr(sorted(skip)).encode()).hexdigest()
    return 2 << 48 | int(listed[:12], 16)


def _uncharacterized(path: Path) -> set[int]:
    """Records to leave out, from 0. Nine lines of text, then a number at the start of each line.

    The list ends at the first line of anything else; ValueError for a number after that.
    """
    found: set[int] = set()
    end = 0
    for number, line in enumerate(lines(path), 1):
        first = (line.split() or [""])[0]
        if number <= 9 or not first:
            continue
        if not (first.isascii() and first.isdecimal()):
            end = end or number
        elif end:
            raise ValueError(
                f"{path} must list molecules from its tenth line on without other text between, "
                f"got {first} in line {number} after the text in line {end}"
            )
        elif int(first) < 1:
            raise ValueError(f"{path} must list molecules from 1 on, got {first} in line {number}")
        else:
            found.add(int(first) - 1)
    if not found:
        raise ValueError(f"{path} must list molecules from its tenth line on, and lists none")
    return found


def _targets(path: Path, skip: set[int]) -> np.ndarray:
    header, values = structures.table(path)
    absent = [column for _, column, _ in _COLUMNS if column not in header]
    if absent:
        raise ValueError(f"{path} lacks the columns {', '.join(absent)}")
    if skip and max(skip) >= len(values):
        raise ValueError(
            f"uncharacterized.txt lists molecule {max(skip) + 1} of the {len(values)} in {path}"
        )
    order = [header.index(column) for _, column, _ in _COLUMNS]
    keep = np.array([i for i in range(len(values)) if i not in skip], dtype=np.int64)
    return values[keep][:, order] * np.array([factor for _, _, factor in _COLUMNS])


def _stored(folder: Folder, path: Path, weights_only: bool) -> structures.Arrays:
    """From a collated data set of PyG (tensors and their slices), or from a list."""
    loaded = structures.load_pt(path, weights_only)
    if isinstance(loaded, list):
        del loaded
        return folder.cached(
            path, 1, lambda: structures.data_list(path, len(TARGETS), weights_only)
        )
    try:
        fields, slices = loaded[:2]
        tensors = [*(fields[name] for name in ("z", "pos", "y")), slices["z"]]
        z, pos, y, ptr = (structures.numbers_of(x) for x in tensors)
        if (z.ndim, pos.ndim, ptr.ndim) != (1, 2, 1):
            raise TypeError("z, pos or slices of other dimensions")
        counts = np.diff(ptr)
    except Exception as error:  # whatever else it may hold
        raise ValueError(
            f"{path} must be processed/data_v3.pt of torch_geometric.datasets.QM9: {error!r}"
        ) from error
    if y.ndim != 2 or y.shape[1] != len(TARGETS):
        raise ValueError(f"{path} must have {len(TARGETS)} targets, got shape {list(y.shape)}")
    return {"z": z, "pos": pos, "counts": counts, "y": y}
