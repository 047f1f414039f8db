"""Molecules of SDF and MOL files in the format V2000, with what they say beside the positions.

Own, because ASE takes as many lines as there are and drops what follows, and neither charges nor
bonds come out of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .lines import as_integer, as_number
from .xyz import shown

# Charges in the atom block; 4 is a radical there.
_CHARGES = {1: 3, 2: 2, 3: 1, 5: -1, 6: -2, 7: -3}
_UNPAIRED = {2: 1, 3: 2}  # of M  RAD: doublet, triplet; 1 is a singlet
_ORDERS = {2: 2.0, 3: 3.0, 4: 1.5}  # of bonds; what is no number of electron pairs counts as one
_VALENCES = {6: 4, 7: 3, 8: 2}


@dataclasses.dataclass(frozen=True)
class Record:
    """A molecule of n atoms.

    z: [n] int64. pos: [n, 3] in Å. charge: of the whole. unpaired: electrons, by its radicals.
    dimension: "2D", "3D" or what else the header says, often "". implied: hydrogens that its bonds
    leave room for at C, N and O without charge, which such files need not list; None where it has
    no bonds to tell by.
    """

    z: np.ndarray
    pos: np.ndarray
    charge: int
    unpaired: int
    dimension: str
    implied: int | None

    @property
    def flat(self) -> bool:
        """Whether it may be a drawing: more than one atom, and every z is 0."""
        return len(self.z) > 1 and not self.pos[:, 2].any()


@dataclasses.dataclass(frozen=True)
class Block:
    """The lines of a record, the number of the first, from 1, and whether $$$$ ended it."""

    start: int
    lines: list[str]
    ended: bool


def blocks(lines: Iterable[str]) -> Iterator[Block]:
    """The records of a file; what follows the last $$$$ is one if it is not blank."""
    start = 1
    block: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.startswith("$$$$"):
            yield Block(start, block, True)
            start, block = number + 1, []
        else:
            block.append(line)
    if "".join(block).strip():
        yield Block(start, block, False)


def parsed(block: Block) -> Record:
    """A record; ValueError that names the line which does not fit, or the format V3000."""
    lines, start = block.lines, block.start
    if len(lines) < 4:
        raise ValueError(
            f"line {start + len(lines)} must be one of three lines of header or the numbers of "
            "atoms and bonds, but the molecule ends there"
        )
    counts = lines[3]
    if "V3000" in counts:
        raise ValueError(
            f"line {start + 3} says that the format is V3000, which is not read here: convert the "
            "file to V2000 or to xyz"
        )
    try:
        atoms, bonds = as_integer(counts[:3]), as_integer(counts[3:6])
    except ValueError:
        raise ValueError(
            f"line {start + 3} must be the numbers of atoms and bonds (V2000), got {shown(counts)}"
        ) from None
    end = 4 + atoms + bonds
    if atoms < 0 or bonds < 0 or len(lines) < end:
        raise ValueError(
            f"the molecule in lines {start} to {start + len(lines) - 1} must have {atoms} atoms "
            f"and {bonds} bonds, which are more lines than it has"
        )
    z, pos, charges, radicals = _atoms(lines[4 : 4 + atoms], start + 4)
    orders = _bonds(lines[4 + atoms : end], start + 4 + atoms, atoms)
    _properties(block, end, charges, radicals)
    implied = None
    if bonds or atoms == 1:
        neutral = (charges == 0) & (radicals == 0)
        implied = sum(
            max(0, round(_VALENCES.get(int(z[i]), 0) - orders[i])) for i in neutral.nonzero()[0]
        )
    return Record(z, pos, int(charges.sum()), int(radicals.sum()), lines[1][20:22].strip(), implied)


def _atoms(lines: Sequence[str], first: int) -> tuple[np.ndarray, ...]:
    """Numbers, positions, charges and unpaired electrons, as the atom block has them."""
    from ase.data import atomic_numbers

    z, pos, codes = [], [], []
    for number, line in enumerate(lines, first):
        fields = line.split()
        try:
            pos.append([as_number(x) for x in fields[:3]])
            symbol = fields[3]
            codes.append(as_integer(fields[5]) if len(fields) > 5 else 0)
        except (ValueError, IndexError):
            raise ValueError(
                f"line {number} must be an atom, three coordinates and an element, "
                f"got {shown(line)}"
            ) from None
        if symbol not in atomic_numbers:
            raise ValueError(f"line {number} must be an atom, got the unknown element {symbol}")
        z.append(atomic_numbers[symbol])
    charges = [_CHARGES.get(code, 0) for code in codes]
    radicals = [int(code == 4) for code in codes]
    return (
        np.array(z, np.int64),
        np.array(pos, np.float64).reshape(-1, 3),
        np.array(charges, np.int64),
        np.array(radicals, np.int64),
    )


def _bonds(lines: Sequence[str], first: int, atoms: int) -> np.ndarray:
    """Sum of the orders of its bonds for each atom."""
    orders = np.zeros(atoms)
    for i, line in enumerate(lines):
        try:
            one, other, kind = (as_integer(line[k : k + 3]) for k in (0, 3, 6))
        except ValueError:
            one = other = kind = 0
        if not (1 <= one <= atoms and 1 <= other <= atoms):
            raise ValueError(
                f"line {first + i} must be a bond of two of the {atoms} atoms, got {shown(line)}"
            )
        order = _ORDERS.get(kind, 1.0)
        orders[one - 1] += order
        orders[other - 1] += order
    return orders


def _properties(block: Block, at: int, charges: np.ndarray, radicals: np.ndarray) -> None:
    """Charges and radicals of the lines up to M  END, which replace those of the atom block."""
    replaced = text = False  # text: the line after an A or a G is free
    for number, line in enumerate(block.lines[at:], block.start + at):
        if text:
            text = False
            continue
        if line.startswith("M  END"):
            _nothing_after(block, number)
            return
        if line.startswith(">"):
            break  # data of the file
        if line.startswith(("M  CHG", "M  RAD")):
            if not replaced:
                charges[:], radicals[:], replaced = 0, 0, True
            for i, value in _pairs(line, number, len(charges)):
                if line.startswith("M  CHG"):
                    charges[i - 1] = value
                else:
                    radicals[i - 1] = _UNPAIRED.get(value, 0)
        elif line.strip() and line[0] not in "MSVAG":
            raise ValueError(
                f"line {number} must be M  END or a property, for line {block.start + 3} counts no "
                f"more atoms and bonds, got {shown(line)}"
            )
        text = line[0] in "AG"
    if not block.ended:
        last = block.start + len(block.lines) - 1
        raise ValueError(f"the molecule is cut off: line {last} is the last, without M  END before")


def _nothing_after(block: Block, end: int) -> None:
    """Only data, which begin with >, may stand between M  END and $$$$: no second molecule."""
    data = False
    for number, line in enumerate(block.lines[end + 1 - block.start :], end + 1):
        data = data or line.startswith(">")
        if line.startswith("M  END") or (line.strip() and not data):
            raise ValueError(
                f"line {number} must be $$$$, which ends a molecule, or data of the molecule that "
                f"M  END in line {end} closes, got {shown(line)}"
            )


def _pairs(line: str, number: int, atoms: int) -> list[tuple[int, int]]:
    """Atoms, from 1, and their values of a line of properties."""
    try:
        count, *fields = [as_integer(x) for x in line[6:].split()]
        pairs = list(zip(fields[::2], fields[1::2], strict=True))
        if len(pairs) == count and all(1 <= i <= atoms for i, _ in pairs):
            return pairs
    except ValueError:
        pass
    raise ValueError(
        f"line {number} must be a number of pairs of one of the {atoms} atoms and a value, "
        f"got {shown(line)}"
    )
