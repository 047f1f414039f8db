"""What the command lines have and check alike."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..measuring import memory
from ..measuring.sheet import OUT, BenchmarkError


def add_shared(parser: argparse.ArgumentParser, name: str) -> None:
    """--threads, and --output with ``name``.csv as its default."""
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--output",
        type=Path,
        default=OUT / f"{name}.csv",
        metavar="CSV",
        help=f"results (default: benchmarks/out/{name}.csv)",
    )


def positive(options: argparse.Namespace, *names: str) -> None:
    """Raises BenchmarkError for a number that was given and is not above zero."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:  # nan too
            raise BenchmarkError(f"--{name} must be positive, got {value:g}")


def exit_code(study: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Of a command: what the study returns, or 2 and one line of what is wrong with the options."""
    try:
        return study(options)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        memory.stop()
