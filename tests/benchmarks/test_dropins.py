"""The study of the drop-ins: it runs, compares, and says what it cannot do."""

import pytest

pytest.importorskip("torch_geometric")

import torch

from benchmarks.measuring import sheet
from benchmarks.studies import dropins


def test_a_case_from_end_to_end(tmp_path, capsys):
    path = tmp_path / "found.csv"
    assert dropins.main(["--cases", "tiny", "--budget", "0.01", "--output", str(path)]) == 0
    rows, runs = sheet.read(path)
    assert [row.contender for row in rows] == ["theirs", "attnpool"] and len(runs) == 1
    assert all(row.timed and row.peak_bytes for row in rows)
    assert "times faster" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gps-18", "multihead", "gmt", "esa-94"])
def test_both_have_the_same_numbers(name, monkeypatch):
    """Of few graphs; the study compares what it times."""
    few = {
        "gps-18": lambda: dropins._gps("QM9-like", 2),
        "multihead": lambda: dropins._multihead("QM9-like", 2),
        "gmt": lambda: dropins._aggregation(
            "GraphMultisetTransformer", (64, 2, 1, 4), "QM9-like", 2
        ),
        "esa-94": lambda: dropins._esa(24, 2),
    }
    case = few[name]()
    assert name in dropins.CASES and not dropins.compare(case, case.steps[-1])
    theirs = case.make[0]

    def spoiled():
        module = theirs()
        with torch.no_grad():
            next(module.parameters()).mul_(1.01)
        return module

    modules = [spoiled(), case.make[1]()]
    torch.manual_seed(0)
    monkeypatch.setattr(case, "modules", lambda: modules)
    assert "relative difference" in dropins.compare(case, "backward")


def test_wrong_options(tmp_path, capsys):
    for arguments, words in ((["--cases", "gpt"], "--cases"), (["--budget", "-1"], "--budget")):
        assert dropins.main([*arguments, "--output", str(tmp_path / "x.csv")]) == 2
        assert words in capsys.readouterr().err
