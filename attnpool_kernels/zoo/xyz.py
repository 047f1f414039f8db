"""xyz files, plain and extended: every frame, or the line that is none."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import ase


# What a comment says of another unit of length, not of a property in powers of one (bohr^3, nm^-1).
_LENGTH = re.compile(
    r"""\b(?:(?:length|pos(?:ition)?s?|coord(?:inate)?s?|distance|cell|geometry)[_ ]?units?
          [\s"']*[:=\[][\s"'{\[(]*(?:bohrs?|nm|pm|a0|au|a\.u\.)
        |units?[\s"']*[:=\[][\s"'{\[(]*bohrs?
        |(?:positions?|coordinates?|geometry)\b[^,;=]*\bbohrs?)
    (?![\w^*/-]|\s+to\b|\s+converted\b)""",
    re.IGNORECASE | re.VERBOSE,
)
# Numbers that ASE leaves as words, since no sign of equality is before them: "charge: +1".
_STATED = {
    "charge": re.compile(r"\bcharge\s*[:=]?\s*([+-]?\d+(?:\.\d+)?)", re.IGNORECASE),
    "multiplicity": re.compile(r"\bmult(?:iplicity)?\s*[:=]?\s*(\d+)", re.IGNORECASE),
}


def read(lines: Iterable[str]) -> list[ase.Atoms]:
    """All frames of an xyz file.

    Blank lines before, between and after the frames are passed over; ASE would end there. ASE
    reads the frames themselves: comments of key=value pairs and ``Properties`` keep their meaning.

    Raises ValueError that names the line: a frame must be a number of atoms, a comment, and as
    many lines of an element and three coordinates (or what ``Properties`` says). A comment that
    states another unit of length than Å, which ASE passes over, is refused.
    """
    import ase.io

    found: list[ase.Atoms] = []
    for start, frame in frames(lines):
        try:
            atoms = ase.io.read(io.StringIO("".join(frame)), format="extxyz")
        except Exception as error:  # ASE raises whatever a damaged line leads to
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, KeyError):
                reason = f"unknown element {reason}"
            raise ValueError(
                f"molecule {len(found)} in lines {start} to {start + len(frame) - 1}: {reason}"
            ) from error
        atoms = cast("ase.Atoms", atoms)
        _state(atoms, frame[1])
        found.append(atoms)
    return found


def _state(atoms: ase.Atoms, comment: str) -> None:
    """Puts charge and multiplicity of a comment into ``info``, in place of the words alone."""
    for name, pattern in _STATED.items():
        words = [k for k, x in atoms.info.items() if str(k).lower().startswith(name[:4])]
        if any(atoms.info[k] is not True and "," not in str(atoms.info[k]) for k in words):
            continue  # ASE found a value
        for word in words:
            del atoms.info[word]
        if stated := pattern.search(comment):
            atoms.info[name] = float(stated[1])


def frames(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The number of its first line, from 1, and the lines of each frame."""
    numbered = [(i, line) for i, line in enumerate(lines, 1)]
    at = 0
    while at < len(numbered):
        start, header = numbered[at]
        if not header.strip():
            at += 1
            continue
        if not (header.strip().isascii() and header.strip().isdigit()):
            raise ValueError(
                f"line {start} must be the number of atoms of a molecule, got {shown(header)}"
            )
        atoms = int(header)
        end = at + 2 + atoms
        body = numbered[at + 2 : end]
        if len(numbered) < end:
            raise ValueError(
                f"the molecule of {atoms} atoms that begins in line {start} is cut off: the file "
                f"ends after {len(body)} of them"
            )
        if stated := _LENGTH.search(numbered[at + 1][1]):
            raise ValueError(
                f"line {numbered[at + 1][0]} must be a comment of positions in angstrom, "
                f"got {stated[0]!r}"
            )
        extended = "Properties" in numbered[at + 1][1]  # then ASE counts the columns
        for number, line in body:
            if not line.strip() or not (extended or _is_atom(line)):
                raise ValueError(
                    f"line {number} must be an atom of the molecule of {atoms} atoms that begins "
                    f"in line {start}, its element and three coordinates, got {shown(line)}"
                )
        while end < len(numbered) and numbered[end][1].lstrip().startswith("VEC"):
            end += 1  # vectors of a cell, in the dialect of ADF
        yield start, [line for _, line in numbered[at:end]]
        at = end


def _is_atom(line: str) -> bool:
    fields = line.split()
    try:
        return len([float(x) for x in fields[1:4]]) == 3
    except ValueError:
        return False


def shown(line: str) -> str:
    """A line in an error, the first 60 characters."""
    text = line.rstrip("\n")
    return repr(text if len(text) <= 60 else text[:57] + "...")
