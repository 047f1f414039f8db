"""PTX text -> Kernel: parameters, shared and local memory, registers, code and labels of one entry.

Grammar as in NVIDIA's "Parallel Thread Execution ISA"; what nvcc and Triton write, not all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class PtxError(RuntimeError):
    """What the program does is invalid on a GPU, or not implemented here; the text says which."""


class Type(NamedTuple):
    """kind: u, s, f (IEEE), h (bfloat16), p (predicate); bits wide."""

    kind: str
    bits: int


PRED = Type("p", 8)
U8, U16, U32, U64 = (Type("u", bits) for bits in (8, 16, 32, 64))
F32, F64 = Type("f", 32), Type("f", 64)


def parse_type(text: str) -> Type | None:
    """'f32' -> Type('f', 32); 'b32' counts as unsigned; None where the text is no scalar type."""
    if text == "pred":
        return PRED
    if text == "bf16":
        return Type("h", 16)
    if match := re.fullmatch(r"([usbf])(8|16|32|64)", text):
        return Type(match[1].replace("b", "u"), int(match[2]))
    return None


class Register(NamedTuple):
    name: str


class Immediate(NamedTuple):
    bits: int


class Symbol(NamedTuple):
    """A label, or the name of a parameter or of a variable in shared or local memory."""

    name: str


class Address(NamedTuple):
    base: Register | Symbol | Immediate
    offset: int


class Vector(NamedTuple):
    parts: tuple


class Pair(NamedTuple):
    """d|p of shfl and setp: a value and a predicate."""

    value: Register
    predicate: Register


@dataclass(frozen=True)
class Instruction:
    opcode: tuple[str, ...]  # "ld.global.v4.b32" split at the dots
    types: tuple[Type, ...]  # the scalar types among them
    operands: tuple
    text: str
    guard: str | None = None  # predicate register
    negated: bool = False


@dataclass
class Kernel:
    """One entry of a PTX module. name: a part of the entry's (mangled) name; None = the first."""

    source: str
    name: str | None = None
    params: list[tuple[str, int]] = field(default_factory=list)  # name, bytes
    widths: dict[str, int] = field(default_factory=dict)  # register prefix -> bits
    shared: dict[str, int] = field(default_factory=dict)  # symbol -> offset
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    constant: dict[str, bytes] = field(default_factory=dict)  # initialised module variables
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets

    def __post_init__(self):
        text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", self.source, flags=re.S))
        entries = re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", text, re.S)
        found = [e for e in entries if self.name is None or self.name in e[1]]
        if not found:
            raise PtxError(f"no entry named *{self.name}*")
        self.name = found[0][1]
        self.params = [_parameter(p) for p in split(found[0][2])]
        body = _braced(text, found[0].end() - 1)
        for align, symbol, size in re.findall(_VARIABLE.format("shared"), text):
            self.shared_bytes = _aligned(self.shared_bytes, int(align))
            self.shared[symbol] = self.shared_bytes
            self.shared_bytes += int(size or 0)
        for align, symbol, size in re.findall(_VARIABLE.format("local"), body):
            self.local_bytes = _aligned(self.local_bytes, int(align))
            self.local[symbol] = self.local_bytes
            self.local_bytes += int(size)
        for symbol, values in re.findall(_INITIALISED, text):
            self.constant[symbol] = bytes(int(v, 0) for v in values.split(","))
        self._parse(body)

    def _parse(self, body: str) -> None:
        body = re.sub(r"^\s*\.(loc|file|section|pragma)[^\n]*$", "", body, flags=re.M)
        scopes: list[dict[str, str]] = [
            {}
        ]  # registers declared in a scope of their own -> new name
        for text in _statements(body):
            if text == "{":
                scopes.append({})
                continue
            if text == "}":
                scopes.pop()
                continue
            while label := re.match(r"([\w$]+):\s*", text):
                self.labels[label[1]] = len(self.code)
                text = text[label.end() :]
                if text.startswith(".branchtargets"):
                    self.tables[label[1]] = split(text.partition(" ")[2])
            if text.startswith(".reg"):
                self._declare(text, scopes)
            elif text and not text.startswith("."):
                for scope in reversed(scopes[1:]):
                    for name, new in scope.items():
                        text = re.sub(rf"(?<![\w%$]){re.escape(name)}(?![\w$])", new, text)
                self.code.append(_instruction(text))
        if len(scopes) != 1:
            raise PtxError("unbalanced braces")

    def _declare(self, text: str, scopes: list[dict[str, str]]) -> None:
        """.reg: notes the width; in an inner scope the same name may mean another register."""
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        for entry in split(names):
            name, _, count = entry.rstrip(">").partition("<")
            prefix = name
            if len(scopes) > 1:
                number = str(len(self.widths))
                prefix = f"%_{number.translate(str.maketrans('0123456789', 'abcdefghij'))}_"
                each = [f"{name}{n}" for n in range(int(count))] if count else [name]
                scopes[-1].update({x: f"{prefix}{n}" for n, x in enumerate(each)})
            self.widths[re.match(r"%[a-zA-Z_]+", prefix)[0]] = parse_type(kind).bits

    def width(self, register: str) -> int:
        """Bits of a register's storage."""
        return self.widths[re.match(r"%[a-zA-Z_]+", register)[0]]


_VARIABLE = r"\.{}\s+\.align\s+(\d+)\s+\.[busf]8\s+([\w$]+)\[(\d*)\]"
_INITIALISED = r"\.(?:global|const)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d*\]\s*=\s*\{([^}]*)\}"


def _statements(body: str) -> Iterator[str]:
    """Statements without their semicolon, and the braces of scopes; not those of vectors."""
    start, inside = 0, False  # inside: of a vector
    for match in re.finditer(r"[{};]", body):
        if match[0] == "{" and body[start : match.start()].strip().rpartition(":")[2]:
            inside = True
        elif match[0] == "}" and inside:
            inside = False
        else:
            if text := " ".join(body[start : match.start()].split()):
                yield text
            if match[0] != ";":
                yield match[0]
            start = match.end()
    yield " ".join(body[start:].split())  # labels of the end


def _aligned(offset: int, align: int) -> int:
    return -(-offset // align) * align


def split(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    out, depth, piece = [], 0, ""
    for char in text:
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            out.append(piece.strip())
            piece = ""
        else:
            piece += char
    return out + ([piece.strip()] if piece.strip() else [])


def _parameter(text: str) -> tuple[str, int]:
    pattern = r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:.*?)\s+([\w$]+)(?:\[(\d+)\])?$"
    kind, name, count = re.search(pattern, text.strip(), re.S).groups()
    return name, parse_type(kind).bits // 8 * int(count or 1)


def _braced(text: str, brace: int) -> str:
    depth = 0
    for match in re.finditer(r"[{}]", text[brace:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[brace + 1 : brace + match.start()]
    raise PtxError("unbalanced braces")


def _instruction(text: str) -> Instruction:
    guard, negated, rest = None, False, text
    if text[0] == "@":
        guard, rest = text.split(None, 1)
        negated, guard = guard[1] == "!", guard.lstrip("@!")
    name, _, operands = rest.partition(" ")
    opcode = tuple(name.split("."))
    types = tuple(t for t in map(parse_type, opcode[1:]) if t)
    return Instruction(opcode, types, tuple(map(_operand, split(operands))), text, guard, negated)


def _operand(text: str):
    if text[0] == "{":
        return Vector(tuple(_operand(x) for x in split(text[1:-1])))
    if text[0] == "[":
        match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if match is None:
            raise PtxError(f"not implemented: operand {text}")
        return Address(_operand(match[1]), int(match[2] or "0", 0))
    if "|" in text:
        return Pair(*(Register(x.strip()) for x in text.split("|")))
    if text[0] == "%" or text == "_":
        return Register(text)
    if text[:2].lower() in ("0f", "0d"):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?(\d+|0[xX][0-9a-fA-F]+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
