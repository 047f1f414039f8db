"""Installed packages, asked for without importing them."""

from __future__ import annotations

import importlib.metadata
import importlib.util


def version(package: str) -> str:
    """Installed version of a package, or "" where it is not there."""
    for name in (package, package.replace("_", "-")):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
