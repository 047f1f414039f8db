"""xyz files, plain and extended: every frame, or the line that is none."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

from . import lines

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
_PROPERTIES = re.compile(r"""Properties\s*=\s*["'{\[]?([^\s"'}\]]+)""")
# Numbers that ASE leaves as words, since no sign of equality is before them: "charge: +1".
_STATED = {
    "charge": re.compile(r"\bcharge\s*[:=]?\s*([+-]?\d+(?:\.\d+)?)", re.IGNORECASE),
    "multiplicity": re.compile(r"\bmult(?:iplicity)?\s*[:=]?\s*(\d+)", re.IGNORECASE),
}


def read(text: Iterable[str]) -> list[ase.Atoms]:
    """All frames of an xyz file, see ``frames`` and ``parsed``."""
    return [parsed(number, *found) for number, found in enumerate(frames(text))]


def parsed(number: int, start: int, frame: list[str]) -> ase.Atoms:
    """Molecule ``number`` of a file from the lines of its frame, of which the first is ``start``.

    ASE reads it: comments of key=value pairs and ``Properties`` keep their meaning. Raises
    ValueError that names the lines.
    """
    import ase.io

    try:
        atoms = ase.io.read(io.StringIO("".join(frame)), format="extxyz")
    except Exception as error:  # ASE raises whatever a damaged line leads to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, KeyError):
            reason = f"unknown element {reason}"
        raise ValueError(
            f"molecule {number} in lines {start} to {start + len(frame) - 1}: {reason}"
        ) from error
    atoms = cast("ase.Atoms", atoms)
    _state(atoms, frame[1])
    return atoms


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


def frames(text: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The number of its first line, from 1, and the lines of each frame, one after another.

    Blank lines before, between and after the frames are passed over; ASE would end there.

    Raises ValueError that names the line: a frame must be a number of atoms, a comment, and as
    many lines of an element and three coordinates (or what ``Properties`` says). A comment that
    states another unit of length than Å, which ASE passes over, is refused.
    """
    numbered = enumerate(text, 1)
    following: tuple[int, str] | None = None  # a line that has been read and not used
    while True:
        start, header = following or next(numbered, (0, ""))
        following = None
        if not start:
            return
        if not header.strip():
            continue
        if not (header.strip().isascii() and header.strip().isdigit()):
            raise ValueError(
                f"line {start} must be the number of atoms of a molecule, got {shown(header)}"
            )
        atoms = int(header)
        frame = [header, *_body(numbered, start, atoms)]
        for number, line in numbered:
            if not line.lstrip().startswith("VEC"):  # vectors of a cell, in the dialect of ADF
                following = number, line
                break
            frame.append(line)
        yield start, frame


def _body(numbered: Iterator[tuple[int, str]], start: int, atoms: int) -> list[str]:
    """The comment and the lines of the atoms, checked."""
    body = list(itertools.islice(numbered, min(atoms + 1, sys.maxsize)))
    if len(body) <= atoms:
        raise ValueError(
            f"the molecule of {atoms} atoms that begins in line {start} is cut off: the file "
            f"ends after {max(0, len(body) - 1)} of them"
        )
    (at, comment), *rows = body
    if stated := _LENGTH.search(comment):
        raise ValueError(f"line {at} must be a comment of positions in angstrom, got {stated[0]!r}")
    extended = "Properties" in comment  # then ASE counts the columns
    fields = max((len(line.split()) for _, line in rows), default=0)
    if fields and (columns := _columns(comment)) > fields:  # ASE would make room for all of them
        raise ValueError(
            f"line {at} must be a comment whose Properties are the columns of its atoms, at most "
            f"{fields} in a line, got {columns}"
        )
    for number, line in rows:
        if not line.strip() or not (_is_row(line) if extended else _is_atom(line)):
            raise ValueError(
                f"line {number} must be an atom of the molecule of {atoms} atoms that begins "
                f"in line {start}, its element and three coordinates, got {shown(line)}"
            )
    return [line for _, line in body]


def _is_atom(line: str) -> bool:
    fields = line.split()
    try:
        return len([lines.as_number(x) for x in fields[1:4]]) == 3
    except ValueError:
        return False


def _columns(comment: str) -> int:
    """What ``Properties`` of a comment say, as ASE reads them; 0 without."""
    found = 0
    stated = _PROPERTIES.search(comment)
    for count in stated[1].split(":")[2::3] if stated else ():
        with contextlib.suppress(ValueError):
            found += int(count)
    return found


def _is_row(line: str) -> bool:
    """Whether no field is a number to Python alone, as ASE would read it: 1_0 for 10."""
    for field in line.split():
        if "_" in field or not field.isascii():
            with contextlib.suppress(ValueError):
                float(field)
                return False
    return True


def shown(line: str) -> str:
    """A line in an error, the first 60 characters."""
    text = line.rstrip("\n")
    return repr(text if len(text) <= 60 else text[:57] + "...")
