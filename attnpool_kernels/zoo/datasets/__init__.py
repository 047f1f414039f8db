"""The data sets of the zoo: ``load("qm7b", "folder or file")``.

Positions come in Å, energies in eV, whatever the file holds; every target states its unit.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Mapping
from types import ModuleType

from ..molecules import MoleculeSet, Target
from .contents import checked
from .files import Folder


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A row of the table: what the set is, and the module that reads it."""

    name: str
    summary: str

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"{__name__}.{self.name}")

    @property
    def where(self) -> str:
        """How to get the files."""
        return self.module.WHERE

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets, in the order of the source."""
        return self.module.TARGETS

    @property
    def seeds(self) -> tuple[int, ...]:
        """The split seeds; the first is the default."""
        return self.module.SEEDS

    @property
    def options(self) -> dict[str, object]:
        """Options of ``load`` that only this set has, with their defaults."""
        parameters = inspect.signature(self.module.read).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


_ROWS = (
    DataSet("qm7b", "7211 molecules, 14 properties (GW, PBE0, ZINDO)"),
    DataSet("qm8", "21786 molecules, 16 excitation energies and oscillator strengths"),
    DataSet("qm9", "130831 molecules, 19 properties (B3LYP)"),
    DataSet("qmugs", "drug-like molecules of up to 228 atoms, 21 properties (GFN2, DFT)"),
    DataSet("md17", "trajectories of one molecule, energies and forces (DFT, CCSD(T))"),
    DataSet("oe62", "61480 molecules, orbital energies and orbital coefficients of the atoms"),
)
DATASETS = {row.name: row for row in _ROWS}


def load(
    name: str,
    path: str | os.PathLike | None = None,
    *,
    download: bool = False,
    drop_missing: bool = False,
    sha256: str | Mapping[str, str] | None = None,
    cache: bool = True,
    **options,
) -> MoleculeSet:
    """A data set from local files, or downloaded.

    Args:
        name: a key of ``DATASETS``.
        path: the folder of the files as the source publishes them, or one of the files; default:
            ``./data/<name>``, then ``./data``.
        download: fetch files that are not there into ``path``; possible for qm8, qm9 and md17.
        drop_missing: leave out molecules without a value for every target instead of raising.
        sha256: digest that the main file must have (the first that ``read`` names), or digests by
            file name.
        cache: keep what took long to parse beside the file, as ``<file>.cache.npz``.
        options: of the set; see ``read`` of its module, e.g. ``datasets.md17.read``.

    Raises ValueError: unknown name or option, empty or damaged file, wrong digest, wrong number
    of targets, values that are not finite. FileNotFoundError: which file, and where to get it.

    Examples:
        >>> load("qm7b", "no such folder")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: ...
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    row = DATASETS[name]
    for option in options:
        if option not in row.options:
            known = ", ".join(row.options) or "none"
            raise ValueError(f"{name} has no option {option!r}; its options: {known}")
    folder = Folder(name, row.where, path, download, sha256, cache)
    contents = row.module.read(folder, **options)
    folder.all_checked()
    return checked(name, contents, drop_missing)
