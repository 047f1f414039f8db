"""The benchmark suite itself, at sizes that take seconds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import report, run
from benchmarks.contenders import registry
from benchmarks.measuring import memory, sheet
from benchmarks.measuring.rates import Rates
from benchmarks.measuring.sweep import Limits, Sweep
from benchmarks.reporting import goals, plot, tables
from benchmarks.workloads import sizes, suites
from benchmarks.workloads.workload import PASSES, Workload

ROOT = Path(__file__).resolve().parents[2]
RAGGED = Workload("ragged", "molecules", (5, 1, 9, 3), heads=2, dim=8)
RATES = Rates({torch.float32: 1e11}, 1e10)


@pytest.fixture(scope="module", autouse=True)
def _stop_server():
    yield
    memory.stop()


def test_histograms_are_the_published_counts():
    for name, molecules, atoms in (("QM7b", 7211, 111_180), ("QM8", 21_786, 350_545)):
        histogram = sizes.HISTOGRAMS[name]
        assert sum(histogram.values()) == molecules
        assert sum(n * count for n, count in histogram.items()) == atoms


@pytest.mark.parametrize("kind", sizes.DISTRIBUTIONS)
def test_sizes_are_drawn_alike_everywhere(kind):
    drawn = sizes.draw(kind, 2000)
    assert drawn == sizes.draw(kind, 2000) != sizes.draw(kind, 2000, seed=1)
    mean = sum(drawn) / len(drawn)
    means = {"QM7b": 15.4, "QM8": 16.1, "QM9-like": 18.0, "QMugs-like": 60.0, "n=55+-20": 55.0}
    means |= {"neighbours": 40.0, "10-20 atoms": 15.0, "40-80 atoms": 60.0}
    wanted = means[kind]
    assert abs(mean - wanted) < 0.07 * wanted  # the cut at 4 atoms moves 55 ± 35 up a little


def test_every_suite_has_distinct_workloads():
    for name in suites.SUITES:
        for tiny in (False, True):
            keys = [work.key for work in suites.suite(name, tiny=tiny)]
            assert len(keys) == len(set(keys)) > 0


def test_study_of_the_paper():
    """8 to 100,000 atoms, in rising order, before anything that a time limit may cut."""
    study = [w for w in suites.suite("paper") if w.family == "scaling"]
    atoms = [w.x for w in study]
    assert suites.suite("paper")[: len(study)] == study
    assert atoms == sorted(atoms) and atoms[0] == 8 and atoms[-1] == 100_000
    names = {c.name for c in registry.for_workload(study[-1])}
    assert {"naive", "memory_efficient", "flash", "attnpool:cpu", "attnpool:triton"} <= names
    assert all(w.passes == PASSES for w in suites.suite("paper", "cuda") if w.family == "scaling")
    assert run.MINUTES.keys() == suites.SUITES.keys()


def test_work_of_a_known_batch():
    work = Workload("x", "molecules", (3, 5), heads=2, dim=4)
    assert work.work("forward") == (4 * 2 * 4 * (9 + 25), 4 * 8 * 8 * 4)  # 4·H·D·Σn², 4·e·H·D·Σn
    assert work.work("backward")[0] == 12 * 2 * 4 * (9 + 25)
    pool = replace(work, seeds=1)
    assert pool.work("forward")[1] == (2 * 8 + 2) * 8 * 4  # k and v once, one row out a molecule


def test_peak_memory_of_the_naive_way_is_its_matrix():
    work = Workload("n=1024", "scaling", (1024,), heads=4, dim=8, x=1024)
    found = memory.probe(work, "forward", "naive", 2, 2**32, 300.0)
    matrix = 4 * 1024 * 1024 * 4
    assert found.status == "ok", found.reason
    if not memory.Mark().exact:
        pytest.skip("this system does not reset its mark of resident memory")
    assert 1.9 * matrix < found.peak_bytes < 3.3 * matrix


def _sweep(tmp_path, limits, names, works):
    table = sheet.Sheet(tmp_path / "x.csv")
    table.start({"device": "test"})
    sweep = Sweep("quick", "cpu", RATES, table, limits, names)
    sweep.run(works)
    return {(row.x, row.contender): row for row in table.rows}


def test_refusal_oom_and_what_follows_are_rows(tmp_path):
    works = [
        Workload(f"n={n}", "scaling", (n,), heads=4, dim=8, x=n, passes=("double_backward",))
        for n in (16, 1500, 1600)
    ]
    limits = Limits(budget_s=0.1, cap_bytes=60_000_000, fewest=2, call_s=300.0)
    rows = _sweep(tmp_path, limits, ["naive", "flash"], works)
    assert rows[16, "naive"].status == "ok" and rows[16, "naive"].samples >= 1
    assert rows[16, "flash"].status == "refused" and "second" in rows[16, "flash"].reason
    assert rows[1500, "naive"].status == "oom", rows[1500, "naive"].reason
    assert rows[1600, "naive"].status == "skipped"
    assert rows[1600, "naive"].reason == "oom at 1500 atoms"


def test_timeout_is_a_row(tmp_path):
    work = Workload("n=64", "scaling", (64,), heads=1, dim=8, x=64, passes=("forward",))
    limits = Limits(budget_s=0.001, call_s=1e-6)
    rows = _sweep(tmp_path, limits, ["naive"], [work])
    assert rows[64, "naive"].status == "timeout"


def test_order_does_not_matter_to_what_failed(tmp_path):
    """A size that is waited for longer may fail before a smaller one has run."""
    works = [
        Workload(f"n={n}", "scaling", (n,), heads=4, dim=8, x=n, passes=("forward",))
        for n in (2100, 16, 2200)
    ]
    limits = Limits(budget_s=0.001, cap_bytes=60_000_000, fewest=2, call_s=300.0)
    rows = _sweep(tmp_path, limits, ["naive"], works)
    assert [rows[n, "naive"].status for n in (2100, 16, 2200)] == ["oom", "ok", "skipped"]


def test_a_slow_start_is_no_slow_call():
    """On a busy machine a child may start for longer than its call may take."""

    class Pipe:
        def __init__(self, *answers):
            self.answers = list(answers)  # (seconds until then, message)

        def poll(self, seconds):
            return self.answers[0][0] <= seconds

        def recv(self):
            return self.answers.pop(0)[1]

    class Child:
        killed = False

        def kill(self):
            self.killed = True

    fine = memory.Probe("ok", peak_bytes=1)
    child = Child()
    assert memory.answer(Pipe((60, "ready"), (1, fine)), child, 5.0) is fine and not child.killed
    early = memory.Probe("error", "before it was ready")
    assert memory.answer(Pipe((60, early)), child, 5.0) is early and not child.killed
    found = memory.answer(Pipe((60, "ready"), (6, fine)), child, 5.0)
    assert (found.status, found.reason) == ("timeout", "over 5 s for one call") and child.killed
    found = memory.answer(Pipe((1e9, "ready")), child, 5.0)
    assert found.status == "timeout" and "to start and prepare" in found.reason


def test_a_mark_that_cannot_be_reset_is_no_measurement(monkeypatch):
    """Memory that a call used below an earlier peak is not known to be 0."""

    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    mark = memory.Mark()
    before = mark.before
    assert not mark.exact and before
    for now, peak in ((before, None), (before + 4096, 4096), (None, None)):
        monkeypatch.setattr(memory, "high_water", lambda now=now: now)
        assert mark.peak() == peak


def test_run_without_memory(tmp_path, monkeypatch):
    """Memory that cannot be measured, and children that never answer in time: the run goes on."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run.rates, "measure", lambda *arguments: RATES)
    arguments = ["--tiny", "--contenders", "naive", "--budget", "0.001", "--no-molecules"]
    arguments += ["--minutes", "inf", "--output"]
    monkeypatch.setattr(memory, "probe", lambda *a, **k: memory.Probe("ok", seconds=1e-3))
    assert run.main([*arguments, str(tmp_path)]) == 0
    rows, _ = sheet.read(tmp_path / "quick-tiny.csv")
    assert rows and all(row.ok and row.peak_bytes is None for row in rows)
    assert (tmp_path / "quick-tiny-scaling.png").stat().st_size > 10_000
    monkeypatch.setattr(memory, "probe", lambda *a, **k: memory.Probe("timeout", "too slow"))
    assert run.main([*arguments, str(tmp_path / "none")]) == 0
    path = tmp_path / "none" / "quick-tiny.csv"
    assert {row.status for row in sheet.read(path)[0]} == {"timeout", "skipped"}
    assert report.main([str(path), "--output", str(tmp_path / "x.html")]) == 0


def test_long_call_runs_once(tmp_path):
    work = Workload("n=64", "scaling", (64,), heads=2, dim=8, x=64)
    limits = Limits(budget_s=0.001, long_s=0.0)
    for row in _sweep(tmp_path, limits, ["naive"], [work]).values():
        assert row.status == "ok" and row.samples == 1 and row.p50_ms > 0
        assert row.check == "all" and row.error < 1e-5


def test_wrong_contender_is_not_timed(tmp_path, monkeypatch):
    good = registry.CONTENDERS["naive"]
    bad = replace(good, prepare=lambda batch: lambda q, k, v: v)
    monkeypatch.setitem(registry.CONTENDERS, "naive", bad)
    work = replace(RAGGED, passes=("forward",))
    row = _sweep(tmp_path, Limits(budget_s=0.001), ["naive"], [work])[None, "naive"]
    assert row.status == "wrong" and row.p50_ms is None and "relative error" in row.reason


def _rows():
    def row(name, n, ms, peak, ours=0):
        return sheet.Row(
            suite="molecules",
            family="scaling",
            workload=f"n={n}",
            x=n,
            molecules=1,
            atoms=n,
            longest=n,
            heads=8,
            dim=32,
            seeds=None,
            dtype="float32",
            layout="separate",
            what="forward",
            contender=name,
            kernel="kernel, 1.0",
            ours=ours,
            status="ok",
            p20_ms=ms,
            p50_ms=ms,
            p80_ms=ms,
            samples=5,
            peak_bytes=peak,
            limit_ms=ms / 2,
            ratio=2.0,
        )

    steps = (512, 1024, 2048, 4096)
    naive = [row("naive", n, n * n / 2**13, 8 * n * n * 4) for n in steps]
    return naive + [row("attnpool:cpu", n, n * n / 2**16, n * 8192, ours=1) for n in steps]


def test_exponents():
    rows = _rows()
    time, peak = tables.exponents(rows[:4])
    assert time == pytest.approx(2) and peak == pytest.approx(2)
    time, peak = tables.exponents(rows[4:])
    assert time == pytest.approx(2) and peak == pytest.approx(1)
    assert "n^2.00" in tables.everything(rows)


def test_speed_up_is_over_the_fastest_other():
    rows = [replace(r, family="molecules") for r in _rows()]
    slower = [replace(r, contender="einsum", p50_ms=r.p50_ms * 3) for r in rows[:4]]
    found = {name: measured for name, _, measured, _ in goals.judge(rows + slower)}
    assert found["forward, 4 batches of molecules: geometric mean speed-up"] == "8.00"


def _written(path):
    table = sheet.Sheet(path)
    table.start({"device": "test", "threads": 2})
    for row in _rows():
        table.add(row)
    return table


def test_csv_round_trip_and_resume(tmp_path):
    path = tmp_path / "deep" / "x.csv"
    before = _written(path)
    rows, runs = sheet.read(path)
    assert rows == before.rows and runs[0]["device"] == "test"
    with open(path, "a") as file:
        file.write("half a li")  # the process was killed here
    again = sheet.Sheet(path, resume=True)
    again.start({"device": "test"})
    assert again.done() == before.done()
    again.add(replace(_rows()[0], p50_ms=1.0))
    rows, runs = sheet.read(path)
    assert len(rows) == len(before.rows) and len(runs) == 2
    assert [r.p50_ms for r in rows if r.key == _rows()[0].key] == [1.0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("p50_ms", "p51_ms", "unknown column 'p51_ms'"),
        ("p20_ms,", "", "missing column 'p20_ms'"),
        (",ok,", ",fine,", "status 'fine'"),
        (",separate,", ",", "fields, expected"),
        (",4096,1,", ",4096,one,", "'one' is not a number"),
        ('{"run"', '{"run', "not JSON"),
        ("suite,", "\0\0", "unknown column"),
    ],
)
def test_damaged_csv(tmp_path, capsys, old, new, message):
    path = tmp_path / "quick.csv"
    _written(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    damaged = path.read_bytes()
    assert run.main(["--resume", "--output", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "line " in error and "Traceback" not in error
    assert path.read_bytes() == damaged
    assert report.main([str(path), "--output", str(tmp_path / "x.html")]) == 2


def test_full_disk_keeps_earlier_rows(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from benchmarks.measuring import sheet\n"
        "from tests.benchmarks.test_suite import _rows, _written\n"
        "path = Path(sys.argv[1]); table = _written(path); size = path.stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, size + 40))\n"
        "try: table.add(_rows()[0])\n"
        "except sheet.BenchmarkError as error: print(error)\n"
        "assert path.stat().st_size == size\n"
    )
    path = tmp_path / "x.csv"
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "cannot write to" in found.stdout and "kept" in found.stdout
    assert len(sheet.read(path)[0]) == len(_rows())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "slow"], "unknown suite 'slow'; there are quick"),
        (["--contenders", "naive,fast"], "unknown contender 'fast'; there are attnpool:"),
        (["--contenders", ","], "names none"),
        (["--contenders", "pyg"], "pyg: no part in suite quick"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--qm7b", "nowhere.npz"], "no such file"),
        (["--qm7b", __file__], "not a file with z, pos and ptr"),
        (["--minutes", "0"], "must be positive"),
        (["--budget", "nan"], "must be positive, got nan"),
        (["--tiny", "--base", "no-such-ref"], "no commit, branch or tag"),
        (["--tiny", "--output", "/dev/null/x"], "cannot write results"),
    ],
)
def test_bad_arguments(arguments, message, capsys, tmp_path):
    if "--output" not in arguments:
        arguments = [*arguments, "--output", str(tmp_path)]
    assert run.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1 and "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(capsys, tmp_path):
    assert run.main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_help_and_list(capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(["--help"])
    assert stopped.value.code == 0
    assert "--suite" in capsys.readouterr().out
    assert run.main(["--list"]) == 0
    assert "attnpool:reference" in capsys.readouterr().out


def test_whole_run_resume_and_report(tmp_path, capsys):
    arguments = ["--tiny", "--contenders", "attnpool:cpu,attnpool:reference,naive"]
    arguments += ["--output", str(tmp_path), "--budget", "0.001"]
    arguments += ["--minutes", "inf", "--call", "600"]  # whatever else the machine does
    assert run.main([*arguments, "--qm7b", str(_little_qm7b(tmp_path))]) == 0
    shown = capsys.readouterr().out
    path = tmp_path / "quick-tiny.csv"
    rows, runs = sheet.read(path)
    assert {row.family for row in rows} == {"molecules", "seeds", "scaling"}
    assert {row.what for row in rows} == set(PASSES)
    assert all(row.ok for row in rows if row.contender == "naive")
    assert runs[0]["versions"]["torch"] and runs[0]["rates"]["copy_gbs"] > 0
    for row in rows:  # the limits were settled after the run, by whatever the machine did best
        assert row.limit_by in ("arithmetic", "memory", "library") and row.library_ms > 0
        if row.limit_by != "library" and row.ok:
            assert row.ratio >= 1, f"{row.workload}, {row.what}, {row.contender}: {row.ratio}"
    assert "naive and attnpool agree" in shown and "real molecules (QM7b)" in shown
    pytest.importorskip("matplotlib")
    assert (tmp_path / "quick-tiny-scaling.png").stat().st_size > 10_000
    assert run.main([*arguments, "--resume", "--no-molecules", "--no-figures"]) == 0
    assert len(sheet.read(path)[0]) == len(rows)
    page = tmp_path / "report.html"
    assert report.main([str(path), "--output", str(page)]) == 0
    text = page.read_text()
    assert text.count("<img") >= 3 and 'src="http' not in text and "torch" in text


def test_report_of_accuracies_and_of_unknown_families(tmp_path, capsys):
    columns = "backbone,pooling,split,target,unit,test_mae,constant_mae"
    path = tmp_path / "qm7b.csv"
    lines = [
        f"schnet,{p},{i},homo,eV,{x},0.5"
        for p, i, x in (("sum", 0, 0.2), ("sum", 1, 0.4), ("abp", 0, 0.1))
    ]
    path.write_text("\n".join([columns, '# run {"device": "test"}', *lines]))
    curves = tmp_path / "qm7b-curves.csv"
    curves.write_text("backbone,epoch\nschnet,1\n")
    other = sheet.Sheet(tmp_path / "training.csv")
    other.start({"device": "test"})
    other.add(replace(_rows()[0], family="training", what="force step", contender="padded"))
    page = tmp_path / "x.html"
    files = [str(x) for x in (path, curves, other.path)]
    assert report.main([*files, "--output", str(page)]) == 0
    text = page.read_text()
    assert "<td>0.3</td>" in text and "<td>0.1</td>" in text and "<td>0.5</td>" in text
    assert "padded" in text and "force step" in text and "epoch" not in text
    path.write_text(columns + "\nschnet,sum\n")
    assert report.main([*files, "--output", str(page)]) == 2
    assert "row 1: 2 fields, expected 7" in capsys.readouterr().err
    assert page.read_text() == text


@pytest.mark.parametrize(
    "gone",
    [{"peak_bytes": None}, {"peak_bytes": 1000}, {"limit_ms": None}, {"p20_ms": None}],
    ids=lambda gone: next(iter(gone)),
)
def test_figure_with_a_gap(tmp_path, gone):
    """As on a busy machine, where every measurement of memory ran out of time."""
    pytest.importorskip("matplotlib")
    made = plot.draw([replace(row, **gone) for row in _rows()], tmp_path / "x", "test")
    assert [path.name for path in made] == ["x-scaling.png", "x-scaling.svg"]
    assert all(path.stat().st_size > 10_000 for path in made)
    assert ("no measurement over" in made[1].read_text()) == ("peak_bytes" in gone)


def test_figure_of_seeds(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [replace(row, family="seeds", seeds=s, x=s) for row in _rows() for s in (1, 2, 4, 8)]
    made = plot.draw(rows, tmp_path / "x", "test")
    assert [path.name for path in made] == ["x-seeds.png", "x-seeds.svg"]


def _little_qm7b(folder):
    """Two molecules in the format of the real file, in bohr."""
    import numpy as np

    path = folder / "qm7b.npz"
    pos = np.random.default_rng(0).normal(size=(7, 3)) * 3
    np.savez(path, z=np.array([6, 1, 1, 8, 1, 7, 17], np.int16), pos=pos, ptr=np.array([0, 4, 7]))
    return path
