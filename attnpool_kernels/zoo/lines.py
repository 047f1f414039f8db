"""Lines of text files of molecules, whatever wrote them: any line ends, any encoding of names.

And the numbers in them: Python's own ``float`` and ``int`` take more than such files may hold, 1_0
for 10 and the digits of any script, so that damage would pass for a number.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


def lines(path: Path, watch: Callable[[IO[bytes]], None] | None = None) -> Iterator[str]:
    r"""The lines of a file, each with "\n" at its end; compressed files by their names (.gz, ...).

    Numbers and elements are ASCII, so bytes that are not UTF-8 are those of a title or a comment
    in an older encoding: they become U+FFFD and the rest of the line is kept. Only "\n", "\r\n"
    and "\r" end a line; ``str.splitlines`` knows others, which occur inside of titles.

    watch: called with the open file, whose ``tell()`` says how far it has been read.
    """
    from ase.io.formats import open_with_compression

    with (
        open_with_compression(str(path), "rb") as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace") as text,
    ):
        if watch is not None:
            watch(file)
        yield from text


def as_number(text: str) -> float:
    """A number as any program writes it; ValueError."""
    return float(_plain(text))


def as_integer(text: str) -> int:
    """A whole number; ValueError."""
    return int(_plain(text))


def _plain(text: str) -> str:
    if "_" in text or not text.isascii():
        raise ValueError(f"must be a number, got {text!r}")
    return text
