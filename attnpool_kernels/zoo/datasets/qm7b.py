"""QM7b: 7211 molecules of up to 23 atoms, 14 properties.

Montavon et al., New J. Phys. 15, 095003 (2013); structures of Blum and Reymond, J. Am. Chem. Soc.
131, 8732 (2009). Splits of Buterez et al., Commun. Chem. 2023.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..molecules import Target
from .contents import BOHR, HARTREE, Contents, packed, whole
from .files import Folder, arrays, digest
from .splits import two_stage

SEEDS = (23887, 386333, 514094, 572909, 598587)
# The target of index i in the source is the i-th here.
TARGETS = (
    Target("first_excitation_zindo", "eV"),
    Target("electron_affinity_zindo", "eV"),
    Target("max_absorption_energy_zindo", "eV"),
    Target("atomization_energy_pbe0", "eV"),
    Target("homo_gw", "eV"),
    Target("homo_pbe0", "eV"),
    Target("homo_zindo", "eV"),
    Target("max_absorption_intensity_zindo", "arbitrary"),
    Target("ionization_potential_zindo", "eV"),
    Target("lumo_gw", "eV"),
    Target("lumo_pbe0", "eV"),
    Target("lumo_zindo", "eV"),
    Target("polarizability_scs", "Å³"),
    Target("polarizability_pbe0", "Å³"),
)
COUNT = 7211
SHA256 = "363566118d70040ef6018fa0759ca5fb06f4b4986e49d88f15761ba41e941cca"
PARTS = ("train", "validate", "test")
WHERE = (
    "get the folder data/QM7/QM7b_train_val_test_splits of the repository "
    "davidbuterez/attention-based-pooling-for-quantum-properties on GitHub, or the qm7b.npz "
    "made from it"
)


def read(folder: Folder, *, raw_units: bool = False, allow_pickle: bool = False) -> Contents:
    """QM7b from ``qm7b.npz`` or from the published split files.

    Args:
        folder: with ``qm7b.npz`` (fields z, pos in bohr, ptr, y in the source's units), or with
            ``<seed>/{train,validate,test}.npy`` of at least one seed. The molecules of those are
            put back into the order of the source, by the recipe of the splits.
        raw_units: leave the numbers as the file has them. The published programs used positions in
            bohr with cutoffs that were meant in Å, and targets in hartree; this restates that.
        allow_pickle: needed for the .npy files, which are pickles: loading them can run code of
            whoever made them.

    The units are inferred, the source states none: with bohr the C-H bonds are 1.10 Å long.
    ``qm7b.mat`` of quantum-machine.org has Coulomb matrices and no positions, and is refused.
    """
    path = folder.find("qm7b.npz") or folder.file
    if path is None:
        seeds = [seed for seed in SEEDS if folder.find(str(seed)) is not None]
        if seeds:
            return _pickled(folder, seeds, raw_units, allow_pickle)
        path = folder.find("qm7b.mat")
    if path is None:
        folder.missing("qm7b.npz", f"folders {SEEDS[0]}, ... of .npy files")
    assert path is not None
    asked = folder.check(path)
    if path.suffix == ".mat":
        raise ValueError(
            f"{path} has Coulomb matrices and no positions, so no model here can use it; {WHERE}"
        )
    stored = arrays(path, ("z", "pos", "ptr", "y"))
    if len(stored["y"]) == COUNT and asked is None and (found := digest(path)) != SHA256:
        raise ValueError(
            f"sha256 of {path} must be {SHA256}, got {found}: it was changed or damaged; "
            f'sha256="{found}" accepts it as it is'
        )
    if stored["ptr"].ndim != 1 or len(stored["ptr"]) < 2 or stored["ptr"][0] != 0:
        raise ValueError(f"{path}: ptr must begin with 0 and have an entry more than molecules")
    counts = np.diff(whole(path, "ptr", stored["ptr"]))
    return _contents(path, stored["z"], stored["pos"], counts, stored["y"], raw_units)


def _contents(path, z, pos, counts, y, raw_units: bool) -> Contents:
    targets: tuple[Target, ...] = TARGETS
    if y.ndim != 2 or y.shape[1] != len(TARGETS):
        raise ValueError(f"{path} must have {len(TARGETS)} targets, got shape {list(y.shape)}")
    if raw_units:
        targets = tuple(Target(t.name, "hartree" if t.unit == "eV" else t.unit) for t in TARGETS)
    else:
        pos = pos * BOHR
        y = y * np.array([HARTREE if t.unit == "eV" else 1.0 for t in TARGETS])
    molecules = packed(path, z, pos, counts, y)
    return Contents(path, molecules, targets, two_stage(len(molecules), SEEDS))


def _pickled(folder: Folder, seeds: list[int], raw_units: bool, allow_pickle: bool) -> Contents:
    files = {seed: [folder.find(f"{seed}/{part}.npy") for part in PARTS] for seed in seeds}
    for seed, paths in files.items():
        for part, path in zip(PARTS, paths):
            if path is None:
                folder.missing(f"{seed}/{part}.npy")
            else:
                folder.check(path)
    if not allow_pickle:
        raise ValueError(
            f"{files[seeds[0]][0]} is a pickle, and loading it can run code of whoever made it; "
            "allow_pickle=True loads it"
        )
    first: list | None = None
    for seed, paths in files.items():
        rows = _in_order([_rows(path) for path in paths if path is not None], seed, paths[0])
        if first is None:
            first = rows
        elif any(not _same(a, b) for a, b in zip(first, rows)) or len(first) != len(rows):
            raise ValueError(
                f"the files of split {seed} do not hold the molecules of split {seeds[0]}"
            )
    assert first is not None
    path = files[seeds[0]][0]
    try:
        counts = np.array([len(row[1]) for row in first])
        z = np.concatenate([row[1] for row in first])
        pos = np.concatenate([row[2] for row in first]).astype(np.float64)
        y = np.stack([np.asarray(row[3], dtype=np.float64) for row in first])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return _contents(path, z, pos, counts, y, raw_units)


def _rows(path: Path) -> np.ndarray:
    try:
        rows = np.load(path, allow_pickle=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes spell
        raise ValueError(f"{path} cannot be read as .npy: {error}") from error
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise ValueError(
            f"{path} must have rows of formula, z, pos, y, names; got shape {list(rows.shape)}"
        )
    return rows


def _in_order(parts: list[np.ndarray], seed: int, path: Path | None) -> list:
    split = two_stage(sum(map(len, parts)), [seed])[seed]
    index = (split.train, split.val, split.test)
    if [len(i) for i in index] != [len(rows) for rows in parts]:
        raise ValueError(
            f"{path} and its neighbours must have {[len(i) for i in index]} molecules, "
            f"got {[len(rows) for rows in parts]}"
        )
    ordered: list = [None] * sum(map(len, parts))
    for places, rows in zip(index, parts):
        for place, row in zip(places.tolist(), rows):
            ordered[place] = row
    return ordered


def _same(a, b) -> bool:
    return all(np.array_equal(a[i], b[i]) for i in (1, 2, 3))
