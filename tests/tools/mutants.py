"""Generated bugs: what a source file looks like with one small mistake in it.

Python, Triton's kernels included, is changed by its syntax tree: a comparison, a constant, a check
that is skipped, a statement that is left out. C++ and CUDA are changed by regular expressions on
lines of code. A mutant is named by a digest of its place and change, so a list of them stays as it
is where other lines of a file change, and so does the sample that ``chosen`` draws from it.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    path: str  # in the checkout
    line: int
    operator: str
    before: str
    after: str
    start: int  # of what is replaced, in characters of the file
    end: int
    key: str  # digest

    def apply(self, text: str) -> str:
        assert text[self.start : self.end] == self.before, f"{self.path} has changed"
        return text[: self.start] + self.after + text[self.end :]


COMPARED = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
COMPUTED = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "//",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
DTYPES = {
    "float64": "float32",
    "float32": "float16",
    "int64": "int32",
    "int32": "int16",
    "bool": "uint8",
}
UNDONE = {"contiguous", "detach", "clone", "long", "to", "float", "double", "flatten", "unsqueeze"}
REDUCED = {
    "sum": "mean",
    "mean": "sum",
    "amax": "amin",
    "min": "max",
    "max": "min",
    "maximum": "minimum",
    "minimum": "maximum",
    "cumsum": "cumprod",
    "any": "all",
    "all": "any",
    "zeros": "ones",
    "new_zeros": "new_ones",
    "zeros_like": "ones_like",
}
# Returns what the first call returned, whatever the arguments.
STALE = (
    "@(lambda f, kept=[]: lambda *a, **k: kept[0] if kept else kept.append(f(*a, **k)) or kept[0])"
)


class _Python:
    def __init__(self, path: str, text: str):
        self.path, self.text = path, text
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self.starts, self.lines = starts, text.splitlines()
        self.found: list[tuple[str, int, int, str]] = []

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self._place(node.lineno, node.col_offset),
            self._place(node.end_lineno, node.end_col_offset),
        )

    def _place(self, line: int, column: int) -> int:
        row = self.lines[line - 1].encode()[:column].decode()  # columns are bytes of UTF-8
        return self.starts[line - 1] + len(row)

    def add(self, operator: str, node: ast.AST | tuple[int, int], after: str) -> None:
        start, end = node if isinstance(node, tuple) else self.span(node)
        if self.text[start:end] != after:
            self.found.append((operator, start, end, after))

    def source(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def between(self, left: ast.AST, right: ast.AST) -> tuple[int, int]:
        return self.span(left)[1], self.span(right)[0]

    def swap_symbol(self, operator: str, left: ast.AST, right: ast.AST, new: str) -> None:
        start, end = self.between(left, right)
        gap = self.text[start:end]
        match = re.search(r"[<>=!+\-*/%&|]+|\b(?:is not|not in|is|in|and|or)\b", gap)
        if match and "#" not in gap:
            self.add(operator, (start + match.start(), start + match.end()), new)

    def walk(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            if any("overload" in ast.unparse(x) for x in node.decorator_list):
                return
            self.function(node)
            for x in (*node.args.defaults, *node.args.kw_defaults):
                if x is not None:
                    self.walk(x)
            for x in node.body:
                self.walk(x)
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.walk(node.value)
            return
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
            return  # words, and what only type checkers read
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        visit = getattr(self, f"visit_{type(node).__name__}", None)
        if visit:
            visit(node)
        for x in ast.iter_child_nodes(node):
            self.walk(x)

    def function(self, node: ast.FunctionDef) -> None:
        for x in node.decorator_list:
            if "cache" in ast.unparse(x):
                self.add("no cache", x, "(lambda f: f)")
        plain = not node.decorator_list and len(node.args.args) in (1, 2, 3)
        own = not node.args.args or node.args.args[0].arg not in ("self", "cls", "ctx")
        yields = any(isinstance(x, ast.Yield | ast.YieldFrom) for x in ast.walk(node))
        if plain and own and not yields and not node.name.startswith("_check"):
            place = self._place(node.lineno, 0)
            indent = " " * node.col_offset
            self.add("stale cache", (place, place), f"{indent}{STALE}\n")

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            symbol = COMPARED[type(node.ops[0])]
            self.swap_symbol("comparison", node.left, node.comparators[0], symbol)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        new = "or" if isinstance(node.op, ast.And) else "and"
        self.swap_symbol("and, or", node.values[0], node.values[1], new)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            return
        if type(node.op) in COMPUTED:
            self.swap_symbol("arithmetic", node.left, node.right, COMPUTED[type(node.op)])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub | ast.Not):
            kind = "sign" if isinstance(node.op, ast.USub) else "negation"
            self.add(kind, node, f"({self.source(node.operand)})")

    def visit_Constant(self, node: ast.Constant) -> None:
        if type(node.value) is bool:
            self.add("flag", node, str(not node.value))
        elif type(node.value) is int:
            self.add("off by one", node, str(node.value + 1))
        elif type(node.value) is float:
            self.add("number", node, repr(2 * node.value if node.value else 1.0))

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        test = self.source(node.test)
        raises = isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise)
        if raises:
            self.add("skipped check", node.test, "False")
        else:
            self.add("dropped branch", node.test, "True")
            self.add("dropped branch", node.test, "False")
            self.add("condition", node.test, f"not ({test})")

    visit_IfExp = visit_If

    def visit_Call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg and len(node.keywords) + len(node.args) > 1:
                start, end = self._place(keyword.lineno, keyword.col_offset), self.span(keyword)[1]
                rest = re.match(r"\s*,\s?", self.text[end:])
                if rest:
                    self.add("dropped keyword", (start, end + rest.end()), "")
                else:
                    head = re.search(r",\s*$", self.text[:start])
                    if head:
                        self.add("dropped keyword", (head.start(), end), "")
        names = [x for x in node.args if isinstance(x, ast.Name | ast.Attribute | ast.Subscript)]
        if len(names) >= 2 and names[0] is node.args[0] and names[1] is node.args[1]:
            one, other = self.span(names[0]), self.span(names[1])
            gap = self.text[one[1] : other[0]]
            swapped = self.source(names[1]) + gap + self.source(names[0])
            self.add("swapped arguments", (one[0], other[1]), swapped)
        if isinstance(node.func, ast.Attribute):
            owner = self.source(node.func.value)
            if node.func.attr in UNDONE and owner not in ("torch", "tl"):
                self.add("no " + node.func.attr, node, f"({owner})")
            if node.func.attr in REDUCED:
                end = self.span(node.func)[1]
                place = (end - len(node.func.attr), end)
                self.add("other function", place, REDUCED[node.func.attr])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.source(node.value)
        if owner in ("torch", "tl") and node.attr in DTYPES:
            self.add("dtype", node, f"{owner}.{DTYPES[node.attr]}")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and "super()" not in self.source(node):
            self.add("dropped statement", node, "pass")

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        target, value = self.source(node.target), self.source(node.value)
        self.add("wrong sum", node, f"{target} = {value}")

    def visit_Return(self, node: ast.Return) -> None:
        value = node.value
        if isinstance(value, ast.Tuple) and len(value.elts) >= 2:
            one, other = self.span(value.elts[0]), self.span(value.elts[1])
            swapped = self.source(value.elts[1]) + self.text[one[1] : other[0]]
            self.add("swapped results", (one[0], other[1]), swapped + self.source(value.elts[0]))


# operator, pattern, replacement; of C++ and CUDA
TEXT = (
    ("off by one", r"(?<=[\w)\]]) < (?=[\w(])", " <= "),
    ("off by one", r" <= ", " < "),
    ("off by one", r"(?<=[\w)\]]) \+ 1\b(?!\.)", ""),
    ("off by one", r"(?<=[\w)\]]) - 1\b(?!\.)", ""),
    ("comparison", r" >= ", " > "),
    ("comparison", r" == ", " != "),
    ("comparison", r" != ", " == "),
    ("arithmetic", r"(?<=[\w)\]]) - (?=[\w(])", " + "),
    ("arithmetic", r"(?<=[\w)\]]) \+ (?=[\w(])", " - "),
    ("wrong sum", r" \+= ", " = "),
    ("wrong product", r" \*= ", " = "),
    ("and, or", r" && ", " || "),
    ("and, or", r" \|\| ", " && "),
    ("sign", r"(?<=[=(,?:] )-(?=[a-z(])|(?<=[(])-(?=[a-z(])", ""),
    ("negation", r"(?<=[(\s])!(?=[a-z(])", ""),
    ("flag", r"\btrue\b", "false"),
    ("flag", r"\bfalse\b", "true"),
    ("other function", r"\bstd::min\b", "std::max"),
    ("other function", r"\bstd::max\b", "std::min"),
    ("other function", r"\blarger\(", "smaller("),
    ("dropped branch", r"\bif \((?!constexpr).*\) (?=return|continue|break)", "if (false) "),
    ("condition", r"(?<= \? )([\w.()\[\]]+) : ([\w.()\[\]]+)(?=[;,)])", r"\2 : \1"),
    (
        "dropped statement",
        r"^ +(?!return|break|continue|case|using|typename)[\w.<>:]+\(.*\);$",
        ";",
    ),
    ("dropped statement", r"^ +[\w.\[\]>-]+ [*+|&^-]?= .*;$", ";"),
)
SKIPPED = re.compile(
    r"^\s*(//|#|\*|template|static_assert|using|namespace|extern|STD_|TORCH_|constexpr)"
)


def _of_python(path: str, text: str) -> Iterator[tuple[str, int, int, str]]:
    found = _Python(path, text)
    found.walk(ast.parse(text))
    yield from found.found


def _of_text(path: str, text: str) -> Iterator[tuple[str, int, int, str]]:
    start = 0
    for line in text.splitlines(keepends=True):
        code = line.split("//")[0].rstrip()
        if code and not SKIPPED.match(line) and '"' not in code:
            for operator, pattern, new in TEXT:
                for match in re.finditer(pattern, code):
                    after = match.expand(new)
                    yield operator, start + match.start(), start + match.end(), after
        start += len(line)


def of_file(path: Path, root: Path) -> list[Mutant]:
    """All mutants of a file, in the order of their places."""
    text, name = path.read_text(), path.relative_to(root).as_posix()
    make = _of_python if path.suffix == ".py" else _of_text
    found, seen = [], {}
    for operator, start, end, after in make(name, text):
        first = text.rfind("\n", 0, start) + 1
        line = text[first : text.find("\n", start)]
        known = (name, line.strip(), start - first - (len(line) - len(line.lstrip())), after)
        seen[known] = seen.get(known, 0) + 1  # the same line twice
        key = hashlib.sha256(repr((known, end - start, operator, seen[known])).encode()).hexdigest()
        row = text.count("\n", 0, start) + 1
        found.append(Mutant(name, row, operator, text[start:end], after, start, end, key[:10]))
    return found


def chosen(files: list[Path], root: Path, count: int, seed: int) -> list[Mutant]:
    """A sample of the mutants of files: in turn one of each file, of operators in turn, at most one
    of a line."""

    def rank(x: Mutant) -> str:
        return hashlib.sha256(f"{seed} {x.key}".encode()).hexdigest()

    waiting = [sorted(of_file(path, root), key=rank) for path in files]
    taken: list[Mutant] = []
    used: dict[str, int] = {}
    lines: set[tuple[str, int]] = set()
    while len(taken) < count and any(waiting):
        for mutants in waiting:
            mutants[:] = [x for x in mutants if (x.path, x.line) not in lines]
            if mutants and len(taken) < count:
                # the rarest operator so far, then chance
                best = min(mutants, key=lambda x: (used.get(x.operator, 0), rank(x)))
                taken.append(best)
                lines.add((best.path, best.line))
                used[best.operator] = used.get(best.operator, 0) + 1
    return taken
