"""QMugs: drug-like molecules of up to 228 atoms, some 2 million conformers, GFN2-xTB and DFT.

Isert et al., Sci. Data 9, 273 (2022). File and splits of Buterez et al., Commun. Chem. 2023.
"""

from __future__ import annotations

import numpy as np

from ..molecules import Split, Target
from . import structures
from .contents import BOHR, HARTREE, Contents, packed
from .files import Folder
from .splits import eighty_ten_ten

SEEDS = (242566, 710365, 828444, 170963, 744683)
# The target of index i in the source is the i-th here.
_GFN2 = (
    "total_energy",
    "atomic_energy",
    "formation_energy",
    "total_enthalpy",
    "total_free_energy",
    "homo",
    "lumo",
    "gap",
    "fermi_level",
    "dispersion_coefficient",
    "polarizability",
)
_DFT = (
    "total_energy",
    "atomic_energy",
    "formation_energy",
    "xc_energy",
    "nuclear_repulsion_energy",
    "one_electron_energy",
    "two_electron_energy",
    "homo",
    "lumo",
    "gap",
)
TARGETS = tuple(
    Target(f"{level}_{name}", "a.u." if name in _GFN2[-2:] else "eV")
    for level, names in (("gfn2", _GFN2), ("dft", _DFT))
    for name in names
)
FILE = "QMugs_3D_torch_geometric.pt"
WHERE = (
    f"get {FILE} (2 GB) by the OneDrive link in the README of "
    "davidbuterez/attention-based-pooling-for-quantum-properties on GitHub"
)


def read(
    folder: Folder,
    *,
    weights_only: bool = True,
    energy_unit: str = "hartree",
    position_unit: str = "angstrom",
    train: int | None = None,
) -> Contents:
    """QMugs from ``QMugs_3D_torch_geometric.pt``, a list of Data with 21 targets.

    Args:
        folder: with the file.
        weights_only: of ``torch.load``; False loads any pickle, which can run code.
        energy_unit, position_unit: of the file, which states none: "hartree" or "eV", "angstrom"
            or "bohr". Orbital energies and distances that cannot be in these units are refused.
        train: train on the first so many molecules of each published part to train on (which is in
            random order), to see how errors fall with the size. None: all of them.

    Dispersion coefficient and polarizability keep the atomic units of the source.
    """
    for name, given, known in (
        ("energy_unit", energy_unit, ("hartree", "eV")),
        ("position_unit", position_unit, ("angstrom", "bohr")),
    ):
        if given not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, got {given!r}")
    path = folder.find(FILE) or folder.file
    if path is None:
        path = folder.need(FILE)
    folder.check(path)
    found = folder.cached(path, 1, lambda: structures.data_list(path, len(TARGETS), weights_only))
    if position_unit == "bohr":
        found["pos"] = found["pos"].astype(np.float64) * BOHR
    structures.in_angstrom(path, found)
    y = found["y"].astype(np.float64)
    names = [target.name for target in TARGETS]
    homo = float(np.nanmedian(np.abs(y[:, names.index("dft_homo")])))
    if (homo > 1.5) != (energy_unit == "eV"):  # -0.2 to -0.5 hartree, -5 to -14 eV
        raise ValueError(
            f"dft_homo in {path} is {homo:.3g} (median of the absolute values), which is not in "
            f"{energy_unit}; see energy_unit"
        )
    if energy_unit == "hartree":
        y *= np.array([HARTREE if target.unit == "eV" else 1.0 for target in TARGETS])
    molecules = packed(path, found["z"], found["pos"], found["counts"], y)
    splits = eighty_ten_ten(len(molecules), SEEDS)
    if train is not None:
        most = len(next(iter(splits.values())).train)
        if isinstance(train, bool) or not isinstance(train, int) or not 1 <= train <= most:
            raise ValueError(f"train must be an int from 1 to {most}, got {train!r}")
        splits = {seed: Split(s.train[:train], s.val, s.test) for seed, s in splits.items()}
    return Contents(path, molecules, TARGETS, splits)
