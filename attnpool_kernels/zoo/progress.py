"""Bars with the time that is left, on stderr, where that is a terminal; files stay clean."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Item = TypeVar("Item")


def _bar(*columns: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def over(items: Iterable[Item], text: str, total: int | None = None) -> Iterator[Item]:
    """The items, counted; total: their number, where ``len`` does not know it."""
    with _bar(MofNCompleteColumn()) as bar:
        yield from bar.track(items, total, description=text)


@contextlib.contextmanager
def of_bytes(total: int | None, text: str) -> Iterator[Callable[[int], None]]:
    """A function that is told of bytes that have come."""
    with _bar(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def of_file(path: Path, text: str) -> Iterator[Callable[[int | None, int], None]]:
    """A function that is told where in a file one is, if that is known, and of the items."""
    with _bar(TextColumn("{task.fields[items]:,} molecules")) as bar:
        task = bar.add_task(text, total=None, items=0)

        def shown(position: int | None, items: int) -> None:
            if position is None:
                bar.update(task, items=items)
            else:
                bar.update(task, completed=position, total=path.stat().st_size, items=items)

        yield shown
