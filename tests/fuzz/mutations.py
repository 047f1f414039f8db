"""Damage to files, as strategies: of bytes, of lines and words, and of encodings."""

from __future__ import annotations

import random

from hypothesis import strategies as st

NUMBERS = [
    *("0", "-1", "1", "2", "3", "7", "999", "1000000000", "-0", "+4", "1e400", "nan", "NaN", "inf"),
    *("-inf", "1.5", "1e3", "1_0", "1_000.5", "0x10", "", "1,5", "１２", "٣", "9" * 25, "9" * 5000),
    *("1D+01", "1e-400", "99999999999999999999", "*****", "None", "2147483648", "-2147483649"),
]
WORDS = [
    *("C", "H", "c", "X", "Xx", "1", "6", "$$$$", "M  END", "V3000", "0", "\x00", '"', "'", "é"),
    *("Properties=species:S:1:pos:R:3", 'Lattice="1 0 0 0 1 0 0 0 1"', "pbc=T", 'pbc="F F F"'),
    *("units=bohr", "charge=1", ",", ";", "\t", "#", "{", "[", ":", "- ", "\u2028", "\x85", "\x0c"),
]
KINDS = [
    "number",
    "word",
    "delete line",
    "double line",
    "swap lines",
    "swap columns",
    "insert line",
    "join lines",
    "drop word",
    "double word",
    "flip",
    "byte",
    "truncate",
    "cut",
    "double bytes",
    "zeros",
]
ENCODINGS = [
    "crlf",
    "cr",
    "utf-16",
    "utf-8-sig",
    "latin-1",
    "trailing blank",
    "no end",
    "blank lines",
]
BINARY = KINDS[KINDS.index("flip") :]

# What is done one after another: (kind, seed of the place). Few, so that files stay almost right.
damages = st.lists(
    st.tuples(st.sampled_from(KINDS + ENCODINGS), st.integers(0, 2**32 - 1)), min_size=1, max_size=3
)
binary_damages = st.lists(
    st.tuples(st.sampled_from(BINARY), st.integers(0, 2**32 - 1)), min_size=1, max_size=3
)


def damaged(data: bytes, steps: list[tuple[str, int]]) -> bytes:
    """The bytes after all steps."""
    for kind, seed in steps:
        pick = random.Random(seed)
        if kind in BINARY:
            data = _of_bytes(data, kind, pick)
        elif kind in ENCODINGS:
            data = _of_encoding(data, kind)
        else:
            data = _of_lines(data, kind, pick)
    return data


def _of_bytes(data: bytes, kind: str, pick: random.Random) -> bytes:
    if not data:
        return data
    at = pick.randrange(len(data))
    end = min(len(data), at + pick.choice([1, 2, 8, 40, 512]))
    out = bytearray(data)
    if kind == "flip":
        out[at] ^= 1 << pick.randrange(8)
    elif kind == "byte":
        out[at] = pick.choice([*b"0123456789-+.eE,;:#\"' \n\r\t", 0, 255, pick.randrange(256)])
    elif kind == "truncate":
        del out[at:]
    elif kind == "cut":
        del out[at:end]
    elif kind == "double bytes":
        out[at:at] = data[at:end]
    else:
        out[at:end] = bytes(end - at)
    return bytes(out)


def _of_encoding(data: bytes, kind: str) -> bytes:
    text = data.decode("utf-8", "replace")
    if kind == "crlf":
        return data.replace(b"\r", b"").replace(b"\n", b"\r\n")
    if kind == "cr":
        return data.replace(b"\r", b"").replace(b"\n", b"\r")
    if kind == "latin-1":
        return text.encode("latin-1", "replace")
    if kind == "trailing blank":
        return data + b" \n\n\t\n"
    if kind == "no end":
        return data.rstrip()
    if kind == "blank lines":
        return data.replace(b"\n", b"\n\n")
    return text.encode(kind)


def _of_lines(data: bytes, kind: str, pick: random.Random) -> bytes:
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    at, other = pick.randrange(len(lines)), pick.randrange(len(lines))
    words = lines[at].split(" ")
    places = [i for i, word in enumerate(words) if word] or [0]
    place = pick.choice(places)
    if kind == "delete line":
        del lines[at]
    elif kind == "double line":
        lines.insert(at, lines[at])
    elif kind == "swap lines":
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "insert line":
        lines.insert(at, pick.choice(["", " ", pick.choice(WORDS), pick.choice(NUMBERS)]))
    elif kind == "join lines":
        lines[at : at + 2] = [" ".join(lines[at : at + 2])]
    elif kind == "swap columns":
        second = pick.choice(places)
        words[place], words[second] = words[second], words[place]
        lines[at] = " ".join(words)
    else:
        separator = "," if "," in lines[at] else " "
        cells = lines[at].split(separator)
        place = pick.choice([i for i, cell in enumerate(cells) if cell] or [0])
        if kind == "drop word":
            del cells[place]
        elif kind == "double word":
            cells.insert(place, cells[place])
        else:
            cells[place] = pick.choice(NUMBERS if kind == "number" else WORDS)
        lines[at] = separator.join(cells)
    return "\n".join(lines).encode("utf-8", "surrogateescape")
