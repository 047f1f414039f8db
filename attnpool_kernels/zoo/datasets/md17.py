"""MD17: trajectories of single molecules with energies and forces.

Chmiela et al., Sci. Adv. 3, e1603015 (2017), DFT (PBE+vdW-TS); Chmiela et al., Nat. Commun. 9, 3887
(2018), CCSD(T), aspirin CCSD; Christensen and von Lilienfeld, Mach. Learn.: Sci. Technol. 1, 045018
(2020), revised DFT.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..molecules import Split, Target
from .contents import BOHR, HARTREE, KCAL_PER_MOL, Contents, packed, whole
from .files import Download, Folder, arrays
from .splits import shuffled

SEEDS = (0, 1, 2, 3, 4)  # of the DFT sets, and ours; the CCSD(T) sets come divided and have 42
CCSD_SEED = 42
TARGETS = (Target("energy", "eV"),)
LEVELS = ("dft", "revised", "fhi-aims", "ccsd(t)")
ENERGY_UNITS = {"kcal/mol": KCAL_PER_MOL, "eV": 1.0, "hartree": HARTREE, "Ha": HARTREE}
LENGTH_UNITS = {"Ang": 1.0, "Angstrom": 1.0, "bohr": BOHR, "Bohr": BOHR, "au": BOHR}
WHERE = (
    "get the .npz or .zip of the molecule from the MD17 data sets of quantum-machine.org (sGDML), "
    "or rmd17.tar.bz2 of Materials Cloud, as torch_geometric.datasets.MD17 does; "
    "download=True does too"
)


def read(
    folder: Folder,
    *,
    molecule: str | None = None,
    level: str = "dft",
    train: int | None = None,
    val: int | None = None,
) -> Contents:
    """A trajectory in MD17's format: z [n], R [M, n, 3], E [M], F [M, n, 3] in kcal/mol and Å.

    Args:
        folder: with the file, or the root of ``torch_geometric.datasets.MD17``; or the file, an
            .npz of this format under any name, or for CCSD(T) a .zip or its ``-train.npz``.
        molecule: "aspirin", "ethanol", ...; not needed where a file is given.
        level: "dft", "revised" (fields nuclear_charges, coords, energies, forces), "fhi-aims"
            (benzene of 2018) or "ccsd(t)", which for aspirin is CCSD.
        train, val: frames to train on (950) and to validate on (50) of a DFT set; the rest is the
            test set. Drawn by ``random_split`` with the seeds 0 to 4: these splits are ours.

    The CCSD(T) sets come as a training and a test set; the seed 42 halves the latter into
    validation and test, as Buterez et al. did. Units are kcal/mol and Å unless the fields
    ``e_unit`` and ``r_unit`` of the file say otherwise ("eV", "hartree", "bohr").
    """
    level = level.lower()
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    if level == "ccsd(t)":
        if train is not None or val is not None:
            raise ValueError("train and val must not be given: the CCSD(T) sets come divided")
        path, parts = _divided(folder, molecule)
        frames = [_frames(path, part) for part in parts]
        if not np.array_equal(frames[0][0][0], frames[1][0][0]):
            raise ValueError(f"{path}: training and test set must have the same atoms")
        z, pos, energy, forces = (np.concatenate([f[i] for f in frames]) for i in range(4))
        splits = {CCSD_SEED: _halved(len(frames[0][0]), len(frames[1][0]))}
    else:
        path = folder.file or _find(folder, molecule, level)
        folder.check(path)
        names = ("nuclear_charges", "coords") if _is_revised(path, level) else ("z", "R")
        z, pos, energy, forces = _frames(path, arrays(path, names))
        splits = _drawn(path, len(z), 950 if train is None else train, 50 if val is None else val)
    frames_, atoms = z.shape
    counts = np.full(frames_, atoms)
    molecules = packed(
        path, z.reshape(-1), pos.reshape(-1, 3), counts, energy[:, None], forces.reshape(-1, 3)
    )
    return Contents(path, molecules, TARGETS, splits)


def _is_revised(path: Path, level: str) -> bool:
    return level == "revised" or path.name.startswith("rmd17_")


def _source(molecule: str | None, level: str) -> tuple[str, str]:
    """Name of a set in torch_geometric, and of its file."""
    from torch_geometric.datasets import MD17

    known = {}
    for name, file in MD17.file_names.items():
        if name.startswith("revised "):
            found = ("revised", name.removeprefix("revised "))
        elif " CCSD" in name:
            found = ("ccsd(t)", name.split(" CCSD")[0])
        elif name.endswith(" FHI-aims"):
            found = ("fhi-aims", name.removesuffix(" FHI-aims"))
        else:
            found = ("dft", name)
        if found[0] == level:
            known[found[1]] = (name, file)
    if molecule not in known:
        raise ValueError(
            f"molecule must be one of {', '.join(known)} at level {level}, got {molecule!r}"
        )
    return known[molecule]


def _find(folder: Folder, molecule: str | None, level: str) -> Path:
    name, file = _source(molecule, level)
    found = folder.find(file, f"{name}/raw/{file}", f"rmd17/npz_data/{file}")
    if found is not None:
        return found
    download = None
    if folder.download:
        from torch_geometric.datasets import MD17

        url = MD17.revised_url if level == "revised" else f"{MD17.gdml_url}/{file}"
        download = Download(url, (file,))
    return folder.need(file, download)


def _divided(folder: Folder, molecule: str | None) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """The path, and the training and the test set of a CCSD(T) set."""
    path = folder.file
    if path is None:
        name, file = _source(molecule, "ccsd(t)")
        parts = [f"{file[:-4]}-train.npz", f"{file[:-4]}-test.npz"]
        path = folder.find(parts[0], f"{name}/raw/{parts[0]}", file)
        if path is None:
            download = None
            if folder.download:
                from torch_geometric.datasets import MD17

                download = Download(f"{MD17.gdml_url}/{file}", tuple(parts))
            path = folder.need(parts[0], download)
    folder.check(path)
    if path.suffix == ".zip":
        return path, _zipped(path)
    if not path.name.endswith("-train.npz"):
        raise ValueError(f"{path} must be a .zip or end with -train.npz, with -test.npz beside it")
    test = path.with_name(path.name.replace("-train.npz", "-test.npz"))
    if not test.exists():
        raise FileNotFoundError(f"{test} does not exist, the other half of {path.name}; {WHERE}")
    folder.check(test)
    return path, [arrays(part, ("z", "R", "E", "F")) for part in (path, test)]


def _zipped(path: Path) -> list[dict[str, np.ndarray]]:
    parts = []
    try:
        with zipfile.ZipFile(path) as archive:
            for end in ("-train.npz", "-test.npz"):
                names = [name for name in archive.namelist() if name.endswith(end)]
                if len(names) != 1:
                    raise ValueError(f"one file *{end} is expected, got {archive.namelist()}")
                parts.append(arrays(io.BytesIO(archive.read(names[0])), ("z", "R", "E", "F")))
    except Exception as error:  # a damaged file raises whatever its bytes spell
        raise ValueError(f"{path} cannot be read: {error}") from error
    return parts


def _frames(path: Path, stored: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """z [M, n], positions [M, n, 3] in Å, energies [M] in eV, forces [M, n, 3] in eV/Å."""
    fields = []
    for names in (("z", "nuclear_charges"), ("R", "coords"), ("E", "energies"), ("F", "forces")):
        found = [name for name in names if name in stored]
        if not found:
            raise ValueError(f"{path} must hold {' or '.join(names)}, got {', '.join(stored)}")
        fields.append(stored[found[0]])
        if fields[-1].dtype.kind not in "iuf":
            raise ValueError(f"{found[0]} of {path} must be real numbers, got {fields[-1].dtype}")
    z, pos, energy, forces = fields
    if z.ndim != 1 or pos.ndim != 3 or pos.shape[1:] != (len(z), 3) or len(pos) == 0:
        raise ValueError(
            f"{path} must hold z [n] and R [M, n, 3], got {list(z.shape)} and {list(pos.shape)}"
        )
    if forces.shape != pos.shape or energy.size != len(pos):
        raise ValueError(
            f"{path} must hold F {list(pos.shape)} and E [{len(pos)}], got {list(forces.shape)} "
            f"and {list(energy.shape)}"
        )
    if "lattice" in stored and np.any(stored["lattice"]):
        raise ValueError(f"{path} is periodic, it holds a lattice, and no model here is")
    energy_unit = _unit(path, stored, "e_unit", "kcal/mol", ENERGY_UNITS)
    length_unit = _unit(path, stored, "r_unit", "Ang", LENGTH_UNITS)
    return (
        np.broadcast_to(whole(path, "z", z), (len(pos), len(z))),
        pos.astype(np.float64) * length_unit,
        energy.reshape(-1).astype(np.float64) * energy_unit,
        forces.astype(np.float64) * (energy_unit / length_unit),
    )


def _unit(
    path: Path, stored: Mapping[str, np.ndarray], field: str, default: str, known: dict[str, float]
) -> float:
    if field not in stored:
        return known[default]
    given = stored[field].tolist()
    given = given.decode("utf-8", "replace") if isinstance(given, bytes) else str(given)
    if given not in known:
        raise ValueError(f"{field} of {path} must be one of {', '.join(known)}, got {given!r}")
    return known[given]


def _halved(train: int, rest: int) -> Split:
    drawn = shuffled((0, rest // 2, rest - rest // 2), [CCSD_SEED])[CCSD_SEED]
    return Split(torch.arange(train, device="cpu"), train + drawn.val, train + drawn.test)


def _drawn(path: Path, count: int, train: int, val: int) -> dict[int, Split]:
    if train < 1 or val < 0 or train + val > count:
        raise ValueError(
            f"train and val must be positive and together at most the {count} frames of {path}, "
            f"got {train} and {val}"
        )
    return shuffled((train, val, count - train - val), SEEDS)
