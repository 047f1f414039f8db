"""Small valid files in every format that the zoo reads, and what a damaged text file says.

The counting here shares no code with the readers: regular expressions of the strictest reading.
"""

from __future__ import annotations

import atexit
import csv
import functools
import io
import re
import shutil
import tempfile
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import torch
from tools import small, tiny

from attnpool_kernels.zoo.datasets import qm8, qm9, qmugs

NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:nan|inf|NaN)"
ATOM = re.compile(rf"\s*(\S+)\s+({NUMBER})\s+({NUMBER})\s+({NUMBER})(?:\s.*)?", re.DOTALL)
SDF_ATOM = re.compile(
    rf"\s*({NUMBER})\s+({NUMBER})\s+({NUMBER})\s+([A-Za-z]\w*)(?:\s.*)?", re.DOTALL
)


@functools.cache
def folder() -> Path:
    """A folder of this process."""
    path = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def text_lines(data: bytes) -> list[str]:
    return re.split("\r\n|\r|\n", data.decode("utf-8-sig", "replace"))


def said_by_xyz(data: bytes) -> list[tuple[str, list[str], np.ndarray | None]] | None:
    """Comment, elements and positions of each frame; None where the file is no xyz file.

    Positions are None where the comment has ``Properties`` of other columns.
    """
    lines, found, at = text_lines(data), [], 0
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", lines[at]):
            return None
        n = int(lines[at])
        atoms = lines[at + 2 : at + 2 + n]
        if at + 1 >= len(lines) or len(atoms) < n or not all(x.strip() for x in atoms):
            return None
        comment, matches = lines[at + 1], [ATOM.fullmatch(x) for x in atoms]
        plain = "Properties" not in comment or re.search(
            r"(?<!\S)Properties=species:S:1:pos:R:3(?!\S)", comment
        )
        if plain and not all(matches):
            return None
        pos = np.array([[float(x) for x in m.groups()[1:]] for m in matches]) if plain else None
        found.append((comment, [m[1] if m else "" for m in matches], pos))
        at += 2 + n
        while at < len(lines) and lines[at].lstrip().startswith("VEC"):
            at += 1
    return found


def said_by_sdf(data: bytes) -> list[np.ndarray] | None:
    """Positions of each record; None where one has not as many atoms as it says."""
    records, block = [], []
    lines = text_lines(data)
    for line in lines:
        if line.startswith("$$$$"):
            records.append(block)
            block = []
        else:
            block.append(line)
    if "".join(block).strip():
        records.append(block)
    found = []
    for lines in records:
        counts = lines[3][:3] if len(lines) > 3 else ""
        if not re.fullmatch(r"\s*[0-9]+\s*", counts):
            return None
        atoms = []
        for line in lines[4:]:
            if not (match := SDF_ATOM.fullmatch(line)):
                break
            atoms.append([float(x) for x in match.groups()[:3]])
        if len(atoms) != int(counts):
            return None
        found.append(np.array(atoms).reshape(-1, 3))
    return found


def said_by_csv(data: bytes) -> list[list[float]] | None:
    """The rows of a table without its header and its names; None where it is none."""
    lines = [x for x in text_lines(data) if x.replace(",", "").strip()]
    if not lines or '"' in "".join(lines):
        return None
    rows = [line.split(",") for line in lines]
    if any(len(row) != len(rows[0]) for row in rows):
        return None
    cells = [[cell.strip() for cell in row[1:]] for row in rows[1:]]
    if not all(
        not x or re.fullmatch(NUMBER + "|infinity", x, re.IGNORECASE) for r in cells for x in r
    ):
        return None
    return [[float(x) if x else np.nan for x in row] for row in cells]


@functools.cache
def xyz_file(format: str) -> bytes:
    file = io.StringIO()
    for one in small.molecules(4):
        ase.io.write(file, one, format=format)
    return file.getvalue().encode()


@functools.cache
def sdf_file(count: int = 4) -> bytes:
    file = io.StringIO()
    for number, one in enumerate(small.molecules(count)):
        part = io.StringIO()
        ase.io.write(part, one, format="sdf")
        file.write(
            part.getvalue() if number else part.getvalue().replace("$$$$", "> <x>\n1\n\n$$$$")
        )
    return file.getvalue().encode()


def table(header: list[str], rows: int, seed: int = 0) -> bytes:
    file, values = io.StringIO(), np.random.RandomState(seed).randn(rows, len(header) - 1)
    csv.writer(file).writerows([header, *[[f"gdb_{i + 1}", *x] for i, x in enumerate(values)]])
    return file.getvalue().encode()


@functools.cache
def qm8_files(count: int = 6) -> dict[str, bytes]:
    header = [
        "gdb",
        *[f"{x}-{y}" for y in ("CC2", "P", "P", "C") for x in ("E1", "E2", "f1", "f2")],
    ]
    return {"qm8.sdf": sdf_file(count), "qm8.sdf.csv": table(header, count)}


@functools.cache
def qm9_files(count: int = 8) -> dict[str, bytes]:
    header = ["mol_id", "A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0"]
    header += ["u298", "h298", "g298", "cv", "u0_atom", "u298_atom", "h298_atom", "g298_atom"]
    listed = "\n" * 9 + "       2  C1\n       5  C2\n\nend of the list\n"
    return {
        "gdb9.sdf": sdf_file(count),
        "gdb9.sdf.csv": table(header, count),
        "uncharacterized.txt": listed.encode(),
    }


@functools.cache
def qm7b_arrays() -> dict[str, np.ndarray]:
    with np.load(tiny.write_qm7b(folder() / "qm7b_small.npz", 12)) as stored:
        return dict(stored)


@functools.cache
def md17_arrays() -> dict[str, np.ndarray]:
    with np.load(tiny.write_md17(folder() / "md17.npz", 12)) as stored:
        return dict(stored)


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@functools.cache
def data_list(name: str) -> list:
    targets = len({"qm8": qm8, "qm9": qm9, "qmugs": qmugs}[name].TARGETS)
    return [
        {
            "z": torch.tensor(one.numbers),
            "pos": torch.tensor(one.positions).float(),
            "y": -0.3 + 0.01 * torch.randn(targets, generator=torch.Generator().manual_seed(i)),
        }
        for i, one in enumerate(small.molecules(10))
    ]


def pt(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@functools.cache
def database() -> bytes:
    """A database of ASE as OE62's, of 8 molecules."""
    path = folder() / "whole.db"
    with ase.db.connect(path, type="db", use_lock_file=False) as file:
        for i, one in enumerate(small.molecules(8)):
            data = {"HOMO": np.array([-6.0 - 0.1 * i]), "LUMO": np.array([-1.0 + 0.1 * i])}
            file.write(one, data=data | {"coeff": np.full((len(one), 1), 0.5)})
    return path.read_bytes()


@functools.cache
def oe62_split() -> bytes:
    return npz({"train_idx": np.arange(5), "val_idx": np.arange(5, 6), "test_idx": np.arange(6, 8)})
