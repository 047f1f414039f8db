"""One self-contained HTML page from result files: ``python -m benchmarks.report [CSV ...]``.

Figures are embedded as SVG, nothing is loaded from anywhere. Without arguments the page shows what
is committed under ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
import tempfile
from pathlib import Path

from . import goals, plot, sheet, tables
from .sheet import BenchmarkError, Row

HERE = Path(__file__).resolve().parent

STYLE = """
:root { color-scheme: light; --ink: #1c2128; --soft: #59636e; --line: #d8dee4; --ours: #eef6ee; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff;
       max-width: 1240px; margin: 0 auto; padding: 1.5rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; border-top: 2px solid var(--ink);
     padding-top: .8rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 72ch; }
nav a { margin-right: 1rem; }
a { color: #0b57a4; }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .3rem 0 1rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .45rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; white-space: normal; }
tr.ours td { background: var(--ours); font-weight: 600; }
td.off { color: var(--soft); font-weight: 400; }
td.yes { color: #116329; } td.no { color: #b35900; font-weight: 600; }
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
derivative" contains both: it is a step of training on forces.</li>
<li><b>Memory.</b> Peak over the inputs during one call: resident memory of a fresh child process
on a CPU (exact to about half a megabyte, "-" below that), torch's allocator on CUDA.</li>
<li><b>Limit.</b> The larger of (flops / rate of a matrix product) and (bytes / rate of a copy),
both rates measured in the same run. A small batch that stays in a cache can be below it.</li>
<li><b>Exponents.</b> "time ~ n^p" is fitted over the sizes from 512 atoms on. The naive way has 2
and 2; a flash kernel 2 and 1.</li>
<li><b>Words instead of a number</b> are results too: refused (it says why), out of memory (oom),
timeout, wrong, skipped (a smaller size had already failed).</li>
</ul>
"""


def page(paths: list[Path]) -> str:
    """The whole page. Raises BenchmarkError for a file that cannot be read."""
    loaded = [(path, *sheet.read(path)) for path in paths]
    loaded.sort(key=lambda x: ["molecules", "quick", x[0].stem].index(x[0].stem))
    names = [_name(path, runs) for path, _, runs in loaded]
    links = "".join(f'<a href="#f{i}">{_text(name)}</a>' for i, name in enumerate(names))
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>attnpool_kernels: benchmarks</title><style>{STYLE}</style></head><body>",
        "<h1>attnpool_kernels: time and memory of set attention</h1>",
        "<p class=soft>Exact attention over the atoms of each molecule in a concatenated batch, "
        "against what else can be called from Python today.</p>",
        f"<nav>{links}</nav>",
        f"<h2>How to read this page</h2>{HOW}",
    ]
    if not any(_on_gpu(runs) for _, _, runs in loaded):
        parts.append("<p><b>Nothing on this page was measured on a GPU.</b></p>")
    for i, ((_, rows, runs), name) in enumerate(zip(loaded, names)):
        parts.append(f'<h2 id="f{i}">{_text(name)}</h2>')
        parts.append(_provenance(runs))
        parts += _section(rows, runs)
    return "\n".join([*parts, "</body></html>"])


def _on_gpu(runs: list[dict]) -> bool:
    return any(run.get("options", {}).get("device") == "cuda" for run in runs)


def _name(path: Path, runs: list[dict]) -> str:
    device = runs[-1].get("device", "unknown device") if runs else "unknown device"
    return f"{path.stem}, {device}"


def _section(rows: list[Row], runs: list[dict]) -> list[str]:
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
    for family in ("scaling", "constant"):
        parts += _scaling(rows, family)
    parts += _batches(rows)
    parts.append(_refusals(rows))
    parts.append(_kernels(rows))
    return [part for part in parts if part]


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
            if not any(r.ok for r in own):
                continue
            powers = [f"n^{p:.2f}" if p is not None else "-" for p in tables.exponents(own)]
            cells = "".join(_result(at.get(x)) for x in xs)
            lines.append(f"<tr{_ours(own)}>{_cells(name, *powers)}{cells}</tr>")
        if lines:
            title = (
                "one molecule" if family == "scaling" else f"{group[0].atoms} atoms, equal sizes"
            )
            parts.append(
                f"<h3>{title}, {tables.WORDS[what]}, {heads} x {dim} {dtype}</h3>"
                "<p class=soft>milliseconds | peak memory in bytes, by atoms per molecule</p>"
                + _table(["contender", "time ~", "memory ~", *map(str, xs)], lines)
            )
    return parts


def _batches(rows: list[Row]) -> list[str]:
    parts = []
    for title, families in (
        ("Batches of molecules", ("molecules", "mixed", "long")),
        ("Seed pooling", ("seeds",)),
        ("Pooling module", ("modules",)),
    ):
        chosen = [r for r in rows if r.family in families and not r.contender.startswith("base:")]
        names = list(dict.fromkeys(r.contender for r in chosen if r.ok))
        if not names:
            continue
        lines = []
        for (key, what), group in tables.grouped(chosen, "workload", "what").items():
            mine, other = tables.fastest(group, True), tables.fastest(group, False)
            speed = f"{other.p50_ms / mine.p50_ms:.2f}" if mine and other else "-"
            over = f"{mine.ratio:.2f}" if mine and mine.ratio else "-"
            at = {r.contender: r for r in group}
            cells = "".join(_result(at.get(name)) for name in names)
            what = what.replace("double_backward", "second derivative")
            lines.append(f"<tr>{_cells(key, what, speed, over)}{cells}</tr>")
        head = ["workload", "pass", "speed-up over the fastest other", "ours / limit", *names]
        parts.append(
            f"<h3>{title}</h3><p class=soft>milliseconds | peak memory in bytes</p>"
            + _table(head, lines)
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


def _provenance(runs: list[dict]) -> str:
    lines = []
    for run in runs:
        versions = ", ".join(f"{k} {v}" for k, v in run.get("versions", {}).items())
        rates = run.get("rates", {})
        matmul = ", ".join(f"{k} {v:g}" for k, v in rates.get("matmul_gflops", {}).items())
        lines.append(
            f"<p class=soft>{_text(run.get('date', ''))}; {_text(run.get('device', ''))}, "
            f"{run.get('threads', '?')} threads of {run.get('cores', '?')} cores; "
            f"{_text(run.get('system', ''))}; {_text(versions)}; attnpool_kernels "
            f"{_text(run.get('attnpool_kernels', ''))} "
            f"at {_text(run.get('commit') or 'no commit')}. "
            f"Measured in the run: matrix product {_text(matmul)} GFLOP/s, copy "
            f"{rates.get('copy_gbs', 0):g} GB/s.</p>"
        )
    return "".join(lines)


def _result(row: Row | None) -> str:
    if row is None:
        return "<td></td>"
    off = "" if row.ok else " class=off"
    tip = f' title="{_text(row.reason)}"' if row.reason else ""
    return f"<td{off}{tip}>{_text(tables._cell(row).replace('|', ' | '))}</td>"


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


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__.split("\n")[0])
    p.add_argument("csv", nargs="*", type=Path, help="results (default: all committed ones)")
    p.add_argument("--output", type=Path, default=HERE / "out" / "report.html", metavar="PATH",
                   help="the page (default: benchmarks/out/report.html)")  # fmt: skip
    options = p.parse_args(arguments)
    try:
        paths = options.csv or sorted((HERE / "results").glob("*/*.csv"))
        if not paths:
            raise BenchmarkError("no CSV under benchmarks/results; name one")
        text = page(paths)
        try:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise BenchmarkError(f"cannot write {options.output}: {error.strerror}") from error
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {len(paths)} result files, {len(text) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
