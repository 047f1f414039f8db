"""What the command lines have and check alike."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..measuring import memory
from ..measuring.provenance import provenance
from ..measuring.sheet import OUT, BenchmarkError, Sheet


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


def case_parser(name: str, about: str | None, known: Iterable[str]) -> argparse.ArgumentParser:
    """Of a study of named cases: --cases, all but "tiny", --budget, and what studies share."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.studies.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole = ",".join(case for case in known if case != "tiny")
    parser.add_argument("--cases", default=whole, metavar="LIST", help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=3.0, metavar="S", help="s a contender")
    add_shared(parser, name)
    return parser


def cases_of(options: argparse.Namespace, known: Iterable[str]) -> list[str]:
    """The names that --cases holds. Raises BenchmarkError for an unknown one."""
    positive(options, "budget", "threads")
    names = options.cases.split(",")
    for name in names:
        if name not in known:
            raise BenchmarkError(f"--cases must be of {', '.join(known)}, got {name!r}")
    return names


def started(options: argparse.Namespace, command: str) -> Sheet:
    """The sheet of results with its provenance, after --threads has been set."""
    if options.threads:
        torch.set_num_threads(options.threads)
    sheet = Sheet(options.output)
    chosen = {k: v for k, v in vars(options).items() if isinstance(v, str | int | float)}
    sheet.start(provenance("cpu", {"command": f"python -m {command}", **chosen}))
    return sheet


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
