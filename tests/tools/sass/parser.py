"""Text of ``nvdisasm -c`` -> instructions, labels and barriers of one kernel."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
FLOATS = {"INF": 0x7F800000, "QNAN": 0x7FFFFFFF}


class SassError(RuntimeError):
    """The path cannot be followed; the text says where and why."""


class Operand(NamedTuple):
    """kind: R, UR, P, UP (index), imm (bits), const (bank, offset), mem, label, other."""

    kind: str
    index: int = 0
    negated: bool = False  # -x, or !p
    inverted: bool = False  # ~x
    absolute: bool = False
    text: str = ""


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # first word of the opcode
    parts: frozenset[str]  # the others
    operands: tuple[Operand, ...]
    text: str
    guard: Operand | None


@dataclass
class Program:
    """The code of one kernel of a disassembled module; name: a part of its symbol."""

    source: str
    name: str | None = None
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)  # address -> instruction

    def __post_init__(self) -> None:
        sections = re.split(r"^//-+ \.text\.(\S+)\s+-+$", self.source, flags=re.M)
        found = [
            (symbol, text)
            for symbol, text in zip(sections[1::2], sections[2::2])
            if self.name is None or self.name in symbol
        ]
        if not found:
            raise SassError(f"no kernel named *{self.name}*")
        self.name, text = found[0]
        text = re.split(r"^//-+ \.", text, flags=re.M)[0]
        for line in text.splitlines():
            if label := re.match(r"^\.?([\w$.]+):", line):
                self.labels[label[1].removeprefix(".")] = len(self.code)
            elif match := LINE.match(line):
                self.places[int(match[1], 16)] = len(self.code)
                self.code.append(_instruction(match))

    def at(self, address: int) -> int:
        """The instruction at an address."""
        return self.places[address]

    @property
    def barriers(self) -> int:
        """Hardware barriers that a block claims: all 16 where a number is in a register."""
        found = set()
        for i in self.code:
            if i.name == "BAR" and i.operands:
                first = i.operands[0]
                found |= {first.index} if first.kind == "imm" else set(range(16))
        return len(found)


def _instruction(match: re.Match) -> Instruction:
    address, negated, guard, opcode, rest = match.groups()
    name, *parts = opcode.split(".")
    return Instruction(
        int(address, 16),
        name,
        frozenset(parts),
        tuple(_operand(x) for x in _split(rest)),
        f"/*{address}*/ {opcode} {rest}",
        _operand(f"{negated}{guard}") if guard else None,
    )


def _split(text: str) -> list[str]:
    out, depth, piece = [], 0, ""
    for char in text:
        depth += (char in "[(") - (char in "])")
        if char == "," and not depth:
            out.append(piece.strip())
            piece = ""
        else:
            piece += char
    return out + ([piece.strip()] if piece.strip() else [])


def _operand(text: str) -> Operand:
    if label := re.fullmatch(r"`\(\.?([\w$.]+)\)", text):
        return Operand("label", text=label[1])
    if text.startswith(("[", "desc[")):
        return Operand("mem", text=text)
    bare, negated, inverted, absolute = text, False, False, False
    while bare and bare[0] in "-!~|+":
        negated |= bare[0] in "-!"
        inverted |= bare[0] == "~"
        absolute |= bare[0] == "|"
        bare = bare[1:]
    bare = bare.rstrip("|")
    register = bare.split(".")[0]
    if match := re.fullmatch(r"(UR|UP|R|P)(\d+|Z|T)", register):
        zero = {"R": 255, "UR": 63, "P": 7, "UP": 7}[match[1]]
        index = int(match[2]) if match[2].isdigit() else zero
        return Operand(match[1], index, negated, inverted, absolute, text)
    if match := re.fullmatch(r"c\[0x([0-9a-f]+)\]\[(.*)\]", bare):
        if re.fullmatch(r"0x[0-9a-f]+", match[2]) and match[1] == "0":
            return Operand("const", int(match[2], 16), negated, inverted, absolute, text)
        return Operand("other", text=text)
    if re.fullmatch(r"0x[0-9a-f]+", bare):
        value = int(bare, 16)
        value = -value if negated else value
        return Operand("imm", (~value if inverted else value) & 0xFFFFFFFF, text=text)
    if bare in FLOATS or re.fullmatch(r"\d[\d.]*(e[+-]?\d+)?", bare):
        bits = FLOATS.get(bare)
        if bits is None:
            bits = struct.unpack("<I", struct.pack("<f", float(bare)))[0]
        return Operand("imm", bits ^ (0x80000000 if negated else 0), text=text)
    return Operand("other", text=text)
