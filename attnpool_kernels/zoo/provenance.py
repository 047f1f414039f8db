"""What a run was made of: versions of the packages, the commit, and a digest of its molecules."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from torch import Tensor

from .data import MoleculeData

PACKAGE = Path(__file__).resolve().parents[1]
PACKAGES = (
    "attnpool-kernels",
    "torch",
    "lightning",
    "torch_geometric",
    "schnetpack",
    "ase",
    "numpy",
    "triton",
)


def provenance(data: MoleculeData) -> dict[str, Any]:
    """Plain values: time, python, machine, packages, commit, and the data with their digest."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit(PACKAGE),
        "data": {**data.description, "molecules": len(data.ready), "sha256": data_digest(data)},
    }


def version(name: str) -> str | None:
    """Of an installed package; of this one also where it runs from its sources."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "attnpool-kernels":
            return None
    import attnpool_kernels

    return attnpool_kernels.__version__


def commit(package: Path) -> str | None:
    """The commit of the sources, with "-dirty" where they differ from it; None outside of git.

    A package that was installed into another project's repository is not of that commit.
    """
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != package.parent or not _git(package, "ls-files", "__init__.py"):
            return None
        dirty = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
        return _git(package, "rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    found = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30
    )
    return found.stdout.strip()


def data_digest(data: MoleculeData) -> str:
    """sha256 of elements, positions, sizes and labels as the models see them, and of the split.

    It does not depend on the format of the file or on its name, but on the targets and the split.
    """
    total = hashlib.sha256()
    held = data.ready
    parts: list[Tensor | None] = [held.z, held.pos, held.ptr, held.y, held.forces]
    parts += [
        held.coefficients,
        held.cell,
        held.pbc,
        *(data.parts[name] for name in sorted(data.parts)),
    ]
    for tensor in parts:
        total.update(b"-" if tensor is None else tensor.contiguous().numpy().data)
    return total.hexdigest()
