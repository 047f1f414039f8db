"""Files of molecules, one molecule after another: memory does not grow with their number."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from . import sdf, xyz
from .datasets.files import check_database
from .lines import lines

if TYPE_CHECKING:
    import ase

    Found = tuple[ase.Atoms | None, sdf.Record | None]


def read_molecules(path: str | Path) -> list[ase.Atoms]:
    """All molecules of a file, see ``MoleculeFile``."""
    return [atoms for atoms in MoleculeFile(path) if atoms is not None]


class MoleculeFile:
    """Iterates over xyz and extended xyz, SDF and MOL (V2000), or what else ASE reads.

    A name that ends with .gz, .bz2 or .xz is read decompressed. In titles and comments bytes that
    are not UTF-8 do no harm.

    Raises ValueError for files without molecules, for molecules without atoms or with all atoms at
    one place, for periodic structures, for drawings, and for files that cannot be read to their
    end, naming the line in xyz and SDF. A drawing is an SDF record with "2D" in its second line
    and every z 0: its bonds have any length, so a prediction would have no meaning.

    Warns at the end, once for a file, where a prediction may be that of another molecule. Hydrogens
    are missing where the bonds of an SDF leave room for some at C, N and O, or where a molecule
    without bonds in its file has carbon and no hydrogen; the latter may be right (CO2), so it is
    read. An SDF record with every z 0 and neither "2D" nor "3D" may be a drawing. Of formats in
    which ASE reads one molecule it is said that there may be more. Charges and spins are put in
    ``atoms.info``, where ``Molecules.from_ase`` warns of them.

    Args:
        path: the file.
        wanted: whether a molecule, by its number from 0, is parsed and checked; None stands for it
            in the iteration otherwise. Default: all.
    """

    def __init__(
        self, path: str | Path, wanted: Callable[[int], bool] = lambda number: True
    ) -> None:
        self.path, self.wanted = Path(path), wanted
        self._file: IO[bytes] | None = None

    @property
    def position(self) -> int | None:
        """Bytes that have been read; None where that is not known, as of compressed files."""
        from ase.io.formats import get_compression

        if self._file is None or self._file.closed or get_compression(str(self.path))[1]:
            return None
        return self._file.tell()

    def __iter__(self) -> Iterator[ase.Atoms | None]:
        path, doubts = self.path, Doubts(self.path)
        if not path.is_file():
            raise FileNotFoundError(f"file must exist, got {path}")
        if _blank(path):
            raise ValueError(f"{path} is empty")
        kind, single = _format(path)
        number = -1
        for number, (atoms, record) in enumerate(self._found(kind)):
            if atoms is not None:
                _check(path, f"molecule {number}", atoms)
                doubts.see(number, atoms, record)
            yield atoms
        if number < 0:
            raise ValueError(f"{path} has no molecules")
        if single:
            warnings.warn(
                f"{path}: of the format {kind} ASE reads one molecule; if the file has more, they "
                "are not read",
                stacklevel=2,
            )
        doubts.warn()

    def _found(self, kind: str) -> Iterator[Found]:
        """Molecules without any check; ValueError for whatever a damaged line leads to."""
        try:
            yield from {"xyz": self._xyz, "sdf": self._sdf}.get(kind, lambda: self._other(kind))()
        except Exception as error:  # readers of ASE raise what they like
            reason = str(error).strip() or type(error).__name__
            raise ValueError(f"{self.path} cannot be read: {reason.splitlines()[0]}") from error

    def _lines(self) -> Iterable[str]:
        def watch(file: IO[bytes]) -> None:
            self._file = file

        return lines(self.path, watch)

    def _xyz(self) -> Iterator[Found]:
        for number, (start, frame) in enumerate(xyz.frames(self._lines())):
            yield (xyz.parsed(number, start, frame) if self.wanted(number) else None), None

    def _sdf(self) -> Iterator[Found]:
        for number, block in enumerate(sdf.blocks(self._lines())):
            record = sdf.parsed(block) if self.wanted(number) else None
            yield None if record is None else _atoms(record), record

    def _other(self, kind: str) -> Iterator[Found]:
        import ase.io

        if kind == "db":
            check_database(self.path)
        found: Any = ase.io.iread(self.path, index=":", format=kind, do_not_split_by_at_sign=True)
        for number, atoms in enumerate(found):
            yield (atoms if self.wanted(number) else None), None


def _format(path: Path) -> tuple[str, bool]:
    """ "xyz", "sdf" or the name of another format of ASE, and whether that holds one molecule."""
    from ase.io.formats import filetype, get_compression, ioformats

    bare, _ = get_compression(str(path))
    suffix = Path(bare).suffix.lower()
    if suffix in (".xyz", ".extxyz"):
        return "xyz", False
    if suffix in (".sdf", ".sd", ".mol", ".mdl"):
        return "sdf", False
    try:
        kind = filetype(str(path))
    except Exception:  # of ASE's sniffers, or that no format fits
        kind = ""
    if kind in ("xyz", "extxyz"):
        return "xyz", False
    if kind in ("sdf", "mol"):
        return "sdf", False
    if kind not in ioformats:  # then it is the end of the name
        raise ValueError(
            f"{path} cannot be read: neither its name nor its beginning is of a format that ASE "
            "knows"
        )
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


class Doubts:
    """What of a file may not be the whole molecule, counted; ValueError for drawings."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, 0
        self.missing, self.flat = 0, 0
        self.first_missing, self.first_flat = "", ""

    def see(self, number: int, atoms: ase.Atoms, record: sdf.Record | None) -> None:
        self.seen += 1
        implied, reason = None if record is None else record.implied, ""
        if implied:
            reason = f"its bonds leave room for {implied}"
        elif implied is None and 6 in atoms.numbers and 1 not in atoms.numbers:
            reason = "it has carbon and no hydrogen"
        if reason:
            self.missing += 1
            formula = atoms.get_chemical_formula()
            self.first_missing = self.first_missing or f"molecule {number}, {formula}: {reason}"
        if record is None or not record.flat:
            return
        if record.dimension.upper() == "2D":
            raise ValueError(
                f'{self.path}: molecule {number} is a drawing: its second line says "2D" and every '
                'z is 0; make 3-D coordinates first, or write "3D" if the molecule is flat'
            )
        if record.dimension.upper() != "3D":
            self.flat += 1
            self.first_flat = self.first_flat or f"molecule {number}"

    def warn(self) -> None:
        if self.missing:
            warnings.warn(
                f"{self.path}: {self.missing} of {self.seen} molecules seem to lack hydrogens "
                f"({self.first_missing}); the models know the atoms that are listed only",
                stacklevel=4,
            )
        if self.flat:
            warnings.warn(
                f"{self.path}: {self.flat} of {self.seen} molecules may be drawings "
                f'({self.first_flat}: every z is 0, and the second line says neither "2D" nor '
                '"3D")',
                stacklevel=4,
            )


def _blank(path: Path) -> bool:
    with open(path, "rb") as file:
        return not any(block.strip() for block in iter(lambda: file.read(1 << 16), b""))
