"""Files with gaps: a value that is missing is a gap in tables and figures, never a traceback."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks.measuring import sheet
from benchmarks.measuring.sheet import BenchmarkError
from benchmarks.reporting import goals, page, plot, summary, tables

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FAMILIES = ("scaling", "molecules", "long", "seeds", "modules", "training", "overhead")
KINDS = {f.name: str(f.type) for f in fields(sheet.Row)}
MAY_BE_EMPTY = [name for name, kind in KINDS.items() if "None" in kind or kind.startswith("str")]
ABOUT = {
    "date": "2030-01-01",
    "device": "test",
    "cores": 2,
    "threads": 2,
    "system": "Linux",
    "versions": {"torch": "2.13"},
    "attnpool_kernels": "0.1.0",
    "commit": "abc",
    "options": {"device": "cpu"},
    "rates": {
        "matmul_gflops": {"float32": 150.0},
        "copy_gbs": 20.0,
        "fma_gflops": {"float32": 200.0},
        "memory_gbs": {"65536": 100.0},
    },
}


@pytest.fixture(autouse=True)
def _fast_figures(monkeypatch):
    """Figures are made and their ticks are placed; texts are not drawn, which takes seconds."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "tight_layout", lambda *arguments, **options: None)

    def save(figure, stem, name):
        if figure is not None:
            for axis in figure.axes:
                for side in (axis.xaxis, axis.yaxis):
                    assert all(map(math.isfinite, side.get_majorticklocs()))
                    side.get_minorticklocs()
            import matplotlib.pyplot as plt

            plt.close(figure)
        return []

    monkeypatch.setattr(plot, "save", save)


def _rows() -> list[sheet.Row]:
    """Every family and status that a layout of its own has been written for."""
    rows = []
    for family in FAMILIES:
        for i, x in enumerate((512, 1024, 2048, 16384)):
            for what in ("forward", "double_backward"):
                for contender in ("attnpool:cpu", "naive", "base:attnpool:cpu"):
                    ours = contender == "attnpool:cpu"
                    ms = x * x / 2**16 * (1 if ours else 4)
                    row = sheet.Row(
                        suite="molecules",
                        family=family,
                        workload=f"QM7b x{x} 8x32",
                        x=x,
                        molecules=1,
                        atoms=512,
                        longest=x,
                        heads=8,
                        dim=32,
                        seeds=2**i,
                        dtype="float32",
                        layout="separate",
                        what=what,
                        contender=contender,
                        kernel="kernel, 1.0",
                        ours=int(ours),
                        status="ok",
                        reason="",
                        p20_ms=0.9 * ms,
                        p50_ms=ms,
                        p80_ms=1.1 * ms,
                        samples=5,
                        peak_bytes=x * 8192,
                        error=1e-7,
                        check="all",
                        flops=1e9,
                        bytes=1e6,
                        limit_ms=ms / 2,
                        ratio=2.0,
                        run=0,
                        limit_by="arithmetic",
                        library_ms=ms / 1.5,
                    )
                    if contender == "naive" and x == 16384:
                        row.status, row.reason = ("oom", "no memory")
                        row.p20_ms = row.p50_ms = row.p80_ms = row.peak_bytes = row.ratio = None
                    rows.append(row)
    return rows


def _file(path: Path, column: str, value: str | None, every: int) -> Path:
    """A file of ``_rows`` with ``column`` set to ``value``, or without it for None."""
    table = sheet.Sheet(path)
    table.runs, table.rows = [ABOUT], _rows()
    table.rewrite()
    lines = path.read_text().splitlines()
    head = next(csv.reader(lines[:1]))
    place, text = head.index(column), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    number = 0
    for line in lines:
        if line.startswith("#"):
            text.write(line + "\n")
            continue
        cells = next(csv.reader([line]))
        if value is None:
            del cells[place]
        elif number and number % every == 0:
            cells[place] = value
        number += 1
        writer.writerow(cells)
    path.write_text(text.getvalue())
    return path


def _show(path: Path) -> str:
    """Every table and figure of a file; the page."""
    rows, _ = sheet.read(path)
    tables.everything(rows)
    goals.render(rows)
    summary.lines([("paper", rows), ("molecules", rows), ("seeds", rows), ("modules", rows)])
    return page.render([path])  # draws what plot.draw does


@pytest.mark.parametrize("every", [1, 2], ids=lambda n: f"every {n}")
@pytest.mark.parametrize("column", MAY_BE_EMPTY)
def test_empty_column(column, every, tmp_path):
    path = _file(tmp_path / "molecules.csv", column, "", every)
    if column == "status":
        with pytest.raises(BenchmarkError, match="status '' is none of"):
            _show(path)
    else:
        assert "<table" in _show(path)


@pytest.mark.parametrize("value", ["nan", "0"])
@pytest.mark.parametrize("column", [c for c in MAY_BE_EMPTY if KINDS[c].startswith("float")])
def test_column_of_no_use(column, value, tmp_path):
    assert "<table" in _show(_file(tmp_path / "molecules.csv", column, value, 1))


@pytest.mark.parametrize("column", sorted(set(KINDS) - set(MAY_BE_EMPTY)))
def test_empty_column_that_must_not_be(column, tmp_path):
    with pytest.raises(BenchmarkError, match=f"column {column} is empty"):
        _show(_file(tmp_path / "molecules.csv", column, "", 1))


@pytest.mark.parametrize("column", KINDS)
def test_column_that_is_not_there(column, tmp_path):
    path = _file(tmp_path / "molecules.csv", column, None, 1)
    if column in sheet.LATER:
        assert "<table" in _show(path)
    else:
        with pytest.raises(BenchmarkError, match=f"missing column '{column}'"):
            _show(path)


@pytest.mark.parametrize("name", ABOUT)
@pytest.mark.parametrize("gone", [True, False], ids=["missing", "null"])
def test_provenance_with_gaps(name, gone, tmp_path):
    path = tmp_path / "molecules.csv"
    table = sheet.Sheet(path)
    about = {k: v for k, v in ABOUT.items() if k != name} | ({} if gone else {name: None})
    table.runs, table.rows = [about], _rows()[:20]
    table.rewrite()
    assert "<table" in page.render([path])


def test_no_provenance_at_all(tmp_path):
    path = tmp_path / "molecules.csv"
    table = sheet.Sheet(path)
    table.rows = _rows()[:20]
    table.rewrite()
    assert "# run" not in path.read_text() and "<table" in _show(path)


@pytest.mark.parametrize("column", ["unit", "test_mae", "constant_mae", "target", "split"])
def test_accuracies_with_gaps(column, tmp_path):
    qm7b = pytest.importorskip("benchmarks.studies.qm7b")
    head = list(qm7b.RESULTS)
    rows = [
        {**dict.fromkeys(head, "1"), "backbone": "schnet", "pooling": pooling, "target": target}
        for pooling in ("abp", "sum")
        for target in qm7b.TARGETS
    ]
    for row in rows:
        row[column] = ""
    (tmp_path / "qm7b.csv").write_text(
        "\n".join([",".join(head), *[",".join(row[x] for x in head) for row in rows]])
    )
    assert "schnet" in page.render([tmp_path / "qm7b.csv"])
    assert "schnet" in qm7b.table(rows)


@pytest.mark.parametrize("column", ["epoch", "val_mae", "train_loss"])
def test_curves_with_gaps(column, tmp_path):
    qm7b = pytest.importorskip("benchmarks.studies.qm7b")
    results = qm7b.Table(tmp_path / "qm7b.csv", qm7b.RESULTS)
    curves = qm7b.Table(tmp_path / "qm7b-curves.csv", qm7b.CURVES)
    for file in (results, curves):
        file.comment(json.dumps(ABOUT))
    name = {"backbone": "schnet", "pooling": "abp", "split": 1, "target": "homo_gw"}
    results.add([{**name, "unit": "eV", "test_mae": 0.1}])
    curves.add(
        [{**name, "epoch": i, "val_mae": 0.5, "train_loss": 0.1} | {column: ""} for i in range(3)]
    )
    assert qm7b.draw(tmp_path).stat().st_size > 1000


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.csv")), ids=lambda p: p.stem)
def test_committed_results_can_be_read(path):
    """Those of before the limit was one say that the library's product stood in for it."""
    if path.stem.endswith(page.CURVES):
        return
    result, text = page.load(path), page.render([path])
    old = [run for run in result.runs if run.get("rates") and "fma_gflops" not in run["rates"]]
    assert text.count("it stands in for the limit") == len(old)
    if old and any(row.limit_ms for row in result.rows):
        assert not any(map(tables.is_limit, result.rows))
        assert all(tables.over(row)[0] == "-" for row in result.rows)
        assert any(tables.over(row)[1] != "-" for row in result.rows)
