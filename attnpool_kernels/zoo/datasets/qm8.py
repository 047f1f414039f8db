"""QM8: 21786 molecules of up to 26 atoms, two lowest excitations at four levels of theory.

Ramakrishnan et al., J. Chem. Phys. 143, 084111 (2015). Splits of Buterez et al., Commun. Chem.
2023.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..molecules import Target
from . import structures
from .contents import BOHR, HARTREE, Contents, packed
from .files import Download, Folder
from .splits import eighty_ten_ten

SEEDS = (291305, 259598, 999783, 490681, 159938)
# Index i of the source is the i-th: E1, E2, f1, f2 of CC2, PBE0/def2SVP, PBE0/def2TZVP, CAM.
TARGETS = tuple(
    Target(f"{kind}_{level}", "eV" if kind[0] == "e" else "a.u.")
    for level in ("cc2", "pbe0_svp", "pbe0_tzvp", "cam")
    for kind in ("e1", "e2", "f1", "f2")
)
FILE = "QM8_3D_torch_geometric.pt"
# The address that DeepChem's MoleculeNet loader has.
GDB8 = Download(
    "https://deepchemdata.s3-us-west-1.amazonaws.com/datasets/gdb8.tar.gz",
    ("qm8.sdf", "qm8.sdf.csv"),
)
WHERE = (
    "get gdb8.tar.gz of MoleculeNet (qm8.sdf and qm8.sdf.csv; download=True does), or "
    f"data/QM8/{FILE} of the repository "
    "davidbuterez/attention-based-pooling-for-quantum-properties on GitHub"
)


def read(folder: Folder, *, weights_only: bool = True, position_unit: str = "angstrom") -> Contents:
    """QM8 from ``qm8.sdf`` with ``qm8.sdf.csv``, else from ``QM8_3D_torch_geometric.pt``.

    Args:
        folder: with the files. The CSV has a name and then the 16 targets, by their position:
            its header names both basis sets of PBE0 alike.
        weights_only: of ``torch.load``; False loads any pickle, which can run code.
        position_unit: of the .pt file, which states none: "angstrom" or "bohr".

    Oscillator strengths (f1, f2) keep their unit. The published splits are of the .pt file, 17428,
    2179 and 2179 molecules; that its order is that of the SDF is assumed, not known.
    """
    if position_unit not in ("angstrom", "bohr"):
        raise ValueError(f"position_unit must be angstrom or bohr, got {position_unit!r}")
    stored = None if folder.find("qm8.sdf") is not None else folder.find(FILE) or folder.file
    if stored is None:
        path, values = folder.need("qm8.sdf", GDB8), folder.need("qm8.sdf.csv", GDB8)
        folder.check(path)
        folder.check(values)
        found = folder.cached(path, 2, lambda: structures.sdf(path)) | {"y": _targets(values)}
    else:
        path = stored
        folder.check(path)
        found = folder.cached(
            path, 1, lambda: structures.data_list(path, len(TARGETS), weights_only)
        )
        if position_unit == "bohr":
            found["pos"] = found["pos"].astype(np.float64) * BOHR
        structures.in_angstrom(path, found)
    factors = [HARTREE if target.unit == "eV" else 1.0 for target in TARGETS]
    y = found["y"].astype(np.float64) * np.array(factors)
    molecules = packed(path, found["z"], found["pos"], found["counts"], y)
    return Contents(path, molecules, TARGETS, eighty_ten_ten(len(molecules), SEEDS, val_extra=1))


def _targets(path: Path) -> np.ndarray:
    header, y = structures.table(path)
    kinds = [name[:2].lower() for name in header]
    if kinds != ["e1", "e2", "f1", "f2"] * 4:
        raise ValueError(
            f"{path} must have {len(TARGETS)} targets, four times E1, E2, f1, f2, got "
            f"{len(header)}: {', '.join(header)}"
        )
    return y
