"""What all command lines check alike."""

from __future__ import annotations

import argparse

from ..measuring.sheet import BenchmarkError


def positive(options: argparse.Namespace, *names: str) -> None:
    """Raises BenchmarkError for a number that was given and is not above zero."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:  # nan too
            raise BenchmarkError(f"--{name} must be positive, got {value:g}")
