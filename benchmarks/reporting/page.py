"""One self-contained HTML page from result files.

Figures are embedded, nothing is loaded from anywhere. Files of the sweep have the columns of
``sheet.Row``; a file with other columns (accuracies) is shown as the table that it is.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..measuring import sheet
from ..measuring.rates import said
from ..measuring.sheet import BenchmarkError, Row
from . import goals, plot, summary, tables

TITLES = {  # in this order
    "paper": "The scaling study: time and memory against atoms",
    "molecules": "Batches of molecules, and the performance goals",
    "quick": "Every contender, at a few sizes",
    "seeds": "Seed pooling",
    "modules": "The whole pooling module beside PyG's",
    "neighbours": "Sets of neighbours with a bias of the keys",
    "dropins": "Modules, and the drop-ins for them",
    "training": "A training step of a whole model",
    "forces": "Training on forces",
    "pet": "PET of metatrain with its own attention and with ours",
    "qm7b": "QM7b: test error by pooling",
}
CURVES = "-curves"  # files of learning curves are drawn, not tabulated

STYLE = """
:root { color-scheme: light; --ink: #1c2128; --soft: #59636e; --line: #d8dee4; --ours: #eef6ee; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff;
       max-width: 1240px; margin: 0 auto; padding: 1.5rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; border-top: 2px solid var(--ink);
     padding-top: .8rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 72ch; }
nav ul { columns: 2; }
.warn { background: #fff4d6; border-left: 4px solid #c98a00; padding: .4rem .8rem; }
code { font-size: .9em; }
a { color: #0b57a4; }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .3rem 0 1rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .45rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; white-space: normal; }
tr.ours td { background: var(--ours); font-weight: 600; }
small { color: var(--soft); font-weight: 400; }
td.off { color: var(--soft); font-weight: 400; }
td.yes { color: #116329; } td.no { color: #b35900; font-weight: 600; }
table.wrap td { white-space: normal; }
table.text td, table.text th { text-align: left; white-space: normal; }
figure { margin: .6rem 0 1.2rem; } figure img { width: 100%; height: auto; }
details > summary { cursor: pointer; color: #0b57a4; margin: .6rem 0; }
@media print { h2 { break-before: page; } }
"""

HOW = """
<ul>
<li><b>Work.</b> Every contender takes the same packed rows (all atoms of all molecules, one after
the other) and must give packed rows back. Padding and unpadding are inside the clock; what a
program can compute once per batch (indices, masks, lists of sizes) is outside it, for
everyone.</li>
<li><b>Right before fast.</b> The first call of each contender is compared with float64, gradients
and second gradients included. Who is wrong is not timed.</li>
<li><b>Time.</b> Contenders take turns within one process; the tables give medians, the bands of
the figures the 20th to 80th percentile. "+ backward" contains the forward pass, "+ second
derivative" contains both: it is a step of training on forces. On CUDA a call of less than 10 ms is
timed by replays of a graph that holds it several times, on inputs that are together larger than the
cache: what is measured is the kernels, not Python. Rows of calls that no graph can hold say
so.</li>
<li><b>Memory.</b> Peak over the inputs during one call: resident memory of a fresh child process
on a CPU (exact to about half a megabyte, "-" below that), torch's allocator on CUDA.</li>
<li><b>Limit.</b> The larger of (flops / rate of multiply-adds) and (bytes / rate of memory). On a
CPU the first is that of a loop on registers at the widest vectors, the second the faster of reading
and copying a working set of that size, caches included; both are the best of many measurements
before and after the run. "x library" compares with the rates of the library's matrix product and of
a copy beyond the caches instead: it is no limit, and a good kernel can be below it. Results from
before there was such a loop, from builds without the C++ library and from CUDA have only that; the
line under each title says which rates were measured.</li>
<li><b>Exponents.</b> "time ~ n^p" is fitted over the sizes from 512 atoms on. In theory the naive
way has 2 and 2, a flash kernel 2 and 1. A fit above that is a matrix that outgrows the caches, one
below a part that does not grow.</li>
<li><b>Words instead of a number</b> are results too: refused (it says why), out of memory (oom),
timeout, wrong, skipped (a smaller size had already failed, or the time for the suite was
over).</li>
</ul>
"""


@dataclass
class Results:
    """One file: rows of the sweep, or the cells of a table with other columns."""

    path: Path
    rows: list[Row]
    runs: list[dict]
    head: list[str]
    cells: list[list[str]]

    @property
    def title(self) -> str:
        return TITLES.get(self.path.stem, self.path.stem)


def load(path: Path) -> Results:
    """Raises BenchmarkError for a file that is damaged or cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []  # sheet.read says why
    plain = [line for line in lines if line and not line.startswith("#")]
    head = next(csv.reader(plain[:1]), [])
    if not head or set(head) & {"workload", "contender", "p50_ms"}:
        return Results(path, *sheet.read(path), [], [])
    cells = list(csv.reader(plain[1:]))
    for number, line in enumerate(cells, 1):
        if len(line) != len(head):
            raise BenchmarkError(f"{path}, row {number}: {len(line)} fields, expected {len(head)}")
    comments = [x.removeprefix(sheet.COMMENT) for x in lines if x.startswith(sheet.COMMENT)]
    try:
        runs = [json.loads(x) for x in comments]
    except json.JSONDecodeError:
        raise BenchmarkError(f"{path}: provenance that is not JSON") from None
    return Results(path, [], runs, head, cells)


def render(paths: list[Path]) -> str:
    """The whole page. Raises BenchmarkError for a file that cannot be read."""
    order = list(TITLES)
    loaded = [load(path) for path in paths if not path.stem.endswith(CURVES)]
    known = [x for x in loaded if x.path.stem in order]
    known.sort(key=lambda x: (order.index(x.path.stem), str(x.path)))
    loaded = known + [x for x in loaded if x.path.stem not in order]
    links = "".join(f'<li><a href="#f{i}">{_text(x.title)}</a>' for i, x in enumerate(loaded))
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>attnpool_kernels: benchmarks</title><style>{STYLE}</style></head><body>",
        "<h1>attnpool_kernels: time and memory of set attention</h1>",
        "<p class=soft>Exact attention over the atoms of each molecule in a concatenated batch, "
        "against what else can be called from Python today.</p>",
    ]
    if not any(_on_gpu(x.runs) for x in loaded):
        parts.append("<p class=warn>Nothing on this page was measured on a GPU.</p>")
    lines = summary.lines([(x.path.stem, x.rows) for x in loaded])
    if lines:
        items = "".join(f"<li>{_text(line)}" for line in lines)
        parts.append(f"<h2>In short</h2><ul>{items}</ul>")
    parts += [f"<nav><ul>{links}</ul></nav>", f"<h2>How to read this page</h2>{HOW}"]
    for i, result in enumerate(loaded):
        parts.append(f'<h2 id="f{i}">{_text(result.title)}</h2>')
        parts.append(_provenance(result))
        parts += _section(result) if result.rows else _foreign(result)
    return "\n".join([*parts, "</body></html>"])


def _on_gpu(runs: list[dict]) -> bool:
    return any((run.get("options") or {}).get("device") == "cuda" for run in runs)


def _section(result: Results) -> list[str]:
    rows, runs = result.rows, result.runs
    parts = []
    judged = goals.judge(rows) if any(r.suite == "molecules" for r in rows) else []
    if judged:
        parts.append("<h3>Performance goals</h3>" + _goals(judged))
    with tempfile.TemporaryDirectory() as folder:
        about = runs[-1] if runs else {}
        title = f"{about.get('device', '')}, {about.get('threads', '?')} threads"
        for figure in plot.draw(rows, Path(folder) / "figure", title):
            if figure.suffix == ".svg":
                data = base64.b64encode(figure.read_bytes()).decode()
                label = figure.stem.removeprefix("figure-")
                parts.append(
                    f'<figure><img alt="{label}: time and memory of all contenders" '
                    f'src="data:image/svg+xml;base64,{data}"></figure>'
                )
    parts.append(_exponents(rows))
    for family in ("scaling", "constant"):
        parts += _scaling(rows, family)
    parts += _batches(rows)
    parts += _others(rows)
    parts.append(_refusals(rows))
    parts.append(_kernels(rows))
    return [part for part in parts if part]


def _exponents(rows: list[Row]) -> str:
    """Fitted exponents of every contender and pass beside each other."""
    chosen = [r for r in rows if r.family == "scaling"]
    passes = [what for what in plot.PASS if any(r.what == what for r in chosen)]
    lines = []
    for (name, dtype), own in tables.grouped(chosen, "contender", "dtype").items():
        cells = []
        for what in passes:
            powers = tables.exponents([r for r in own if r.what == what])
            cells += [f"{x:.2f}" if x is not None else "-" for x in powers]
        if any(cell != "-" for cell in cells):
            lines.append(f"<tr{_ours(own)}>{_cells(name, dtype, *cells)}</tr>")
    if not lines:
        return ""
    head = [f"{plot.PASS[what]}: {kind} ~ n^" for what in passes for kind in ("time", "memory")]
    return "<h3>Fitted exponents, one molecule, from 512 atoms on</h3>" + _table(
        ["contender", "dtype", *head], lines
    )


def _others(rows: list[Row]) -> list[str]:
    """Families without a layout of their own: one table, one line per measurement."""
    known = ("scaling", "constant", "molecules", "mixed", "long", "seeds", "modules", "overhead")
    parts = []
    chosen = [r for r in rows if r.family not in known]
    for (family,), group in tables.grouped(chosen, "family").items():
        lines = []
        for row in group:
            cells = [
                "" if x is None else tables.milliseconds(x)
                for x in (row.p50_ms, row.p20_ms, row.p80_ms)
            ]
            cells.append(f"{1e3 * row.molecules / row.p50_ms:.3g}" if row.timed else "")
            cells.append("" if row.peak_bytes is None else tables.size(row.peak_bytes))
            cells.append(row.check if row.ok else f"{row.status}: {row.reason}")
            lines.append(
                f"<tr{_ours([row])}>{_cells(row.workload, row.what, row.contender, *cells)}</tr>"
            )
        head = ["workload", "what", "contender", "ms, median", "p20", "p80"]
        head += ["molecules/s", "peak bytes", "check"]
        parts.append(f"<h3>{_text(family)}</h3>" + _table(head, lines, "wrap"))
    return parts


def _foreign(result: Results) -> list[str]:
    """A table of other columns; test errors become one line a model, mean over the splits."""
    parts = []
    picture = result.path.with_suffix(".png")
    if picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(
            f'<figure><img alt="{_text(result.title)}" src="data:image/png;base64,{data}"></figure>'
        )
    rows = [dict(zip(result.head, line)) for line in result.cells]
    if {"backbone", "pooling", "target", "test_mae", "constant_mae"} <= set(result.head):
        parts.append(_errors(rows))
    else:
        parts.append(_table(result.head, [f"<tr>{_cells(*line)}</tr>" for line in result.cells]))
    return parts


def _errors(rows: list[dict[str, str]]) -> str:
    targets = {r["target"]: r.get("unit", "") for r in rows}
    models = dict.fromkeys((r["backbone"], r["pooling"]) for r in rows)

    def cells(chosen: list[dict[str, str]], column: str) -> list[str]:
        found = []
        for target in targets:
            own = [r[column] for r in chosen if r["target"] == target and r[column]]
            try:
                own = [float(x) for x in own]
            except ValueError as error:
                raise BenchmarkError(f"column {column}, target {target}: {error}") from None
            found.append(f"{statistics.fmean(own):.4g}" if own else "")
        return found

    lines = []
    for model in models:
        own = [r for r in rows if (r["backbone"], r["pooling"]) == model]
        splits = len({r.get("split") for r in own})
        kind = " class=ours" if model[1] == "abp" else ""
        lines.append(f"<tr{kind}>{_cells(*model, str(splits), *cells(own, 'test_mae'))}</tr>")
    lines.append(
        f"<tr>{_cells('mean of the training set', '', '', *cells(rows, 'constant_mae'))}</tr>"
    )
    head = ["backbone", "pooling", "splits", *[f"{t}, {unit}" for t, unit in targets.items()]]
    return "<p class=soft>Mean absolute test error, mean over the splits</p>" + _table(head, lines)


def _goals(judged: list[tuple[str, str, str, bool]]) -> str:
    lines = []
    for name, wanted, measured, reached in judged:
        word = "" if wanted == "-" else "reached" if reached else "not reached"
        mark = f'<td class="{"yes" if reached else "no"}">{word}</td>'
        lines.append(f"<tr>{_cells(name, wanted, measured)}{mark}</tr>")
    return _table(["goal", "wanted", "measured", ""], lines)


def _scaling(rows: list[Row], family: str) -> list[str]:
    parts = []
    chosen = [r for r in rows if r.family == family]
    for (what, dtype, heads, dim), group in tables.grouped(
        chosen, "what", "dtype", "heads", "dim"
    ).items():
        xs = sorted({r.x for r in group if r.x is not None})
        lines = []
        for (name,), own in tables.grouped(group, "contender").items():
            at = {r.x: r for r in own}
            if not any(r.timed for r in own):
                continue
            cells = "".join(_result(at.get(x)) for x in xs)
            lines.append(f"<tr{_ours(own)}>{_cells(name)}{cells}</tr>")
        if lines:
            title = (
                "one molecule" if family == "scaling" else f"{group[0].atoms} atoms, equal sizes"
            )
            parts.append(
                f"<h3>{title}, {tables.WORDS.get(what, what)}, {heads} x {dim} {dtype}</h3>"
                "<p class=soft>milliseconds, peak memory in bytes below; by atoms per molecule</p>"
                + _table(["contender", *[f"{x:,}" for x in xs]], lines)
            )
    return parts


def _batches(rows: list[Row]) -> list[str]:
    parts = []
    for title, families in (
        ("Batches of molecules", ("molecules", "mixed", "long")),
        ("Neighbour sets", ("neighbours",)),
        ("Seed pooling", ("seeds",)),
        ("Pooling module", ("modules",)),
        ("Drop-ins", ("dropins",)),
    ):
        chosen = [r for r in rows if r.family in families and not r.contender.startswith("base:")]
        names = list(dict.fromkeys(r.contender for r in chosen if r.timed))
        if not names:
            continue
        lines = []
        for (key, what), group in tables.grouped(chosen, "workload", "what").items():
            if not any(r.timed for r in group):
                continue
            mine, other = tables.fastest(group, True), tables.fastest(group, False)
            speed = f"{other.p50_ms / mine.p50_ms:.2f}" if mine and other else "-"
            at = {r.contender: r for r in group}
            cells = "".join(_result(at.get(name)) for name in names)
            what = what.replace("double_backward", "second derivative")
            lines.append(f"<tr>{_cells(key, what, speed, *tables.over(mine))}{cells}</tr>")
        head = ["workload", "pass", "speed-up", "x limit", "x library", *names]
        parts.append(
            f"<h3>{title}</h3><p class=soft>Milliseconds, peak memory in bytes below. Speed-up: "
            "over the fastest other; x limit: our time over the limit of the machine; x library: "
            "over what the rates of the library's matrix product and copy come to, which is no "
            "limit.</p>" + _table(head, lines)
        )
    return parts


def _refusals(rows: list[Row]) -> str:
    found: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if not row.ok:
            key = (row.contender, row.status, row.reason)
            found[key] = found.get(key, 0) + 1
    lines = [
        f"<tr>{_cells(name, status, str(n), why)}</tr>" for (name, status, why), n in found.items()
    ]
    if not lines:
        return ""
    table = _table(["contender", "status", "rows", "reason"], lines, "text")
    return (
        f"<details><summary>What was not timed, and why ({len(lines)})</summary>{table}</details>"
    )


def _kernels(rows: list[Row]) -> str:
    found = dict.fromkeys((r.contender, r.kernel) for r in rows if r.ok)
    lines = [f"<tr>{_cells(*key)}</tr>" for key in found]
    if not lines:
        return ""
    table = _table(["contender", "kernel"], lines, "text")
    return f"<details><summary>Which kernel of which version ran</summary>{table}</details>"


def _provenance(result: Results) -> str:
    lines = [f"<p class=soft>Data: <code>{_text('/'.join(result.path.parts[-2:]))}</code></p>"]
    for run in result.runs:
        versions = ", ".join(f"{k} {v}" for k, v in (run.get("versions") or {}).items())
        measured = said(run.get("rates") or {})
        lines.append(
            f"<p class=soft>{_text(run.get('date', ''))}; {_text(run.get('device', ''))}, "
            f"{run.get('threads', '?')} threads of {run.get('cores', '?')} cores; "
            f"{_text(run.get('system', ''))}; {_text(versions)}; attnpool_kernels "
            f"{_text(run.get('attnpool_kernels', ''))} "
            f"at {_text(run.get('commit') or 'no commit')}."
            + (f" Measured in the run: {_text(measured)}." if measured else "")
            + "</p>"
        )
    return "".join(lines)


def _result(row: Row | None) -> str:
    """Milliseconds with the memory under them, or the word for what happened."""
    if row is None:
        return "<td></td>"
    off = "" if row.ok else " class=off"
    tip = f' title="{_text(row.reason)}"' if row.reason else ""
    time, _, memory = tables.cell(row).partition("|")
    below = f"<br><small>{_text(memory)}</small>" if memory else ""
    return f"<td{off}{tip}>{_text(time)}{below}</td>"


def _ours(rows: list[Row]) -> str:
    return " class=ours" if any(r.ours for r in rows) else ""


def _cells(*texts: str) -> str:
    return "".join(f"<td>{_text(text)}</td>" for text in texts)


def _table(head: list[str], lines: list[str], kind: str = "") -> str:
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "\n".join(lines)
    return (
        f'<div class=scroll><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(x: object) -> str:
    return html.escape(str(x), quote=True)
