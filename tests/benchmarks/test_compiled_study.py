"""The study of compiled training: it runs, compares, and says what it cannot do."""

import pytest

pytest.importorskip("torch_geometric")

import torch

from benchmarks.measuring import sheet
from benchmarks.studies import compiled


@pytest.fixture(autouse=True)
def as_recorded(monkeypatch):
    """The compiler takes a minute; the example runs it."""
    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: graph)


def test_a_case_from_end_to_end(tmp_path, capsys):
    path = tmp_path / "found.csv"
    assert compiled.main(["--cases", "tiny", "--budget", "0.01", "--output", str(path)]) == 0
    rows, runs = sheet.read(path)
    assert [row.contender for row in rows] == ["eager", "compiled"] and len(runs) == 1
    assert all(row.timed for row in rows) and "first compilation" in rows[1].kernel
    assert "times faster" in capsys.readouterr().out


def test_a_wrong_gradient_is_seen(monkeypatch):
    case = compiled.CASES["tiny"]()
    assert not compiled.compare(case)
    right = compiled.gradients

    def wrong(model, batch):
        return [g * 1.001 for g in right(model, batch)]

    monkeypatch.setattr(compiled, "gradients", wrong)
    assert "apart" in compiled.compare(case)


def test_wrong_options(tmp_path, capsys):
    for arguments, words in ((["--cases", "gpt"], "--cases"), (["--budget", "-1"], "--budget")):
        assert compiled.main([*arguments, "--output", str(tmp_path / "x.csv")]) == 2
        assert words in capsys.readouterr().err
